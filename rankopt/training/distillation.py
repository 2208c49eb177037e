"""Learning from the dense model: its weights, its layers' outputs and its logits.

References: L = L_ce + λ·L_diss is the fine-tuning loss of arXiv 2409.03555, with
per-element means in place of its sums; logits at a temperature follow 1503.02531.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankopt._build.apply import unpacked_clone
from rankopt._build.fold import effective_weight
from rankopt._build.provenance import plan_of
from rankopt._model import surgery
from rankopt._model.inputs import class_dim, compared, kl, run
from rankopt._model.layers import canonical_weight
from rankopt.errors import ModelError
from rankopt.plan import MERGE
from rankopt.training.freezing import factorised, factors
from rankopt.training.paired_outputs import PairedOutputs

__all__ = [
    "Distillation",
    "Distiller",
    "check_trainable",
    "decomposed",
    "private_teacher",
    "train_as_evaluated",
]


@dataclass(frozen=True)
class Distillation:
    """Weights of the terms of a training loss; the defaults are those of arXiv 2409.03555.

    Args:
        labels: Of the task's own loss. 0 trains without labels; give `logits` a weight then.
        weights: λ of mean (W − Ŵ)², summed over the decomposed layers.
        outputs: λ of mean (O − Ô)² over the outputs of the decomposed layers and of
            `features`, summed over the layers; of one that runs several times the mean.
        logits: Of T²·KL(teacher ‖ model) at temperature T; mean squared error where there
            is one output column.
        temperature: T.
        features: Full names of more modules whose outputs are compared.

    Example:
        >>> unlabelled = Distillation(labels=0, weights=0, logits=1)
        >>> unlabelled.temperature
        4.0
    """

    labels: float = 1.0
    weights: float = 0.5
    outputs: float = 0.5
    logits: float = 0.0
    temperature: float = 4.0
    features: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("labels", "weights", "outputs", "logits", "temperature"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{name}={value!r}: expected a number")
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value!r}: expected a finite number of at least 0")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r}: expected a number above 0")
        if isinstance(self.features, str):
            raise ValueError(f"features={self.features!r}: expected a tuple of module names")
        if self.features and not self.outputs:
            raise ValueError(
                f"features={self.features!r}: outputs=0 compares none; give outputs a weight"
            )
        if not (self.labels or self.weights or self.outputs or self.logits):
            raise ValueError("every term has weight 0, so there is no loss")

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class Distiller:
    """The loss of a model beside its teacher, for anyone's training loop.

    The teacher runs once per batch, in eval mode and without gradients, on the very
    inputs the model gets, augmentation included. A private copy of it runs; the teacher itself
    is not touched.

    Args:
        model: From `rankopt.apply` or `rankopt.load`.
        teacher: The dense model.
        settings: The terms and their weights.

    Raises:
        ModelError: The model carries no plan, a decomposed layer has another shape in
            the teacher, or a name in `features` is missing.

    Example:
        >>> dense = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> small = rankopt.apply(dense, rankopt.search(dense, "params<=60%"))
        >>> x, y = torch.randn(8, 16), torch.zeros(8, dtype=torch.long)
        >>> with Distiller(small, dense, Distillation(logits=1.0)) as distiller:
        ...     distiller.teach(x)
        ...     output = small(x)
        ...     loss, parts = distiller.loss(output, nn.functional.cross_entropy(output, y))
        >>> sorted(parts)
        ['labels', 'logits', 'outputs', 'weights']
    """

    def __init__(
        self, model: nn.Module, teacher: nn.Module, settings: Distillation | None = None
    ) -> None:
        self.settings = settings or Distillation()
        self.model = surgery.unwrap(model)
        self.teacher = private_teacher(teacher).to(surgery.device_of(self.model))
        self._chains = _chains(self.model, self.teacher) if self.settings.weights else []
        names = _compared(self.model, self.teacher, self.settings)
        self._layers = PairedOutputs(self.model, self.teacher, names)
        self._wanted: Any = None
        self._reported = False
        compares = self.settings.weights or self.settings.outputs
        if compares and decomposed(self.model) and not (self._chains or self._layers.names):
            raise ModelError(
                "the teacher has none of the model's decomposed layers, so neither their weights "
                "nor their outputs can be compared; distil from the model that was compressed, or "
                "by logits alone: Distillation(weights=0, outputs=0, logits=1)"
            )

    def __enter__(self) -> Distiller:
        self._layers.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._layers.__exit__(*exception)
        self._wanted = None

    def teach(self, inputs: Any) -> None:
        """Run the teacher on what the model is about to see.

        Raises:
            ModelError: Outside of ``with``, where no layers are watched.
        """
        self._check_watching()
        self._layers.forget()
        if self.settings.logits or self._layers.names:
            with torch.no_grad():
                self._wanted = run(self.teacher, inputs)

    def loss(self, output: Any, task: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and its terms before weighting, detached.

        Args:
            output: Of the model, on the inputs last given to `teach`.
            task: The task's own loss; needed unless `labels` is 0.

        Raises:
            ModelError: Teacher and model differ in the shape of an output, or there are none
                of the teacher's: outside of ``with``, or before `teach`; or the model ran code
                that was compiled before ``with``.
        """
        settings = self.settings
        parts: dict[str, Tensor] = {}
        pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
        if settings.labels:
            if task is None:
                raise ModelError(
                    "this distillation weighs the task's loss, but there is none: the batch has "
                    "no labels; train without them by Distillation(labels=0, logits=1)"
                )
            parts["labels"] = task
        self._check_watching()
        if self._wanted is None and (settings.logits or self._layers.names):
            raise ModelError("call teach(inputs) before the model: there are no outputs to learn")
        if settings.weights and self._chains:
            errors = [
                (effective_weight(chain) - weight).square().mean() for chain, weight in self._chains
            ]
            parts["weights"] = torch.stack(errors).sum()
        if settings.outputs:
            pairs = self._layers.pairs()
            errors = [_mean_squared(name, calls) for name, calls in pairs.items()]
            missing = {*settings.features} - pairs.keys()
            if missing:
                raise ModelError(
                    f"features: {min(missing)} gave no tensor to compare in this batch: it did "
                    "not run in both model and teacher, or returned none"
                )
            if errors:
                parts["outputs"] = torch.stack(errors).sum()
            elif not self._reported:
                self._check_reported()
            self._reported = True
        if settings.logits:
            parts["logits"] = _divergence(self._wanted, output, settings.temperature)
        if not parts:
            raise ModelError("the plan decomposed no layer, so there is nothing to distil")
        total = torch.stack([getattr(settings, name) * part for name, part in parts.items()]).sum()
        if total.requires_grad:
            self._layers.check_gradients(pairs)
        return total, {name: part.detach() for name, part in parts.items()}

    def _check_reported(self) -> None:
        """Raise if a compiled model runs code made before its layers were watched."""
        compiled = "torch._dynamo" in sys.modules
        if compiled and self._layers.names and not self._layers.ran():
            raise ModelError(
                f"none of the compared layers, {self._layers.names[0]} the first, reported an "
                "output: the model was compiled before they were watched; call "
                "torch.compiler.reset() after `with Distiller(...) as distiller:` begins"
            )

    def _check_watching(self) -> None:
        if self._layers.names and not self._layers.watching:
            raise ModelError(
                "this distillation compares outputs of layers, which are watched inside "
                "`with Distiller(...) as distiller:` only"
            )


def decomposed(model: nn.Module) -> list[str]:
    """The first layer of every site the model's plan factorised; none without a plan.

    Of a merge the last layer: its output is as wide as the dense model's.
    """
    plan = plan_of(model)
    if plan is None:
        return []
    merged = [decision.targets[-1] for decision in plan.changes if decision.method == MERGE]
    return [decision.targets[0] for decision in factorised(plan)] + merged


def check_trainable(model: nn.Module, who: str) -> None:
    """Refuse parameters that cannot be trained as they are.

    Raises:
        ModelError: Some are in half precision, or get sparse gradients.
    """
    if any(p.requires_grad and p.dtype == torch.float16 for p in model.parameters()):
        raise ModelError(
            f"{who} cannot train float16 parameters, whose steps would underflow; convert the "
            "model with .float() or .bfloat16() first, and back with .half() afterwards"
        )
    for name, module in surgery.named_modules(surgery.unwrap(model)):
        trained = any(p.requires_grad for p in module.parameters(recurse=False))
        if trained and getattr(module, "sparse", False) is True:
            raise ModelError(
                f"layer {name}: {who} cannot train a {type(module).__name__} with sparse=True, "
                "whose gradients have no norm to clip; set sparse=False, or requires_grad_(False)"
            )


def private_teacher(teacher: nn.Module) -> nn.Module:
    """A copy in eval mode whose layers have the names a plan uses."""
    return unpacked_clone(surgery.unwrap(teacher), runs=True).eval()


def train_as_evaluated(model: nn.Module) -> None:
    """Eval mode but for BatchNorm, whose statistics move.

    Dropout, stochastic depth and the like would only blur a teacher's target. cuDNN
    differentiates recurrent layers in train mode only.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.RNNBase)):
            module.training = True


def _chains(model: nn.Module, teacher: nn.Module) -> list[tuple[nn.Sequential, Tensor]]:
    """Every decomposed layer as its chain and the dense weight it stands for."""
    ours = dict(surgery.named_modules(model))
    theirs = dict(surgery.named_modules(teacher))
    found = []
    for name in dict.fromkeys(factor.layer for factor in factors(model)):
        chain = ours[name]
        if isinstance(chain, nn.Sequential) and hasattr(theirs.get(name), "weight"):
            weight = canonical_weight(theirs[name])
            with torch.no_grad():
                same = effective_weight(chain).shape == weight.shape
            if not same:
                raise ModelError(
                    f"layer {name}: the teacher's weight is {_shapes([theirs[name]])}, "
                    f"which the model's factors {_shapes(chain)} do not multiply to; distil from "
                    "the model that was compressed"
                )
            found.append((chain, weight))
    return found


def _shapes(modules: Iterable[Any]) -> str:
    return " and ".join(str(list(m.weight.shape)) for m in modules if hasattr(m, "weight"))


def _compared(model: nn.Module, teacher: nn.Module, settings: Distillation) -> list[str]:
    """Names of the modules whose outputs the settings compare."""
    both = [dict(surgery.named_modules(module)) for module in (model, teacher)]
    for name in settings.features:
        if not all(name in modules for modules in both):
            raise ModelError(f"features: there is no module {name!r} in both model and teacher")
    if not settings.outputs:
        return []
    return list(dict.fromkeys([*decomposed(model), *settings.features]))


def _mean_squared(name: str, calls: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Of a layer's outputs, averaged over its calls in a forward pass."""
    for wanted, found in calls:
        if wanted.shape != found.shape:
            raise ModelError(
                f"layer {name}: the teacher's output is {list(wanted.shape)}, the model's "
                f"{list(found.shape)}"
            )
    return torch.stack([F.mse_loss(found.float(), old.float()) for old, found in calls]).mean()


def _divergence(wanted: Any, found: Any, temperature: float) -> Tensor:
    """T²·KL per sample or position; mean squared error of a single column."""
    old, new = (compared(output) for output in (wanted, found))
    if old.shape != new.shape:
        raise ModelError(
            f"the teacher's output is {list(old.shape)}, the model's {list(new.shape)}; distil "
            "from a model with the same outputs"
        )
    if old.dim() < 2 or old.shape[class_dim(old)] == 1:
        return F.mse_loss(new.float(), old.float())
    return kl(old, new, temperature=temperature, exact=False)

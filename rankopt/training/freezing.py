"""Training some factors of each decomposed layer at a time, which skips their weight gradients.

A backward pass spends one product on a layer's input gradient and one, as
large, on its weight gradient. With the second skipped for a share f of the MACs, a
training step gains at most 3 / (3 − f); see `Freezer.ceiling`.

References: fixed freezing, arXiv 2407.20266 §2.2; sequential freezing, 2309.03824.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from rankopt._build.provenance import plan_of
from rankopt._model import measure, surgery
from rankopt._model.hooks import hooked
from rankopt.errors import ModelError
from rankopt.plan import Decision, RankPlan
from rankopt.registry import decompositions
from rankopt.training.schedules import Fixed, Roles, Schedule, Sequential

__all__ = [
    "Factor",
    "FixedFreezing",
    "Freezer",
    "SequentialFreezing",
    "factorised",
    "factors",
    "release",
]

_CONVS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# On modules whose weight a Freezer froze: one that is interrupted leaves them to the next.
_FROZEN_ATTRIBUTE: Final = "rankopt_frozen"


@dataclass(frozen=True)
class Factor:
    """One factor of a decomposed layer.

    Args:
        name: Full name of the factor's module.
        layer: Full name of the layer it is part of.
        role: ``first``, ``core`` or ``last``.
        roles: Every role in that layer.
        module: The `nn.Linear` or `nn.ConvNd` itself.
    """

    name: str
    layer: str
    role: str
    roles: Roles
    module: nn.Module

    @property
    def weight(self) -> nn.Parameter:
        """The factor; its bias, if it has one, is never frozen."""
        found: nn.Parameter = self.module.get_parameter("weight")
        return found


def factors(model: nn.Module) -> tuple[Factor, ...]:
    """The factors of every layer the model's plan decomposed.

    Args:
        model: From `rankopt.apply` or `rankopt.load`, possibly wrapped by
            torch.compile, DataParallel or DDP.

    Raises:
        ModelError: The model carries no plan.
    """
    plan = plan_of(model)
    if plan is None:
        raise ModelError(
            f"this {type(surgery.unwrap(model)).__name__} carries no plan, so which weights are "
            "factors is unknown; it must come from rankopt.apply or rankopt.load"
        )
    modules = dict(surgery.named_modules(surgery.unwrap(model)))
    found = []
    for decision in factorised(plan):
        roles = decompositions.get(decision.method).roles
        for target in decision.targets:
            children = dict(modules[target].named_children()) if target in modules else {}
            parts = [
                (name, roles[name], child)
                for name, child in children.items()
                if name in roles and isinstance(getattr(child, "weight", None), nn.Parameter)
            ]
            present = frozenset(role for _, role, _ in parts)
            found += [
                Factor(f"{target}.{name}".lstrip("."), target, role, present, child)
                for name, role, child in parts
            ]
    return tuple(found)


def factorised(plan: RankPlan) -> tuple[Decision, ...]:
    """The decisions that put chains of factors in place of layers, and not something else."""
    known = decompositions.names()
    return tuple(decision for decision in plan.changes if decision.method in known)


class Freezer:
    """Carries out a schedule on a model, in anyone's training loop.

    Frozen means: requires_grad is off *and* the gradient is None. Optimisers skip
    parameters without a gradient, so momentum and weight decay do not move them
    either, and their optimiser state waits; autograd does not compute their weight
    gradient at all. Call `step` outside of forward and backward, after the
    optimiser's step. Parameters that were frozen before stay frozen, but for those that a
    Freezer left so which was interrupted: they are released first.

    torch.compile recompiles once for each distinct phase and then uses the cached graphs.
    DistributedDataParallel decides at construction which gradients it exchanges: wrap
    the model anew whenever `step` returns True (`rankopt.finetune` does).

    Args:
        model: From `rankopt.apply` or `rankopt.load`.
        schedule: What is frozen when.

    Raises:
        ModelError: The model carries no plan.

    Example:
        >>> dense = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> small = rankopt.apply(dense, rankopt.search(dense, "params<=50%"))
        >>> freezer = Freezer(small, Sequential())
        >>> for epoch in range(2):
        ...     changed = freezer.step(epoch)  # then train this epoch as usual
        ...     print(freezer.frozen[:1])
        ('0.first.weight',)
        ('0.last.weight',)
        >>> freezer.release()
    """

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        self.schedule = schedule
        self._model = surgery.unwrap(model)
        release(self._model)
        self._factors = [f for f in factors(model) if f.weight.requires_grad]

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the factor weights that do not train now."""
        return tuple(f"{f.name}.weight" for f in self._factors if not f.weight.requires_grad)

    def step(self, phase: int) -> bool:
        """Freeze what the schedule freezes in `phase`, and let the rest train.

        Returns:
            Whether anything changed.

        Raises:
            ModelError: Nothing at all would be left to train.
        """
        frozen = self._weights(phase)
        ours = {id(factor.weight) for factor in self._factors}
        if frozen.keys() == ours and not any(
            p.requires_grad for p in self._model.parameters() if id(p) not in ours
        ):
            raise ModelError(
                f"phase {phase} of {self.schedule} freezes every parameter, so nothing would train"
            )
        changed = False
        for factor in self._factors:
            weight = factor.weight
            trains = id(weight) not in frozen
            changed |= weight.requires_grad != trains
            _set_frozen(factor.module, frozen=not trains)
            if not trains:
                weight.grad = None  # a stale gradient would keep moving the weight
        return changed

    def release(self) -> None:
        """Let every factor train again."""
        release(self._model)

    def skipped(self, phase: int, example_inputs: Any) -> float:
        """The share f of the model's MACs whose weight gradient `phase` skips.

        Args:
            phase: As for `step`.
            example_inputs: A tensor, a tuple or a mapping to call the model with.
        """
        frozen = self._weights(phase)
        macs = {id(factor.module): 0 for factor in self._factors if id(factor.weight) in frozen}

        def hook(module: Any, _: Any, output: Tensor) -> None:
            per_output = module.weight[0].numel()
            macs[id(module)] += output.numel() * per_output

        counted = [f.module for f in self._factors if id(f.module) in macs]
        model = self._model
        inputs = measure.to_device(example_inputs, surgery.device_of(model))
        with (
            hooked(module.register_forward_hook(hook) for module in counted),
            torch.no_grad(),
            measure.preserve_rng(),
            measure.evaluation(model),
        ):
            total = measure.count_macs(model, inputs)
        return sum(macs.values()) / max(total, 1)

    def ceiling(self, phase: int, example_inputs: Any) -> float:
        """The largest possible gain of a training step in `phase`, 3 / (3 − f).

        A step costs three products of equal size per layer, forward, input
        gradient and weight gradient, of which the last is skipped for the share f of MACs.
        """
        return 3 / (3 - self.skipped(phase, example_inputs))

    def _weights(self, phase: int) -> dict[int, nn.Parameter]:
        """Weights that every layer using them freezes, by identity."""
        frozen: dict[int, nn.Parameter] = {}
        trained: set[int] = set()
        for factor in self._factors:
            if factor.role in self.schedule.frozen(phase, factor.roles):
                frozen[id(factor.weight)] = factor.weight
            else:
                trained.add(id(factor.weight))
        return {key: weight for key, weight in frozen.items() if key not in trained}


def release(model: nn.Module) -> None:
    """Let every weight train again that a `Freezer` froze, interrupted or not."""
    for module in surgery.unwrap(model).modules():
        if _FROZEN_ATTRIBUTE in module.__dict__:
            _set_frozen(module, frozen=False)


def _set_frozen(module: nn.Module, *, frozen: bool) -> None:
    module.get_parameter("weight").requires_grad_(not frozen)
    _set_bias_apart(module, apart=frozen)
    if frozen:
        module.__dict__[_FROZEN_ATTRIBUTE] = True
    else:
        module.__dict__.pop(_FROZEN_ATTRIBUTE, None)


def _set_bias_apart(module: nn.Module, *, apart: bool) -> None:
    """Whether a CPU convolution adds its bias as an operation of its own.

    oneDNN computes weight and bias gradients in one kernel, so a trainable bias
    would bring back the weight gradient that freezing is to skip.
    """
    needed = apart and isinstance(module, _CONVS) and module.bias is not None
    if needed and module.weight.device.type == "cpu":
        module.forward = MethodType(_convolve_then_add, module)
    elif getattr(module.__dict__.get("forward"), "__func__", None) is _convolve_then_add:
        del module.__dict__["forward"]


def _convolve_then_add(module: Any, x: Tensor) -> Tensor:
    out: Tensor = module._conv_forward(x, module.weight, None)
    bias: Tensor = module.bias.view(-1, *(1,) * (module.weight.dim() - 2))
    return out + bias.to(out.dtype)


class FixedFreezing(Freezer):
    """`Freezer` with the schedule `Fixed`.

    Args:
        model: As for `Freezer`.
        final: From this phase on everything trains; None for never.
    """

    def __init__(self, model: nn.Module, *, final: int | None = None) -> None:
        schedule: Schedule = Fixed()
        super().__init__(model, schedule if final is None else schedule.until(final))


class SequentialFreezing(Freezer):
    """`Freezer` with the schedule `Sequential`.

    Args:
        model: As for `Freezer`.
        every: Length of a turn, in what is passed to `step`: epochs, or steps.
        parity: See `Sequential`.
        final: From this phase on everything trains; None for never.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 1,
        parity: Literal[0, 1] = 0,
        final: int | None = None,
    ) -> None:
        schedule = Sequential(parity).every(every)
        super().__init__(model, schedule if final is None else schedule.until(final))

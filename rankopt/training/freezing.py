"""Training some factors of each decomposed layer at a time, which skips their weight gradients.

A backward pass spends one product on a layer's input gradient and one, as
large, on its weight gradient. With the second skipped for a share f of the MACs, a
training step gains at most 3 / (3 − f); see `Freezer.ceiling`. In a front that does not train at
all both are skipped.

References: fixed freezing, arXiv 2407.20266 §2.2; sequential freezing, 2309.03824; the front of
the network as training ends, 1706.04983.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
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
from rankopt.training.front import front_modules
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
_CONV_FORWARDS: Final = tuple(conv.forward for conv in _CONVS)
# On modules, the parameters a Freezer froze: one that is interrupted leaves them to the next.
_FROZEN_ATTRIBUTE: Final = "_rankopt_frozen"


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
        ModelError: The model carries no plan, or lacks factors of it.
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
            if not parts:
                raise ModelError(
                    f"layer {target} of the plan has no factors in this "
                    f"{type(surgery.unwrap(model)).__name__}: it was replaced, or wrapped such as "
                    "by checkpoint_wrapper; make the Freezer before wrapping it"
                )
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
        ModelError: The model carries no plan, or the schedule names a module that it lacks.

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
        self._roles = {factor.roles for factor in self._factors}
        self._fronts = {name: front_modules(self._model, name) for name in schedule.modules()}

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the parameters that do not train now: factors, and all of a frozen front."""
        found: dict[int, str] = {}
        for name, module in surgery.named_modules(self._model):
            for owned in _held(module):
                parameter = module.get_parameter(owned)
                if not parameter.requires_grad:
                    found.setdefault(id(parameter), f"{name}.{owned}".lstrip("."))
        return tuple(found.values())

    def step(self, phase: int) -> bool:
        """Freeze what the schedule freezes in `phase`, and let the rest train.

        Returns:
            Whether anything changed.

        Raises:
            ModelError: Nothing at all would be left to train.
        """
        modules = list(self._model.modules())
        able = {
            id(parameter)
            for module in modules
            for name, parameter in _own(module)
            if parameter.requires_grad or name in _held(module)
        }
        frozen = self._frozen_in(phase) & able  # what others froze stays theirs
        if frozen == able:
            raise ModelError(
                f"phase {phase} of {self.schedule} freezes every parameter, so nothing would train"
            )
        changes = [_hold(module, frozen) for module in modules]
        return any(changes)

    def release(self) -> None:
        """Let everything train again."""
        release(self._model)

    def skipped(self, phase: int, example_inputs: Any) -> float:
        """The share f of the model's MACs whose weight gradient `phase` skips.

        Of fronts, only linear and convolutional layers are counted, not those inside attention.

        Args:
            phase: As for `step`.
            example_inputs: A tensor, a tuple or a mapping to call the model with.
        """
        return self._skipped(phase, example_inputs)[0]

    def ceiling(self, phase: int, example_inputs: Any) -> float:
        """The largest possible gain of a training step in `phase`, 3 / (3 − f − g).

        A step costs three products of equal size per layer, forward, input
        gradient and weight gradient. The last is skipped for the share f of MACs, the second in
        a frozen front, for the share g.
        """
        return 3 / (3 - sum(self._skipped(phase, example_inputs)))

    def _skipped(self, phase: int, example_inputs: Any) -> tuple[float, float]:
        """Shares of the MACs whose weight and whose input gradients `phase` skips."""
        frozen, front = self._frozen_in(phase), self._front(phase)
        behind = _unreached(front.values(), frozen)
        resting = {id(f.module): f.module for f in self._factors if id(f.weight) in frozen}
        layers = {
            key: module
            for key, module in (resting | front).items()
            if isinstance(module, (nn.Linear, *_CONVS))
        }
        macs = dict.fromkeys(layers, 0)

        def hook(module: Any, _: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                macs[id(module)] += output.numel() * module.weight[0].numel()

        model = self._model
        inputs = measure.to_device(example_inputs, surgery.device_of(model))
        with (
            hooked(module.register_forward_hook(hook) for module in layers.values()),
            torch.no_grad(),
            measure.preserve_rng(),
            measure.evaluation(model),
        ):
            total = max(measure.count_macs(model, inputs), 1)
        weights = sum(
            count for key, count in macs.items()
            if all(id(p) in frozen for name, p in _own(layers[key]) if name != "bias")
        )  # fmt: skip
        return weights / total, sum(macs.get(key, 0) for key in behind) / total

    def _front(self, phase: int) -> dict[int, nn.Module]:
        """The modules of the fronts that are frozen in `phase`, by identity."""
        found: dict[int, nn.Module] = {}
        for name in sorted(self.schedule.fronts(phase)):
            if name not in self._fronts:  # a schedule need not announce them
                self._fronts[name] = front_modules(self._model, name)
            found |= self._fronts[name]
        return found

    def _frozen_in(self, phase: int) -> Set[int]:
        """Identities of the parameters that every module having them freezes."""
        front = self._front(phase)
        roles = {kinds: self.schedule.frozen(phase, kinds) for kinds in self._roles}
        resting = {id(f.module) for f in self._factors if f.role in roles[f.roles]}
        frozen: set[int] = set()
        trained: set[int] = set()
        for module in self._model.modules():
            for name, parameter in _own(module):
                rests = id(module) in front or (name == "weight" and id(module) in resting)
                (frozen if rests else trained).add(id(parameter))
        return frozen - trained


def release(model: nn.Module) -> None:
    """Let every parameter train again that a `Freezer` froze, interrupted or not."""
    for module in surgery.unwrap(model).modules():
        _hold(module, frozenset())


def _unreached(front: Iterable[nn.Module], frozen: Set[int]) -> Set[int]:
    """Identities of a front's modules that no gradient gets to: those before any that trains."""
    found: set[int] = set()
    for module in front:
        if any(id(parameter) not in frozen for _, parameter in _own(module)):
            break
        found.add(id(module))
    return found


def _own(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """A module's own parameters by name; a step looks at all of the model, so without detours."""
    return [(name, found) for name, found in module._parameters.items() if found is not None]


def _held(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of a module's own that a `Freezer` froze."""
    names: tuple[str, ...] = module.__dict__.get(_FROZEN_ATTRIBUTE, ())
    return names


def _hold(module: nn.Module, frozen: Set[int]) -> bool:
    """Freeze those of a module's own parameters and let go of the others that were frozen here.

    Returns:
        Whether anything changed.
    """
    before, now = _held(module), []
    changed = False
    for name, parameter in _own(module):
        rests = id(parameter) in frozen
        if rests:
            now.append(name)
            parameter.grad = None  # a stale gradient would keep moving it
        if rests or name in before:
            changed |= parameter.requires_grad == rests
            parameter.requires_grad_(not rests)
    if tuple(now) == before:
        return changed
    module.__dict__[_FROZEN_ATTRIBUTE] = tuple(now)
    if not now:
        del module.__dict__[_FROZEN_ATTRIBUTE]
    _set_bias_apart(module, apart="weight" in now and "bias" not in now)
    return changed


def _set_bias_apart(module: nn.Module, *, apart: bool) -> None:
    """Whether a CPU convolution adds its bias as an operation of its own.

    oneDNN computes weight and bias gradients in one kernel, so a trainable bias
    would bring back the weight gradient that freezing is to skip.
    """
    placed = getattr(module.__dict__.get("forward"), "__func__", None)
    if placed in (_convolve_then_add, type(module).forward):  # the class's own: read from a file
        del module.__dict__["forward"]
    if (
        apart
        and isinstance(module, _CONVS)
        and type(module).forward in _CONV_FORWARDS
        and "forward" not in module.__dict__
        and module.bias is not None
        and module.bias.requires_grad
        and module.weight.device.type == "cpu"
    ):
        module.__dict__["forward"] = MethodType(_convolve_then_add, module)


def _convolve_then_add(module: Any, x: Tensor) -> Tensor:
    out: Tensor = module._conv_forward(x, module.weight, None)
    bias: Tensor = module.bias.view(-1, *(1,) * (module.weight.dim() - 2))
    return out + bias.to(out.dtype)


# Bound functions are pickled by name: a model read from a file has the class's own forward.
_convolve_then_add.__name__ = "forward"


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

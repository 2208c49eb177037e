"""Decisions to chains: what a plan's decisions mean for a model, carried out layer by layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankopt._calibration.moments import Moments
from rankopt._decompositions.base import Decomposition
from rankopt._decompositions.cache import shared
from rankopt._decompositions.rebuild import response
from rankopt._model import measure, surgery
from rankopt._model.layers import Layer, canonical_weight, check_weight, find_layers
from rankopt._utils.parallel import for_each, largest_first
from rankopt._utils.progress import progress_bar
from rankopt.errors import LayerError, PlanError, RegistryError
from rankopt.plan import MERGE, Decision, RankPlan
from rankopt.registry import decompositions

__all__ = [
    "Fill",
    "Filling",
    "Step",
    "build_chains",
    "chains_for",
    "chains_of",
    "check_arguments",
    "factoriser",
    "steps_of",
]


@dataclass(frozen=True)
class Step:
    """One decision with what it needs to be carried out."""

    decision: Decision
    method: Decomposition
    layers: tuple[Layer, ...]
    modules: tuple[nn.Module, ...]


@dataclass(frozen=True)
class Filling:
    """The values of a chain.

    Args:
        factors: By parameter name.
        means: Of the inputs that the dense layer and the chain are given, [groups, n] each:
            the chain's bias then gives its outputs the mean of the dense layer's. None leaves
            the bias as it is.
    """

    factors: Mapping[str, Tensor]
    means: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, factors: Mapping[str, Tensor], moments: Moments | None) -> Filling:
        """Factors made with moments of the inputs of both."""
        mean = None if moments is None else moments.mean
        return cls(factors, None if mean is None else (mean, mean))


Fill = Callable[[Step, nn.Sequential, Tensor], Filling]


def check_arguments(model: Any, plan: Any) -> None:
    """Check what a user gave as a model and its plan.

    Raises:
        ModelError: `model` is no module.
        PlanError: `plan` is no plan.
    """
    surgery.check_model(model, swapped=plan)
    if not isinstance(plan, RankPlan):
        got, hint = type(plan).__name__, "make one with rankopt.search"
        if isinstance(plan, (str, os.PathLike)):
            hint = f"read the file first: rankopt.RankPlan.load({os.fspath(plan)!r})"
        raise PlanError(f"plan: expected a rankopt.RankPlan, got {got}; {hint}")


def chains_of(
    decision: Decision,
    layers: Sequence[Layer],
    modules: Sequence[nn.Module],
    fill: Callable[[Decomposition, Sequence[int]], Filling],
) -> dict[str, nn.Module]:
    """Layer name to the chain of one decision, its values taken from `fill`.

    Raises:
        PlanError: The decision does not fit the layers.
    """
    step = Step(decision, _method(decision, list(layers)), tuple(layers), tuple(modules))
    return chains_for(step, lambda step, chain, weight: fill(step.method, decision.ranks))


def steps_of(view: nn.Module, plan: RankPlan) -> list[Step]:
    """Every change of the plan with the layers and the method it names."""
    layers = {layer.name: layer for layer in find_layers(view)}
    aliases = {alias: layer for layer in layers.values() for alias in layer.aliases}
    modules = dict(surgery.named_modules(view))
    steps = []
    for decision in plan.changes:
        if decision.method == MERGE:
            continue
        found = []
        for name, shape in zip(decision.targets, decision.shapes, strict=True):
            layer = layers.get(name) or aliases.get(name)
            if layer is None:
                raise PlanError(
                    f"layer {name}: expected a {decision.method} target with weight {list(shape)}, "
                    f"found no such layer in {type(view).__name__}"
                )
            if layer.shape != shape:
                raise PlanError(
                    f"layer {name}: expected a weight {list(shape)}, found {list(layer.shape)}"
                )
            found.append(layer)
        for layer in found[1:]:
            if layer is not found[0] and layer.name not in found[0].tied_to:
                raise PlanError(
                    f"layers {found[0].name} and {layer.name}: the plan gives them one set of "
                    "factors, as for a weight they share, but they have two; make a plan for this "
                    "model"
                )
        method = _method(decision, found)
        steps.append(Step(decision, method, tuple(found), tuple(modules[x.name] for x in found)))
    return steps


def _method(decision: Decision, layers: list[Layer]) -> Decomposition:
    where = f"layer {layers[0].name}"
    settings = {key: value for key, value in decision.args.items() if key != "ranks"}
    try:
        method = decompositions.create(decision.method, **settings)
    except (RegistryError, ValueError, TypeError) as error:
        raise PlanError(f"{where}: {error}") from error
    for layer in layers:
        reason = layer.refusal or method.refusal(layer)
        if reason:
            raise PlanError(f"layer {layer.name}: {decision.method} cannot treat it: {reason}")
        try:
            method.check_ranks(layer, decision.ranks)
        except LayerError as error:
            raise PlanError(str(error)) from error
    return method


def factoriser(moments: Mapping[str, Moments]) -> Fill:
    def factorise(step: Step, chain: nn.Sequential, weight: Tensor) -> Filling:
        check_weight(step.layers[0], weight)
        known = moments.get(step.layers[0].name)
        factors = shared.get(step.method, weight, known).factors(step.decision.ranks)
        return Filling.of(factors, known)

    return factorise


def build_chains(
    view: nn.Module, steps: list[Step], fill: Fill, progress: bool | None
) -> dict[str, nn.Module]:
    """Layer name to chain; layers that share a weight get chains that share factors."""
    device = surgery.device_of(view)
    chains: dict[str, nn.Module] = {}
    ordered = largest_first(steps, lambda step: step.layers[0].params)
    with progress_bar("factorising", len(steps), enabled=progress) as advance:
        for _, built in for_each(lambda step: chains_for(step, fill), ordered, device=device):
            chains.update(built)
            advance()
    return chains


@measure.no_autocast()
def chains_for(step: Step, fill: Fill) -> dict[str, nn.Module]:
    """The chains of one site's layers, sharing their factors."""
    chains: dict[str, nn.Module] = {}
    factors: dict[str, nn.Parameter] = {}
    shift: Tensor | None = None
    biases: dict[nn.Parameter, nn.Parameter] = {}
    for layer, module in zip(step.layers, step.modules, strict=True):
        chain = step.method.build(layer, step.decision.ranks)
        if not factors:
            weight = canonical_weight(module)
            values = fill(step, chain, weight)
            factors = _parameters(layer, chain, module, values.factors)
            if values.means is not None:
                shift = _shift(step, weight, factors, values.means)
        _install(chain, module, factors)
        if shift is not None:
            bias: Any = module.bias
            if bias not in biases:  # layers may share it
                moved = (bias.detach() + shift.to(bias.device)).to(bias.dtype)
                biases[bias] = nn.Parameter(moved, requires_grad=bias.requires_grad)
            chain[-1]._parameters["bias"] = biases[bias]
        factors = factors or {
            name: parameter
            for name, parameter in chain.named_parameters()
            if name.endswith("weight")
        }
        chains[layer.name] = chain
    return chains


def _parameters(
    layer: Layer, chain: nn.Sequential, module: Any, values: Mapping[str, Tensor]
) -> dict[str, nn.Parameter]:
    """Factors as parameters like the dense weight: dtype, device, memory format, grad."""
    weight: Tensor = module.weight
    parameters = {}
    for name, slot in chain.named_parameters():
        value = values.get(name)
        if value is None:
            continue
        if value.shape != slot.shape:
            raise LayerError(
                f"layer {layer.name}: factor {name} has shape {list(value.shape)}, "
                f"its module expects {list(slot.shape)}"
            )
        cast = value.to(device=weight.device, dtype=weight.dtype)
        if weight.element_size() < 4 and not bool(cast.isfinite().all()):
            raise LayerError(
                f"layer {layer.name}: factor {name} overflows {layer.dtype}; "
                "compress in float32 and convert afterwards"
            )
        cast = cast.contiguous(memory_format=surgery.memory_format_of(weight, cast))
        parameters[name] = nn.Parameter(cast, requires_grad=weight.requires_grad)
    return parameters


def _shift(
    step: Step, weight: Tensor, factors: Mapping[str, Tensor], means: tuple[Tensor, Tensor]
) -> Tensor:
    """Wμ − Ŵμ̂ [out] in float64, Ŵ being the factors as rounded to the layer's precision."""
    dense, chained = means
    wanted = torch.einsum("gsn,gn->gs", weight.to(dense).flatten(2), dense).flatten()
    exact = {name: factor.detach().to(chained) for name, factor in factors.items()}
    return wanted - response(step.method, step.layers[0], step.decision.ranks, exact, chained)


def _install(chain: nn.Sequential, module: Any, factors: dict[str, nn.Parameter]) -> None:
    """Put factors and the layer's own bias into `chain`, and its mode on it."""
    for name, parameter in list(chain.named_parameters()):
        owner, _, key = name.rpartition(".")
        if name in factors:
            chain.get_submodule(owner)._parameters[key] = factors[name]
        elif key == "weight":
            parameter.requires_grad_(module.weight.requires_grad)
            chain.get_submodule(owner)._parameters[key] = nn.Parameter(
                parameter.to(module.weight.dtype), requires_grad=module.weight.requires_grad
            )
    if module.bias is not None:
        chain[-1]._parameters["bias"] = module.bias
    chain.train(module.training)

"""Models of a plan whose factors come from elsewhere: zeros, noise, none, or given ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

import torch
from torch import Tensor, nn

from rankopt._build.apply import check_structure, placed, swap, unpack_for
from rankopt._build.chains import Fill, Filling, Step, build_chains, factoriser, steps_of
from rankopt._build.provenance import remember_plan
from rankopt._calibration.moments import Moments
from rankopt._merging import join as merging
from rankopt._model import surgery
from rankopt.plan import Decision, RankPlan

__all__ = [
    "build_empty",
    "build_random",
    "build_with_factors",
    "build_with_moments",
    "emptied",
    "fill_skeleton",
]

# Of factors that only stand in for real ones while a model is timed.
RANDOM_SCALE: Final = 0.05


def fill_skeleton(view: nn.Module, plan: RankPlan) -> nn.Module:
    """Turn an unpacked clone into the model `apply` would build, with zeros as factors.

    Sizes and MACs are those of the real result, which is what a search must check.
    """
    zeros = torch.zeros(0)

    def shared_zeros(shape: torch.Size) -> Tensor:
        """Views of one block, which several threads may ask for at a time."""
        nonlocal zeros
        block = zeros
        if block.numel() < shape.numel():
            block = zeros = torch.zeros(shape.numel())
        return block[: shape.numel()].view(shape)

    return _emptied(view, plan, _made_by(shared_zeros))


def build_random(model: nn.Module, plan: RankPlan) -> nn.Module:
    """The model `apply` would build, with small random factors: its time, not its answers."""

    def noise(shape: torch.Size) -> Tensor:
        return RANDOM_SCALE * torch.randn(shape)

    view = unpack_for(surgery.clone(surgery.unwrap(model)), plan)
    return _emptied(view, plan, _made_by(noise))


def build_empty(model: nn.Module, plan: RankPlan, *, whole: bool = False) -> nn.Module:
    """The structure `apply` would build, every parameter on the meta device.

    Args:
        model: The original one.
        plan: For it.
        whole: Whether attention that the plan leaves dense is unpacked too, as by `soften`.
    """
    source = surgery.unwrap(model)
    view = unpack_for(emptied(source), plan, whole=whole)
    check_structure(source, plan)
    result = _emptied(view, plan, lambda step, chain, weight: Filling({}))
    remember_plan(result, plan)
    return result


def emptied(model: nn.Module) -> nn.Module:
    """A clone with every parameter on the meta device."""

    def empty(parameter: Tensor) -> Tensor:
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    return surgery.clone(model, instead={p: empty(p) for p in model.parameters()})


def _made_by(make: Callable[[torch.Size], Tensor]) -> Fill:
    """Factors that know nothing but their shape."""

    def fill(step: Step, chain: nn.Sequential, weight: Tensor) -> Filling:
        return Filling(
            {
                name: make(parameter.shape)
                for name, parameter in chain.named_parameters()
                if name.endswith("weight")
            }
        )

    return fill


def _emptied(view: nn.Module, plan: RankPlan, fill: Fill) -> nn.Module:
    """`view` with every change of the plan in place, merges without values of their own."""
    modules, merges = dict(surgery.named_modules(view)), merging.planned(view, plan)
    made = build_chains(view, steps_of(view, plan), fill, False)
    for merge in merges:
        made |= merging.build(modules, merge)
    return placed(view, made, merges)


def build_with_moments(
    view: nn.Module, decisions: Iterable[Decision], moments: Mapping[str, Moments]
) -> nn.Module:
    """A clone of an unpacked model with some decisions carried out, sharing the rest."""
    return _built(view, decisions, factoriser(moments))


def build_with_factors(
    view: nn.Module,
    decisions: Iterable[Decision],
    factors: Mapping[str, Mapping[str, Tensor] | None],
) -> nn.Module:
    """The same with given factors, by the name of a site's first layer; None for any."""
    plain = factoriser({})

    def fill(step: Step, chain: nn.Sequential, weight: Tensor) -> Filling:
        given = factors.get(step.layers[0].name)
        return plain(step, chain, weight) if given is None else Filling(given)

    return _built(view, decisions, fill)


def _built(view: nn.Module, decisions: Iterable[Decision], fill: Fill) -> nn.Module:
    copy = surgery.clone(view, share=[*view.parameters(), *view.buffers()])
    plan = RankPlan(model={}, decisions=tuple(decisions))
    return swap(copy, build_chains(copy, steps_of(copy, plan), fill, False))

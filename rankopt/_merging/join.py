"""Merging: the Tucker-2 factors of a bottleneck's middle join the 1x1 layers beside it.

With U and V the factors of the k×k kernel, the chain U · core · V becomes part of
its neighbours, so that the block keeps three convolutions, at a smaller width
(arXiv 2407.20266, section 2.3). Norm and activation lie between a factor and its
neighbour. A general factor does not commute with them; a choice of channels does.
So the factors are interpolative, U = T·P: P chooses channels and moves into the
neighbour exactly, and T, which rebuilds the others from them, stays with the core.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from rankopt._merging.bottlenecks import Bottleneck, every_bottleneck
from rankopt._merging.channels import Modules
from rankopt._model import surgery
from rankopt.errors import LayerError, PlanError
from rankopt.plan import MERGE, Decision

__all__ = [
    "BETWEEN",
    "Merge",
    "build",
    "check_ranks",
    "of_groups",
    "planned",
    "resize",
    "resize_linear",
]

# What becomes of norms and activations between the convolutions of a merge.
BETWEEN: Final = ("keep", "drop")


@dataclass(frozen=True)
class Merge:
    """One merge to carry out.

    Args:
        bottleneck: The three convolutions.
        ranks: Widths before and after the middle one.
        aware: Whether it is fitted to calibration inputs.
        between: ``keep`` norms and activations, or ``drop`` them.
    """

    bottleneck: Bottleneck
    ranks: tuple[int, int]
    aware: bool = False
    between: str = "keep"


def planned(view: nn.Module, decisions: Iterable[Decision]) -> list[Merge]:
    """The merges among `decisions`, checked against the bottlenecks of `view`.

    Raises:
        PlanError: There is no such bottleneck, it cannot be merged, or not to these ranks.
    """
    wanted = [decision for decision in decisions if decision.method == MERGE]
    if not wanted:
        return []
    known: dict[tuple[str, ...], Bottleneck] = {b.targets: b for b in every_bottleneck(view)}
    merges = []
    for decision in wanted:
        found = known.get(decision.targets)
        where = f"layer {decision.targets[0]}"
        if found is None:
            raise PlanError(
                f"{where}: expected a bottleneck of {', '.join(decision.targets)}, found none in "
                f"{type(view).__name__}"
            )
        shapes = tuple(layer.shape for layer in found.layers)
        if shapes != decision.shapes:
            raise PlanError(
                f"{where}: expected weights {_listed(decision.shapes)} in the bottleneck, "
                f"found {_listed(shapes)}"
            )
        if found.refusal:
            raise PlanError(f"{where}: cannot be merged: {found.refusal}")
        if list(decision.args.get("norms", ())) != list(found.norms):
            raise PlanError(
                f"{where}: expected norms {list(decision.args.get('norms', ()))} in the "
                f"bottleneck, found {list(found.norms)}"
            )
        unknown = set(decision.args) - {"ranks", "norms", "between"}
        if unknown:
            raise PlanError(f"{where}: merge has no setting {', '.join(sorted(unknown))}")
        try:
            check_ranks(found, decision.ranks)
        except LayerError as error:
            raise PlanError(str(error)) from error
        between, aware = decision.args.get("between", "keep"), decision.factors.kind != "weights"
        if between not in BETWEEN:
            raise PlanError(f"{where}: between {between!r}: expected one of {', '.join(BETWEEN)}")
        if between == "drop" and not aware:
            raise PlanError(
                f"{where}: what lies between is dropped, so its maps are fitted to calibration "
                f"inputs; factors are {decision.factors.kind!r}"
            )
        first, second = decision.ranks
        merges.append(Merge(found, (first, second), aware, between))
    return merges


def _listed(shapes: Iterable[Sequence[int]]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)


def check_ranks(bottleneck: Bottleneck, ranks: Sequence[int]) -> None:
    """Raise `LayerError` unless `ranks` are two feasible widths."""
    where = f"layer {bottleneck.name}: merge"
    if len(ranks) != 2:
        raise LayerError(f"{where} takes 2 ranks (input, output), got {list(ranks)}")
    for side, rank, width in zip(("input", "output"), ranks, bottleneck.widths, strict=True):
        if not bottleneck.groups <= rank <= width:
            raise LayerError(
                f"{where} {side} rank {rank} is outside {bottleneck.groups} to {width}"
            )
        if rank % bottleneck.groups:
            raise LayerError(
                f"{where} {side} rank {rank} is no multiple of the {bottleneck.groups} groups"
            )


# Modules of another width


def resize(
    modules: Modules, bottleneck: Bottleneck, kept: tuple[Tensor, Tensor]
) -> dict[str, nn.Module]:
    """Convolutions and norms with the `kept` channels only, by name.

    Their weights are slices of the dense ones; type, dtype, device, memory format,
    mode and requires_grad are the dense ones'.

    Args:
        modules: Of the model, by name.
        bottleneck: The three convolutions.
        kept: Channels on both sides of the middle, ascending, as many in each group.
    """
    before, after = kept
    names = bottleneck.targets
    convs: list[Any] = [modules[name] for name in names]
    weights = (
        convs[0].weight.detach()[before],
        of_groups(convs[1].weight.detach(), before, after, bottleneck),
        convs[2].weight.detach()[:, after],
    )
    sizes = (
        (convs[0].in_channels, len(before)),
        (len(before), len(after)),
        (len(after), convs[2].out_channels),
    )
    made: dict[str, nn.Module] = {}
    for name, conv, weight, size, outputs in zip(
        names, convs, weights, sizes, (before, after, None), strict=True
    ):
        made[name] = _conv_like(conv, size, weight, outputs)
    for norm_name, channels in zip(bottleneck.norms, kept, strict=True):
        if norm_name is not None:
            made[norm_name] = _norm_like(modules[norm_name], channels)
    return made


def resize_linear(
    modules: Modules, bottleneck: Bottleneck, kept: tuple[Tensor, Tensor]
) -> dict[str, nn.Module]:
    """As `resize`, with a bias everywhere and `nn.Identity` for norms."""
    made = resize(modules, bottleneck, kept)
    for name in bottleneck.targets:
        conv: Any = made[name]
        if conv.bias is None:
            zeros = torch.zeros(
                conv.out_channels, dtype=conv.weight.dtype, device=conv.weight.device
            )
            conv.bias = nn.Parameter(zeros, requires_grad=conv.weight.requires_grad)
    for norm in bottleneck.norms:
        if norm is not None:
            made[norm] = nn.Identity().train(modules[norm].training)
    return made


def of_groups(weight: Tensor, before: Tensor, after: Tensor, bottleneck: Bottleneck) -> Tensor:
    """The rows `after` and, in each group, the columns `before` of a grouped weight."""
    groups = bottleneck.groups
    blocks = weight.unflatten(0, (groups, -1))
    inputs, outputs = (width // groups for width in bottleneck.widths)
    group = torch.arange(groups, device=before.device)[:, None]
    columns = before.reshape(groups, -1) - inputs * group
    rows = after.reshape(groups, -1) - outputs * group
    sliced: Tensor = blocks[group[:, :, None], rows[:, :, None], columns[:, None, :]]
    return sliced.flatten(0, 1)


def _conv_like(conv: Any, size: tuple[int, int], weight: Tensor, kept: Tensor | None) -> nn.Module:
    made: Any = type(conv)(
        *size, conv.kernel_size, stride=conv.stride, padding=conv.padding,
        dilation=conv.dilation, groups=conv.groups, bias=conv.bias is not None,
        padding_mode=conv.padding_mode, device="meta",
    )  # fmt: skip
    layout = surgery.memory_format_of(conv.weight, weight)
    made.weight = nn.Parameter(
        weight.contiguous(memory_format=layout), requires_grad=conv.weight.requires_grad
    )
    if conv.bias is not None:
        bias = conv.bias.detach() if kept is None else conv.bias.detach()[kept]
        made.bias = nn.Parameter(bias.clone(), requires_grad=conv.bias.requires_grad)
    return _in_mode(made, conv)


def _norm_like(norm: Any, kept: Tensor) -> nn.Module:
    extra = {"process_group": norm.process_group} if isinstance(norm, nn.SyncBatchNorm) else {}
    made: Any = type(norm)(
        len(kept), norm.eps, norm.momentum, norm.affine, norm.track_running_stats,
        device="meta", **extra,
    )  # fmt: skip
    for key, value in norm._parameters.items():
        if value is not None:
            made._parameters[key] = nn.Parameter(
                value.detach()[kept], requires_grad=value.requires_grad
            )
    for key, value in norm._buffers.items():
        if value is not None:
            made._buffers[key] = value[kept] if value.dim() else value.clone()
    return _in_mode(made, norm)


def _in_mode(made: nn.Module, original: nn.Module) -> nn.Module:
    made.training = original.training
    return made


def build(modules: Modules, merge: Merge) -> dict[str, nn.Module]:
    """The merged modules by name, their weights mere slices: right in shape and no more."""
    groups = merge.bottleneck.groups
    first, second = (
        torch.cat(
            [
                torch.arange(rank // groups, device="cpu") + group * (width // groups)
                for group in range(groups)
            ]
        )
        for rank, width in zip(merge.ranks, merge.bottleneck.widths, strict=True)
    )
    made = resize if merge.between == "keep" else resize_linear
    return made(modules, merge.bottleneck, (first, second))

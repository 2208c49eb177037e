"""Merging: the Tucker-2 factors of a bottleneck's middle join the 1x1 layers beside it.

With U and V the factors of the k×k kernel, the chain U · core · V becomes part of
its neighbours, so that the block keeps three convolutions, at a smaller width
(arXiv 2407.20266, section 2.3). Norm and activation lie between a factor and its
neighbour. A general factor does not commute with them; a choice of channels does.
So the factors are interpolative, U = T·P: P chooses channels and moves into the
neighbour exactly, and T, which rebuilds the others from them, stays with the core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from rankopt import measure, surgery
from rankopt._progress import progress_bar
from rankopt.bottlenecks import Activation, Bottleneck, find_bottlenecks
from rankopt.calibration import channel_rows, collect, patches, run, split_batch
from rankopt.channels import MergeBasis, Modules, double_weight, prepare
from rankopt.errors import LayerError, PlanError
from rankopt.layers import Layer
from rankopt.plan import MERGE, Decision

__all__ = ["Merge", "build", "channel_moments", "check_ranks", "fit", "planned", "resize"]

# Patches with more entries than this are not regressed on: their Gram matrix would
# take more than half a gigabyte. The core then comes from the channels' moments.
MAX_PATCH: Final = 8192
# Ridge, as a share of the mean eigenvalue, towards the map that moments alone give;
# it grows with the number of unknowns per position.
RIDGE: Final = 1e-3


@dataclass(frozen=True)
class Merge:
    """One merge to carry out.

    Args:
        bottleneck: The three convolutions.
        ranks: Widths before and after the middle one.
        aware: Whether it is fitted to calibration inputs.
    """

    bottleneck: Bottleneck
    ranks: tuple[int, int]
    aware: bool = False


def planned(view: nn.Module, decisions: Iterable[Decision]) -> list[Merge]:
    """The merges among `decisions`, checked against the bottlenecks of `view`.

    Raises:
        PlanError: There is no such bottleneck, it cannot be merged, or not to these ranks.
    """
    wanted = [decision for decision in decisions if decision.method == MERGE]
    if not wanted:
        return []
    known = {found.targets: found for found in find_bottlenecks(view)}
    merges = []
    for decision in wanted:
        found = known.get(decision.targets)  # type: ignore[call-overload]
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
        unknown = set(decision.args) - {"ranks", "norms"}
        if unknown:
            raise PlanError(f"{where}: merge has no setting {', '.join(sorted(unknown))}")
        try:
            check_ranks(found, decision.ranks)
        except LayerError as error:
            raise PlanError(str(error)) from error
        first, second = decision.ranks
        merges.append(Merge(found, (first, second), decision.factors.kind != "weights"))
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
        _of_groups(convs[1].weight.detach(), before, after, bottleneck),
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


def _of_groups(weight: Tensor, before: Tensor, after: Tensor, bottleneck: Bottleneck) -> Tensor:
    """The rows `after` and, in each group, the columns `before` of a grouped weight."""
    groups = bottleneck.groups
    blocks = weight.unflatten(0, (groups, -1))
    inputs, outputs = (width // groups for width in bottleneck.widths)
    group = torch.arange(groups)[:, None]
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


def build(modules: Modules, bottleneck: Bottleneck, ranks: Sequence[int]) -> dict[str, nn.Module]:
    """The merged modules by name, their weights mere slices: what `fit` fills with values."""
    groups = bottleneck.groups
    first, second = (
        torch.cat(
            [torch.arange(rank // groups) + group * (width // groups) for group in range(groups)]
        )
        for rank, width in zip(ranks, bottleneck.widths, strict=True)
    )
    return resize(modules, bottleneck, (first, second))


# Fitting


@dataclass
class _Fitting:
    """One bottleneck on its way: the kept channels, and the modules being fitted."""

    basis: MergeBasis
    kept: tuple[Tensor, Tensor]
    made: dict[str, nn.Module]
    priors: tuple[Tensor, Tensor]  # of the middle and last weight, [groups, out, in * pixels]
    ranks: tuple[int, int]

    @property
    def bottleneck(self) -> Bottleneck:
        return self.basis.bottleneck


def fit(
    view: nn.Module,
    merges: Sequence[Merge],
    held: Sequence[Any] | None,
    *,
    progress: bool | None = None,
) -> dict[str, nn.Module]:
    """The modules that take the places of those they are named after.

    The first convolution and both norms are exact slices. The other two are maps
    from the kept channels: least squares estimates of what the dense block computes,
    by the moments of `drawn_moments`, or by ridge regression on what the dense model
    computes for the inputs `held`, first the middle, then, with that in place, the last.

    Args:
        view: A private clone of the dense model; run in eval mode.
        merges: What to merge.
        held: Batches of inputs; may be None where no merge needs them.
        progress: Whether to show progress bars.

    Raises:
        LayerError: A weight holds NaN or infinity, or a merged one overflows.
        CalibrationError: The model fails on the inputs.
    """
    if not merges:
        return {}
    modules = dict(surgery.named_modules(view))
    aware = [merge.bottleneck for merge in merges if merge.aware]
    moments = channel_moments(view, aware, held, progress=progress) if aware else {}
    started, fitted = [], []
    for merge in merges:
        known = moments if merge.aware else None
        start = _start(modules, prepare(modules, merge.bottleneck, known), merge.ranks)
        started.append(start)
        if merge.aware:
            fitted.append(start)
    for stage in (1, 2) if fitted else ():
        assert held is not None
        _regress(view, modules, fitted, stage, held, progress)
    return {name: module for merge in started for name, module in merge.made.items()}


def channel_moments(
    view: nn.Module,
    bottlenecks: Sequence[Bottleneck],
    held: Any,
    *,
    progress: bool | None = None,
) -> dict[str, Tensor]:
    """Second moments [channels, channels] of what enters the second and third convolutions."""
    pixels = [_pixelwise(layer) for b in bottlenecks for layer in b.layers[1:]]
    found = collect(view, pixels, held, max_samples=None, progress=progress)
    for layer in pixels:
        if layer.name not in found:
            raise LayerError(f"layer {layer.name}: the calibration inputs never reach it")
    return {name: moments.second[0].cpu() for name, moments in found.items()}


def _pixelwise(layer: Layer) -> Layer:
    """The layer as one that meets every input pixel on its own, all groups together."""
    ones, zeros = (1,) * len(layer.kernel), (0,) * len(layer.kernel)
    return replace(layer, kernel=ones, stride=ones, dilation=ones, padding=zeros, groups=1)


def _start(modules: Modules, basis: MergeBasis, ranks: Sequence[int]) -> _Fitting:
    """Kept channels, and the maps that follow from moments alone."""
    bottleneck = basis.bottleneck
    before, after = (side.chosen(rank) for side, rank in zip(basis.sides, ranks, strict=True))
    made = resize(modules, bottleneck, (before, after))
    _, middle, last = bottleneck.targets
    groups, (inputs, _) = bottleneck.groups, bottleneck.widths
    first, second = (side.rebuild(rank) for side, rank in zip(basis.sides, ranks, strict=True))
    # Rows of the kept outputs, all inputs; then inputs rebuilt from the kept ones.
    kernel = _of_groups(
        double_weight(modules[middle]).flatten(0, 1), torch.arange(inputs), after, bottleneck
    ).unflatten(0, (groups, -1))
    blocks = torch.stack(
        [
            first[g * (inputs // groups) : (g + 1) * (inputs // groups)][
                :, g * (ranks[0] // groups) : (g + 1) * (ranks[0] // groups)
            ]
            for g in range(groups)
        ]
    )
    core = torch.einsum("gsc...,gcr->gsr...", kernel, blocks)
    join = double_weight(modules[last]).flatten(2) @ second
    priors = (core.flatten(2), join)
    merge = _Fitting(basis, (before, after), made, priors, (ranks[0], ranks[1]))
    _put(made[middle], priors[0], bottleneck.layers[1])
    _put(made[last], priors[1], bottleneck.layers[2])
    return merge


def _put(module: Any, values: Tensor, layer: Layer) -> None:
    """Set the weight of `module` from [groups, out, in * pixels]."""
    weight: Tensor = module.weight
    cast = values.reshape(weight.shape).to(device=weight.device, dtype=weight.dtype)
    if not bool(cast.isfinite().all()):
        raise LayerError(
            f"layer {layer.name}: its merged weight overflows {layer.dtype}; "
            "merge in float32 and convert afterwards"
        )
    with torch.no_grad():
        weight.copy_(cast)


class _Sums:
    """Normal equations of one map, summed in float64."""

    def __init__(self) -> None:
        self.gram: Any = 0.0
        self.cross: Any = 0.0
        self.count = 0

    def add(self, rows: Tensor, wanted: Tensor) -> None:
        self.gram = self.gram + (rows.mT @ rows).double()
        self.cross = self.cross + (wanted.mT @ rows).double()
        self.count += rows.shape[1]

    def solve(self, prior: Tensor) -> Tensor:
        """The ridge estimate [groups, out, in], drawn towards `prior`."""
        gram, cross = (value.cpu() / self.count for value in (self.gram, self.cross))
        size = gram.shape[-1]
        mean = gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1).clamp_min(1e-30)[:, None, None]
        ridge = RIDGE * (1 + size / self.count * 10) * mean
        eye = torch.eye(size, dtype=gram.dtype)
        solved: Tensor = torch.linalg.solve(gram + ridge * eye, (cross + ridge * prior).mT).mT
        return solved


def _regress(
    view: nn.Module,
    modules: Modules,
    merges: Sequence[_Fitting],
    stage: int,
    held: Sequence[Any],
    progress: bool | None,
) -> None:
    """Fit the middle (stage 1) or last (stage 2) weight of every merge in one pass."""
    sums = {merge.bottleneck.name: _Sums() for merge in merges}
    entering: dict[str, Tensor] = {}
    handles: list[Any] = []
    for merge in merges:
        _, middle, last = merge.bottleneck.targets
        if stage == 1 and _too_large(merge):
            continue
        if stage == 1:
            hook = _middle_hook(merge, sums[merge.bottleneck.name])
            handles.append(modules[middle].register_forward_hook(hook))
        else:
            handles.append(
                modules[middle].register_forward_hook(_narrow_hook(merge, modules, entering))
            )
            hook = _last_hook(merge, sums[merge.bottleneck.name], entering)
            handles.append(modules[last].register_forward_hook(hook))
    try:
        with (
            torch.no_grad(),
            measure.preserve_rng(),
            measure.evaluation(view),
            progress_bar("fitting merges", len(held), enabled=progress) as advance,
        ):
            for inputs in held:
                run(view, inputs)
                advance()
    finally:
        for handle in handles:
            handle.remove()
    for merge in merges:
        found = sums[merge.bottleneck.name]
        if found.count:
            layer = merge.bottleneck.layers[stage]
            _put(merge.made[layer.name], found.solve(merge.priors[stage - 1]), layer)


def _too_large(merge: _Fitting) -> bool:
    pixels = merge.priors[0].shape[-1]
    return pixels > MAX_PATCH


def _narrowed(merge: _Fitting, stage: int) -> Layer:
    """The middle or last layer as it is after the merge."""
    layer, (first, second) = merge.bottleneck.layers[stage], merge.ranks
    if stage == 1:
        return replace(layer, in_channels=first, out_channels=second)
    return replace(layer, in_channels=second)


def _pairs(layer: Layer, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of patches of the input and of the output, a part of the batch at a time."""
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    parts = split_batch(layer, x)
    for part, wanted in zip(parts, y.split([len(p) for p in parts]), strict=True):
        yield patches(layer, part.to(dtype)), channel_rows(wanted.to(dtype), layer.groups)


def _batched(layer: Layer, x: Tensor) -> Tensor:
    return x if x.dim() == len(layer.kernel) + 2 else x.unsqueeze(0)


def _without_bias(module: Any, y: Tensor) -> Tensor:
    if module.bias is None:
        return y
    bias: Tensor = module.bias.detach()
    return y - bias.reshape(-1, *(1,) * (y.dim() - 2))


def _middle_hook(merge: _Fitting, sums: _Sums) -> Callable[..., None]:
    layer = _narrowed(merge, 1)

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        before, after = merge.kept
        x = _batched(layer, args[0].detach())[:, before]
        y = _without_bias(module, _batched(layer, output))[:, after]
        for rows, wanted in _pairs(layer, x, y):
            sums.add(rows, wanted)

    return hook


def _narrow_hook(
    merge: _Fitting, modules: Modules, entering: dict[str, Tensor]
) -> Callable[..., None]:
    """Compute what the merged block hands to its last convolution."""
    _, middle, last = merge.bottleneck.targets
    norm = merge.bottleneck.norms[1]
    activation: Activation | None = merge.bottleneck.activations[1]
    conv = merge.made[middle]

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = conv(_batched(merge.bottleneck.layers[1], args[0].detach())[:, merge.kept[0]])
        if norm is not None:
            with measure.evaluation(merge.made[norm]):
                x = merge.made[norm](x)
        if activation is not None:
            x = activation(modules, x)
        entering[last] = x

    return hook


def _last_hook(merge: _Fitting, sums: _Sums, entering: dict[str, Tensor]) -> Callable[..., None]:
    layer = _narrowed(merge, 2)

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        y = _without_bias(module, _batched(layer, output))
        for rows, wanted in _pairs(layer, entering.pop(layer.name), y):
            sums.add(rows, wanted)

    return hook

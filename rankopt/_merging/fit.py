"""Fitting merged bottlenecks: kept channels by moments, then maps by ridge regression."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rankopt._calibration.collect import collect
from rankopt._calibration.normal_equations import Sums, batched, paired_rows, put, run_watched
from rankopt._merging.bottlenecks import Activation, Bottleneck
from rankopt._merging.channels import MergeBasis, Modules, diagonal_blocks, double_weight, prepare
from rankopt._merging.join import Merge, of_groups, resize, resize_linear
from rankopt._merging.linear import Linear, fit_linear
from rankopt._model import measure, surgery
from rankopt._model.layers import Layer
from rankopt.errors import LayerError

__all__ = ["channel_moments", "fit", "started"]

# Patches with more entries than this are not regressed on: their Gram matrix would
# take more than half a gigabyte. The core then comes from the channels' moments.
MAX_PATCH: Final = 8192


@dataclass
class _Fitting:
    """One bottleneck on its way: the kept channels, and the modules being fitted."""

    basis: MergeBasis
    kept: tuple[Tensor, Tensor]
    made: dict[str, Any]
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
    result: dict[str, nn.Module] = {}
    fitted, linear = [], []
    for merge in merges:
        basis = prepare(modules, merge.bottleneck, moments if merge.aware else None)
        if merge.between == "drop":
            before, after = (
                side.chosen(rank) for side, rank in zip(basis.sides, merge.ranks, strict=True)
            )
            made = resize_linear(modules, merge.bottleneck, (before, after))
            linear.append(Linear(merge.bottleneck, (before, after), made))
            result.update(made)
            continue
        start = _start(modules, basis, merge.ranks)
        result.update(start.made)
        if merge.aware:
            fitted.append(start)
    for stage in (1, 2) if fitted else ():
        assert held is not None
        _regress(view, modules, fitted, stage, held, progress)
    if linear:
        assert held is not None
        fit_linear(view, modules, linear, held, progress=progress)
    return result


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
    """The layer as one that meets every input pixel on its own, all groups together.

    Without a bias: the moments wanted are those about zero.
    """
    ones, zeros = (1,) * len(layer.kernel), (0,) * len(layer.kernel)
    return replace(
        layer, kernel=ones, stride=ones, dilation=ones, padding=zeros, groups=1, own_bias=False
    )


def started(modules: Modules, basis: MergeBasis, ranks: Sequence[int]) -> dict[str, nn.Module]:
    """The merged modules by name, as moments alone have them, before any regression."""
    return _start(modules, basis, ranks).made


def _start(modules: Modules, basis: MergeBasis, ranks: Sequence[int]) -> _Fitting:
    """Kept channels, and the maps that follow from moments alone."""
    bottleneck = basis.bottleneck
    before, after = (side.chosen(rank) for side, rank in zip(basis.sides, ranks, strict=True))
    made = resize(modules, bottleneck, (before, after))
    _, middle, last = bottleneck.targets
    convs: Any = made
    groups, (inputs, _) = bottleneck.groups, bottleneck.widths
    first, second = (side.rebuild(rank) for side, rank in zip(basis.sides, ranks, strict=True))
    # Rows of the kept outputs, all inputs; then inputs rebuilt from the kept ones.
    kernel = of_groups(
        double_weight(modules[middle]).flatten(0, 1), torch.arange(inputs), after, bottleneck
    ).unflatten(0, (groups, -1))
    core = torch.einsum("gsc...,gcr->gsr...", kernel, diagonal_blocks(first, groups))
    _shrink(made, bottleneck, basis, kernel, first @ basis.sides[0].second[before])
    join = double_weight(modules[last]).flatten(2) @ second
    priors = (core.flatten(2), join)
    merge = _Fitting(basis, (before, after), made, priors, (ranks[0], ranks[1]))
    put(convs[middle].weight, priors[0], bottleneck.layers[1])
    put(convs[last].weight, priors[1], bottleneck.layers[2])
    return merge


def _shrink(
    made: Mapping[str, nn.Module],
    bottleneck: Bottleneck,
    basis: MergeBasis,
    kernel: Tensor,
    explained: Tensor,
) -> None:
    """Lower the second norm's running variance by the share that the estimates keep.

    Least squares estimates vary less than what they estimate; normalised as before,
    the merged channels would come out too small.
    """
    norm: Any = None if bottleneck.norms[1] is None else made[bottleneck.norms[1]]
    if norm is None or norm.running_var is None:
        return
    rows = kernel.flatten(3)
    kept, total = (
        sum(
            torch.einsum("gsc,gcd,gsd->gs", part, diagonal_blocks(moments, bottleneck.groups), part)
            for part in rows.unbind(3)
        )
        for moments in (explained, basis.sides[0].second)
    )
    share = (torch.as_tensor(kept) / torch.as_tensor(total).clamp_min(1e-300)).clamp(0.0, 1.0)
    # Channels that are dead have nothing to keep.
    share = torch.where(torch.as_tensor(total) > 0, share, torch.ones_like(share))
    norm.running_var.mul_(share.flatten().to(norm.running_var))


def _regress(
    view: nn.Module,
    modules: Modules,
    merges: Sequence[_Fitting],
    stage: int,
    held: Sequence[Any],
    progress: bool | None,
) -> None:
    """Fit the middle (stage 1) or last (stage 2) weight of every merge in one pass."""
    sums = {merge.bottleneck.name: Sums() for merge in merges}
    entering: dict[str, Tensor] = {}
    handles: list[RemovableHandle] = []
    for merge in merges:
        _, middle, last = merge.bottleneck.targets
        if stage == 1 and _too_large(merge):
            continue
        if stage == 1:
            hook = _middle_hook(merge, sums[merge.bottleneck.name])
            handles.append(modules[middle].register_forward_hook(hook, with_kwargs=True))
        else:
            handles.append(
                modules[middle].register_forward_hook(
                    _narrow_hook(merge, modules, entering), with_kwargs=True
                )
            )
            hook = _last_hook(merge, sums[merge.bottleneck.name], entering)
            handles.append(modules[last].register_forward_hook(hook, with_kwargs=True))
    run_watched(view, held, handles, progress=progress)
    for merge in merges:
        found = sums[merge.bottleneck.name]
        if found.count:
            layer = merge.bottleneck.layers[stage]
            put(merge.made[layer.name].weight, found.solve(merge.priors[stage - 1]), layer)


def _too_large(merge: _Fitting) -> bool:
    pixels = merge.priors[0].shape[-1]
    return pixels > MAX_PATCH


def _narrowed(merge: _Fitting, stage: int) -> Layer:
    """The middle or last layer as it is after the merge."""
    layer, (first, second) = merge.bottleneck.layers[stage], merge.ranks
    if stage == 1:
        return replace(layer, in_channels=first, out_channels=second)
    return replace(layer, in_channels=second)


def _without_bias(module: Any, y: Tensor) -> Tensor:
    if module.bias is None:
        return y
    bias: Tensor = module.bias.detach()
    return y - bias.reshape(-1, *(1,) * (y.dim() - 2))


def _middle_hook(merge: _Fitting, sums: Sums) -> Callable[..., None]:
    layer = _narrowed(merge, 1)

    def hook(
        module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        before, after = merge.kept
        x = batched(layer, measure.first_argument(args, kwargs).detach())[:, before]
        y = _without_bias(module, batched(layer, output))[:, after]
        for rows, wanted in paired_rows(layer, x, y):
            sums.add(rows, wanted)

    return hook


def _narrow_hook(
    merge: _Fitting, modules: Modules, narrowed: dict[str, Tensor]
) -> Callable[..., None]:
    """Compute what the merged block hands to its last convolution."""
    _, middle, last = merge.bottleneck.targets
    norm = merge.bottleneck.norms[1]
    activation: Activation | None = merge.bottleneck.activations[1]
    conv = merge.made[middle]

    def hook(
        module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        x = conv(
            batched(merge.bottleneck.layers[1], measure.first_argument(args, kwargs).detach())[
                :, merge.kept[0]
            ]
        )
        if norm is not None:
            with measure.evaluation(merge.made[norm]):
                x = merge.made[norm](x)
        if activation is not None:
            x = activation(modules, x)
        narrowed[last] = x

    return hook


def _last_hook(merge: _Fitting, sums: Sums, entering: dict[str, Tensor]) -> Callable[..., None]:
    layer = _narrowed(merge, 2)

    def hook(
        module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        y = _without_bias(module, batched(layer, output))
        for rows, wanted in paired_rows(layer, entering.pop(layer.name), y):
            sums.add(rows, wanted)

    return hook

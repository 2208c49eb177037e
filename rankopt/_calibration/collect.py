"""Second moments of layers' inputs, from few passes over calibration inputs.

Memory is bounded: by `MOST_SUM_BYTES`, and by what `rankopt._calibration.moments` keeps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankopt._calibration.moments import Centre, Moments
from rankopt._model import measure, surgery
from rankopt._model.hooks import hooked
from rankopt._model.inputs import MAX_SAMPLES, batches, hold, run
from rankopt._model.layers import Layer
from rankopt._utils.memory import give_back
from rankopt._utils.progress import progress_bar
from rankopt.errors import CalibrationError

__all__ = [
    "centres",
    "channel_rows",
    "collect",
    "in_passes",
    "layer_inputs",
    "patches",
    "split_batch",
]

# Up to this many entries of a patch its full moment matrix is kept (21 MB in
# float64); larger kernels get the moments of their channels.
MAX_PATCH: Final = 1664
# Positions of a feature map that its moments are taken from, per sample: neighbours
# tell almost the same. More where a batch would give fewer than so many rows per column.
POSITIONS: Final = 64
ROWS_PER_COLUMN: Final = 8
# Layers with more inputs than this get factors from weights alone: the moments
# would take more than half a gigabyte.
MAX_FEATURES: Final = 8192
# Rows collected before their product is taken: products of few rows cost as much.
ROWS: Final = 512
# Sums and pending rows held at a time, as a share of the model within limits; more takes
# another pass over the inputs.
SUM_SHARE: Final = 0.25
LEAST_SUM_BYTES, MOST_SUM_BYTES = 24 * 2**20, 128 * 2**20
# Patches unfolded at a time: 128 MB in float32.
CHUNK_ELEMENTS: Final = 2**25


def collect(
    model: nn.Module,
    layers: Sequence[Layer],
    data: Any,
    *,
    max_samples: int | None = MAX_SAMPLES,
    progress: bool | None = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Moments]:
    """Second moments of the inputs of `layers`, in eval mode; about the mean for some.

    Which these are is said by `centres`.

    Args:
        model: An unpacked clone whose modules the layers name.
        layers: The layers to watch.
        data: See `batches`.
        max_samples: Where to stop.
        progress: Whether to show a progress bar.
        check: Called after every batch, to raise when there is no more time.

    Raises:
        CalibrationError: See `batches`; also inputs the model fails on, or
            that are not finite.
    """
    layers = [layer for layer in layers if layer.group_shape[0] <= MAX_FEATURES]
    passes = in_passes(layers, measure.count_memory(model), features)
    if len(passes) > 1:
        data = hold(model, data, max_samples=max_samples)
    found: dict[str, Moments] = {}
    with progress_bar("calibrating", None, enabled=progress) as advance:

        def tick() -> None:
            advance()
            check()

        for part in passes:
            found |= _collected(model, part, data, max_samples, tick)
            give_back()
    return found


def in_passes(
    layers: Sequence[Layer], memory: float, width: Callable[[Layer], int]
) -> list[list[Layer]]:
    """Layers whose sums and rows are held at a time, in order; at least one.

    Args:
        layers: All of them.
        memory: The model's, in bytes: `SUM_SHARE` of it is used, within limits.
        width: Columns of a layer's rows.
    """
    most = max(LEAST_SUM_BYTES, min(MOST_SUM_BYTES, SUM_SHARE * memory))
    parts: list[list[Layer]] = [[]]
    room = most
    for layer in layers:
        columns = width(layer)
        size = 8 * layer.groups * columns * (columns + ROWS // 2)
        if parts[-1] and size > room:
            parts.append([])
            room = most
        parts[-1].append(layer)
        room -= size
    return parts


def features(layer: Layer) -> int:
    """Columns of the rows that `layer_inputs` gives for a layer."""
    per_group, pixels = layer.group_shape[0], math.prod(layer.kernel) if layer.is_conv else 1
    return per_group * pixels if per_group * pixels <= MAX_PATCH else per_group


def centres(layer: Layer) -> bool:
    """Whether the bias of a layer makes up for the mean of its inputs, so that factors need not.

    So it does in linear layers and in convolutions whose patches are known in full: no bias
    fits the outputs better than that of the mean patch, padding included. Layers without a
    bias get none: their factors answer for the mean themselves.
    """
    whole = features(layer) == layer.group_shape[0] * math.prod(layer.kernel)
    return layer.own_bias and whole


def _collected(
    model: nn.Module,
    layers: Sequence[Layer],
    data: Any,
    max_samples: int | None,
    tick: Callable[[], None],
) -> dict[str, Moments]:
    """Moments of some layers from one pass."""
    modules = dict(surgery.named_modules(model))
    means = {layer.name: Centre() for layer in layers if centres(layer)}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    pending: dict[str, list[Tensor]] = {}

    @measure.no_autocast()
    def add(name: str, least: int) -> None:
        """Add what is pending to the sums, if it is at least so many rows."""
        if sum(rows.shape[1] for rows in pending.get(name, ())) < least:
            return
        parts = pending.pop(name)
        rows = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if name in means:
            rows = means[name].deviations(rows)
        # Products in the model's own precision, summed in float64.
        product = rows.mT @ rows
        if name in sums:
            sums[name].add_(product)
        else:
            sums[name] = product.to(torch.float64)

    def watch(layer: Layer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            for part in split_batch(layer, measure.first_argument(args, kwargs)):
                rows = layer_inputs(layer, part, seed=counts.get(layer.name, 0))
                counts[layer.name] = counts.get(layer.name, 0) + rows.shape[1]
                if rows.shape[1] < ROWS:  # kept for a while: the model may write into its input
                    rows = rows.clone()
                pending.setdefault(layer.name, []).append(rows)
                add(layer.name, ROWS)

        return hook

    handles = (
        modules[x.name].register_forward_pre_hook(watch(x), with_kwargs=True) for x in layers
    )
    with hooked(handles), torch.no_grad(), measure.preserve_rng(), measure.evaluation(model):
        for inputs, _ in batches(model, data, max_samples=max_samples):
            run(model, inputs)
            tick()
    found = {}
    for layer in layers:
        if not counts.get(layer.name):  # never called, or with nothing: an idle expert
            continue
        add(layer.name, 1)
        second = sums.pop(layer.name).div_(counts[layer.name])
        if not bool(second.isfinite().all()):
            raise CalibrationError(
                f"layer {layer.name}: its inputs on the calibration data are not finite, or their "
                "squares are not; check the data for NaN and values too large, and layers before "
                "it in half precision for overflow"
            )
        mean = None
        if layer.name in means:
            centre = means[layer.name]
            second, mean = centre.covariance(second), centre.mean
        pixels = second.shape[-1] // layer.group_shape[0]
        found[layer.name] = Moments(second, pixels, counts[layer.name], mean)
    return found


def split_batch(layer: Layer, x: Tensor) -> Sequence[Tensor]:
    """`x` in parts whose patches fit into `CHUNK_ELEMENTS`."""
    pixels = math.prod(layer.kernel)
    if not layer.is_conv or x.dim() != len(layer.kernel) + 2 or not len(x):
        return (x,)
    per_sample = max(1, x[0].numel() * pixels)
    size = max(1, CHUNK_ELEMENTS // per_sample)
    parts: tuple[Tensor, ...] = torch.split(x, size)
    return parts


def layer_inputs(layer: Layer, x: Tensor, *, seed: int = 0) -> Tensor:
    """What the weight of `layer` is multiplied with: rows [groups, positions, n].

    For kernels whose patches are larger than `MAX_PATCH` the rows are pixels. Of large
    feature maps a random part of the positions is taken, see `POSITIONS`.
    """
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    x = x.detach().to(dtype)
    if not layer.is_conv:
        return x.reshape(1, -1, x.shape[-1])
    dims = len(layer.kernel)
    x = x if x.dim() == dims + 2 else x.unsqueeze(0)
    per_group, pixels = layer.group_shape[0], math.prod(layer.kernel)
    if pixels > 1 and per_group * pixels > MAX_PATCH:
        return channel_rows(x, layer.groups)
    wanted = max(POSITIONS, ROWS_PER_COLUMN * per_group * pixels // max(len(x), 1))
    return patches(layer, x, most=wanted, seed=seed)


def channel_rows(x: Tensor, groups: int = 1) -> Tensor:
    """Activations [batch, channels, *positions] as rows [groups, positions, channels / groups]."""
    rows: Tensor = x.unflatten(1, (groups, -1)).movedim(2, -1)
    return rows.movedim(1, 0).flatten(1, -2)


def patches(layer: Layer, x: Tensor, *, most: int | None = None, seed: int = 0) -> Tensor:
    """What the kernel of a convolution meets: rows [groups, positions, channels * pixels].

    Positions are in the order of `channel_rows` of the layer's output.

    Args:
        layer: A convolution.
        x: Its input [batch, channels, *positions].
        most: Positions to draw, the same for every sample; None for all.
        seed: Of the draw.
    """
    dims = len(layer.kernel)
    per_group, pixels = layer.group_shape[0], math.prod(layer.kernel)
    x = _padded(layer, x)
    for dim, (size, step, spread) in enumerate(
        zip(layer.kernel, layer.stride, layer.dilation, strict=True), start=2
    ):
        x = x.unfold(dim, (size - 1) * spread + 1, step)[..., ::spread]
    sides = x.shape[2 : dims + 2]
    if most is not None and most < math.prod(sides):
        # On the CPU: the draw is the same on every device.
        order = torch.randperm(
            math.prod(sides), generator=torch.Generator().manual_seed(seed), device="cpu"
        )
        drawn = torch.unravel_index(order[:most].sort().values.to(x.device), sides)
        chosen: Any = (slice(None), slice(None), *drawn)
        x = x[chosen]
        dims = 1
    # [batch, channels, *positions, *kernel] to rows of (channel, pixel).
    split: Tensor = x.flatten(dims + 2).unflatten(1, (layer.groups, per_group)).movedim(2, -2)
    return split.movedim(1, 0).reshape(layer.groups, -1, per_group * pixels)


def _padded(layer: Layer, x: Tensor) -> Tensor:
    if layer.padding == "valid":
        return x
    widths: list[int] = []
    for index in reversed(range(len(layer.kernel))):
        if layer.padding == "same":
            total = layer.dilation[index] * (layer.kernel[index] - 1)
            widths += [total // 2, total - total // 2]
        else:
            widths += [int(layer.padding[index])] * 2
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, widths, mode=mode) if any(widths) else x

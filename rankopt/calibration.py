"""What calibration inputs tell about a model: second moments per layer, BatchNorm statistics.

Only inputs are used, never labels. Memory is bounded by the moment matrices.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankopt import measure, surgery
from rankopt._progress import progress_bar
from rankopt.errors import CalibrationError
from rankopt.layers import Layer
from rankopt.moments import Moments

__all__ = [
    "MAX_SAMPLES",
    "batches",
    "channel_rows",
    "collect",
    "digest",
    "divergence",
    "divergence_loss",
    "has_norms",
    "hold",
    "main_output",
    "norm_statistics",
    "patches",
    "recalibrate",
    "shortened",
    "split_batch",
    "tensors_in",
]

# Samples read from an iterable that does not end by itself.
MAX_SAMPLES: Final = 4096
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
# Patches unfolded at a time: 128 MB in float32.
CHUNK_ELEMENTS: Final = 2**25


def batches(
    model: nn.Module, data: Any, *, max_samples: int | None = MAX_SAMPLES
) -> Iterator[tuple[Any, int]]:
    """Yield (inputs on the model's device, number of samples).

    Args:
        model: Decides the device, and by its signature whether the second item
            of a pair is an argument or a label to leave out.
        data: An iterable of tensors, tuples (positional), mappings (keywords),
            or pairs of inputs and labels, as a DataLoader yields them.
        max_samples: Where to stop; None reads to the end.

    Raises:
        CalibrationError: Not an iterable of inputs, or empty.
    """
    if isinstance(data, (Tensor, str, Mapping)) or not isinstance(data, Iterable):
        raise CalibrationError(
            f"calibration is a {type(data).__name__}; expected an iterable of batches, such as a "
            "DataLoader or a list of tensors (for one batch x, pass [x])"
        )
    device, seen = surgery.device_of(model), 0
    positional = _positional_arguments(model)
    for batch in data:
        inputs = measure.to_device(_without_labels(batch, positional), device)
        size = _batch_size(inputs)
        if max_samples is not None and seen + size > max_samples:
            inputs, size = _first(inputs, max_samples - seen), max_samples - seen
        if size:
            yield inputs, size
        seen += size
        if max_samples is not None and seen >= max_samples:
            return
    if not seen:
        raise CalibrationError("calibration is empty: it yielded no batch")


def _positional_arguments(model: nn.Module) -> tuple[int, int] | None:
    """How many positional arguments the model requires and takes; None if unknown."""
    kinds = inspect.Parameter
    try:
        parameters = inspect.signature(surgery.unwrap(model).forward).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is kinds.VAR_POSITIONAL for parameter in parameters):
        return None
    taken = [
        p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
    ]
    return sum(p.default is kinds.empty for p in taken), len(taken)


def _without_labels(batch: Any, positional: tuple[int, int] | None) -> Any:
    if isinstance(batch, (Tensor, Mapping)):
        return batch
    if not isinstance(batch, (tuple, list)) or not batch:
        raise CalibrationError(
            f"calibration yielded a {type(batch).__name__}; expected a tensor, a tuple, a list or "
            "a mapping of tensors"
        )
    first, last = batch[0], batch[-1]
    labels = (
        len(batch) == 2
        and isinstance(first, Tensor)
        and isinstance(last, Tensor)
        and last.dim() <= 1
        and len(first) == last.numel()
    )
    required, taken = positional or (1, len(batch))
    if len(batch) > max(taken, 1):  # labels, indices and the like
        batch = batch[:taken]
    elif labels and required < 2 and not last.is_floating_point():
        batch = batch[:1]
    return batch[0] if len(batch) == 1 else tuple(batch)


def tensors_in(inputs: Any) -> Iterator[Tensor]:
    """Every tensor inside nested tuples, lists and mappings, in order."""
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, Mapping):
        for value in inputs.values():
            yield from tensors_in(value)
    elif isinstance(inputs, (tuple, list)):
        for value in inputs:
            yield from tensors_in(value)


def _batch_size(inputs: Any) -> int:
    first = next((tensor for tensor in tensors_in(inputs) if tensor.dim()), None)
    if first is None:
        raise CalibrationError("calibration yielded a batch without a tensor that has a batch size")
    return len(first)


def _first(inputs: Any, count: int) -> Any:
    """The first `count` samples of whatever has the batch's size."""
    size = _batch_size(inputs)

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:count] if value.dim() and len(value) == size else value
        if isinstance(value, Mapping):
            return {key: cut(entry) for key, entry in value.items()}
        if isinstance(value, (tuple, list)):
            return tuple(cut(entry) for entry in value)
        return value

    return cut(inputs)


def shortened(held: Iterable[Any], samples: int) -> list[Any]:
    """The first `samples` samples of held batches."""
    kept: list[Any] = []
    for inputs in held:
        size = min(_batch_size(inputs), samples)
        if size:
            kept.append(_first(inputs, size))
        samples -= size
    return kept


def hold(model: nn.Module, data: Any, *, max_samples: int | None = MAX_SAMPLES) -> list[Any]:
    """The batches of `data`, kept for several passes; see `batches`."""
    return [inputs for inputs, _ in batches(model, data, max_samples=max_samples)]


def digest(held: Iterable[Any]) -> str:
    """SHA-256 of held calibration inputs, in order, however they were batched."""
    parts: dict[int, Any] = {}
    for inputs in held:
        for index, tensor in enumerate(tensors_in(inputs)):
            part = parts.setdefault(index, hashlib.sha256())
            for sample in tensor.detach().cpu().reshape(len(tensor) if tensor.dim() else 1, -1):
                part.update(sample.contiguous().view(-1).view(torch.uint8).numpy().data)
    total = hashlib.sha256(b"".join(part.digest() for part in parts.values()))
    return total.hexdigest()


def divergence(before: Any, after: Any) -> float:
    """How far outputs moved, per sample: KL of class probabilities, else relative error².

    Logits are 2-d outputs or what an output calls ``logits``.
    """
    return float(divergence_loss(before, after).detach())


def divergence_loss(before: Any, after: Any) -> Tensor:
    """`divergence` as a float64 scalar with a gradient to `after`."""
    old, new = _compared(before), _compared(after)
    if old.shape != new.shape:
        raise CalibrationError(f"outputs changed from {list(old.shape)} to {list(new.shape)}")
    old, new = old.double(), new.double()
    named = isinstance(before, Mapping) and "logits" in before
    if (named or old.dim() == 2) and old.shape[-1] > 1:
        p, q = old.log_softmax(dim=-1), new.log_softmax(dim=-1)
        return (p.exp() * (p - q)).sum(dim=-1).mean()
    return (old - new).square().sum() / old.square().sum().clamp_min(1e-300)


def main_output(output: Any) -> Any:
    """The logits of an output, else its first floating-point tensor; {"logits": …} if named."""
    if isinstance(output, Mapping) and "logits" in output:
        return {"logits": output["logits"]}
    return _compared(output)


def _compared(output: Any) -> Tensor:
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    for tensor in tensors_in(output):
        if tensor.is_floating_point():
            return tensor
    raise CalibrationError("the model's output holds no floating-point tensor to compare")


def run(model: nn.Module, inputs: Any) -> Any:
    """Call `model`, turning its failure into a `CalibrationError`."""
    try:
        return measure.call(model, inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = [f"{list(t.shape)} {t.dtype}" for t in tensors_in(inputs)]
        raise CalibrationError(
            f"the model fails on a calibration batch of {', '.join(shapes)}: {error}; "
            "calibration yields inputs of the shape and dtype the model takes"
        ) from error


def collect(
    model: nn.Module,
    layers: Sequence[Layer],
    data: Any,
    *,
    max_samples: int | None = MAX_SAMPLES,
    progress: bool | None = None,
) -> dict[str, Moments]:
    """Second moments of the inputs of `layers`, in one pass in eval mode.

    Args:
        model: An unpacked clone whose modules the layers name.
        layers: The layers to watch.
        data: See `batches`.
        max_samples: Where to stop.
        progress: Whether to show a progress bar.

    Raises:
        CalibrationError: See `batches`; also inputs the model fails on, or
            that are not finite.
    """
    layers = [layer for layer in layers if layer.group_shape[0] <= MAX_FEATURES]
    modules = dict(surgery.named_modules(model))
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(layer: Layer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            for part in split_batch(layer, next(iter((*args, *kwargs.values())))):
                rows = layer_inputs(layer, part, seed=counts.get(layer.name, 0))
                # Products in the model's own precision, summed in float64.
                product = (rows.mT @ rows).to(torch.float64)
                if layer.name in sums:
                    sums[layer.name] += product
                else:
                    sums[layer.name] = product
                counts[layer.name] = counts.get(layer.name, 0) + rows.shape[1]

        return hook

    handles = [
        modules[x.name].register_forward_pre_hook(watch(x), with_kwargs=True) for x in layers
    ]
    try:
        with (
            torch.no_grad(),
            measure.preserve_rng(),
            measure.evaluation(model),
            progress_bar("calibrating", None, enabled=progress) as advance,
        ):
            for inputs, _ in batches(model, data, max_samples=max_samples):
                run(model, inputs)
                advance()
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for layer in layers:
        if layer.name not in sums:
            continue
        second = sums[layer.name] / counts[layer.name]
        if not bool(second.isfinite().all()):
            raise CalibrationError(
                f"layer {layer.name}: its inputs on the calibration data are not finite"
            )
        channels = layer.group_shape[0]
        found[layer.name] = Moments(second, second.shape[-1] // channels, counts[layer.name])
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
        order = torch.randperm(math.prod(sides), generator=torch.Generator().manual_seed(seed))
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


# BatchNorm


_NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def recalibrate(
    model: nn.Module,
    data: Any,
    *,
    teacher: nn.Module | None = None,
    statistics: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    max_samples: int | None = MAX_SAMPLES,
) -> int:
    """Refresh the running statistics of BatchNorm layers from inputs alone, in place.

    Without a teacher they become the exact mean and variance of each layer's
    inputs, pooled over all samples. With one, they are set so that each channel
    leaves the layer with the mean and variance it has in the teacher: the
    statistics of a model equal to its teacher then stay as they are, where
    plain recalibration is known to do harm.

    Args:
        model: Its BatchNorm layers are changed; dropout stays off.
        data: See `batches`.
        teacher: The dense model, with BatchNorm layers of the same names.
        statistics: The teacher's `norm_statistics` on these inputs, if known already.
        max_samples: Where to stop.

    Returns:
        The number of layers changed; 0 for a model without BatchNorm.

    Raises:
        CalibrationError: See `batches`.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> recalibrate(net, [torch.randn(64, 4)])
        1
    """
    norms = _norms_of(model)
    if not norms:
        return 0
    found = _norm_statistics(model, norms, data, max_samples, batch_statistics=teacher is None)
    reference = {} if teacher is None else _norms_of(teacher)
    targets: Mapping[str, tuple[Tensor, Tensor]] = {}
    if teacher is not None:
        targets = (
            statistics
            if statistics is not None
            else norm_statistics(teacher, data, max_samples=max_samples)
        )
    changed = 0
    for name, (mean, variance) in found.items():
        norm = norms[name]
        if name in targets and targets[name][0].shape == mean.shape:
            theirs = reference[name]
            their_mean, their_variance = targets[name]
            # The teacher's channel leaves with mean (m - running_mean) / σ and
            # variance v / σ²; ours shall too.
            ratio = variance / their_variance.clamp_min(theirs.eps)
            new_variance = (theirs.running_var.double() + theirs.eps) * ratio - norm.eps
            shift = (their_mean - theirs.running_mean.double()) * ratio.sqrt()
            mean, variance = mean - shift, new_variance.clamp_min(0)
        elif teacher is not None:
            continue
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        changed += 1
    return changed


def has_norms(model: nn.Module) -> bool:
    """Whether there is a BatchNorm layer with running statistics."""
    return bool(_norms_of(model))


def norm_statistics(
    model: nn.Module, data: Any, *, max_samples: int | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Exact (mean, variance) of what each BatchNorm layer of a dense model takes in."""
    return _norm_statistics(model, _norms_of(model), data, max_samples, batch_statistics=False)


def _norms_of(model: nn.Module) -> dict[str, Any]:
    return {
        name: module
        for name, module in surgery.named_modules(model)
        if isinstance(module, _NORMS) and module.running_mean is not None
    }


def _norm_statistics(
    model: nn.Module,
    norms: Mapping[str, Any],
    data: Any,
    max_samples: int | None,
    *,
    batch_statistics: bool,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Exact (mean, variance) of the input of each norm.

    With `batch_statistics` the norms run in train mode, so that later layers
    see normalised inputs although the running statistics are stale.
    """
    totals: dict[str, list[Any]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            # Squares in half precision would overflow; float64 squares cancel safely.
            rows = args[0].detach().transpose(0, 1).flatten(1).to(torch.float64)
            entry = totals.setdefault(name, [0, 0.0, 0.0])
            entry[0] += rows.shape[1]
            entry[1] = entry[1] + rows.sum(dim=1)
            entry[2] = entry[2] + rows.square().sum(dim=1)

        return hook

    handles = [norm.register_forward_pre_hook(watch(name)) for name, norm in norms.items()]
    saved = {name: _state(norm) for name, norm in norms.items()}
    try:
        with torch.no_grad(), measure.preserve_rng(), measure.evaluation(model):
            for norm in norms.values() if batch_statistics else ():
                norm.train()
            for inputs, _ in batches(model, data, max_samples=max_samples):
                run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
        for name, norm in norms.items():
            for key, value in saved[name].items():
                getattr(norm, key).copy_(value)
    statistics = {}
    for name, (count, total, squares) in totals.items():
        mean = total / count
        statistics[name] = (mean, (squares / count - mean.square()).clamp_min(0))
    return statistics


def _state(norm: Any) -> dict[str, Tensor]:
    keys = ("running_mean", "running_var", "num_batches_tracked")
    return {key: getattr(norm, key).clone() for key in keys if getattr(norm, key) is not None}

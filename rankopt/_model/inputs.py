"""Calibration inputs: reading them without labels, running them, comparing outputs."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from rankopt._model import measure, surgery
from rankopt._model.measure import tensors_in
from rankopt.errors import CalibrationError

__all__ = [
    "MAX_SAMPLES",
    "affordable",
    "affordable_samples",
    "batch_size",
    "batches",
    "class_dim",
    "compared",
    "digest",
    "divergence",
    "divergence_loss",
    "hold",
    "main_output",
    "misfit",
    "relative_error",
    "run",
    "scores_classes",
    "shortened",
    "tensors_in",
]

# Samples read from an iterable that does not end by itself.
MAX_SAMPLES: Final = 4096
# What batches of Hugging Face call them.
LABELS: Final = "labels"
# What they are called in other mappings.
_TARGETS: Final = (LABELS, "label", "target", "targets", "y")
# What outputs that are kept for comparison may take, and how many are kept in any case.
OUTPUT_BYTES: Final = 256 * 2**20
LEAST_SAMPLES: Final = 4
# What a forward raises for inputs that it cannot take.
MODEL_ERRORS: Final = (
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    AssertionError,
)
# Elements of outputs that are compared at a time: a language model's logits fill a GPU.
PIECE: Final = 2**20


def batches(
    model: nn.Module, data: Any, *, max_samples: int | None = MAX_SAMPLES, labelled: bool = False
) -> Iterator[tuple[Any, int]]:
    """Yield (inputs on the model's device, number of samples).

    Args:
        model: Decides the device, and by its signature whether the second item
            of a pair is an argument or a label to leave out.
        data: An iterable of tensors, tuples (positional), mappings (keywords),
            or pairs of inputs and labels, as a DataLoader yields them.
        max_samples: Where to stop; None reads to the end.
        labelled: Whether the last item of every tuple is a label, whatever its shape, as in
            data to train on; unless the model requires it.

    Raises:
        CalibrationError: Not an iterable of inputs, or empty.
        ValueError: `max_samples` is below 1.
    """
    if isinstance(data, (Tensor, str, Mapping)) or not isinstance(data, Iterable):
        raise CalibrationError(
            f"calibration is a {type(data).__name__}; expected an iterable of batches, such as a "
            "DataLoader or a list of tensors (for one batch x, pass [x])"
        )
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"{max_samples} calibration samples: expected at least 1, or None for all")
    device, seen = surgery.device_of(model), 0
    positional, required = _positional_arguments(model), _requires_labels(model)
    for batch in data:
        if isinstance(batch, Mapping) and not required:
            batch = {key: value for key, value in batch.items() if key != LABELS}
        inputs = measure.to_device(_without_labels(batch, positional, labelled), device)
        size = batch_size(inputs)
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


def _requires_labels(model: nn.Module) -> bool:
    """Whether forward cannot do without the labels of a mapping; True if that is unknown."""
    try:
        parameters = inspect.signature(surgery.unwrap(model).forward).parameters
    except (TypeError, ValueError):
        return True
    found = parameters.get(LABELS)
    if found is None:  # taken, if at all, as one of many
        return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return found.default is inspect.Parameter.empty


def _without_labels(batch: Any, positional: tuple[int, int] | None, labelled: bool) -> Any:
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
    if labelled and len(batch) > max(required, 1):
        batch = batch[:-1][: max(taken, 1)]
    elif len(batch) > max(taken, 1):  # labels, indices and the like
        batch = batch[:taken]
    elif labels and required < 2 and not last.is_floating_point():
        batch = batch[:1]
    return batch[0] if len(batch) == 1 else tuple(batch)


def batch_size(inputs: Any) -> int:
    """Samples in a batch: the length of its first tensor that has one."""
    first = next((tensor for tensor in tensors_in(inputs) if tensor.dim()), None)
    if first is None:
        raise CalibrationError("calibration yielded a batch without a tensor that has a batch size")
    return len(first)


def _first(inputs: Any, count: int) -> Any:
    """The first `count` samples of whatever has the batch's size; with a sparse tensor, all."""
    size = batch_size(inputs)
    if any(tensor.layout != torch.strided for tensor in tensors_in(inputs)):
        return inputs  # an adjacency, say: the others are as long as it

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
        size = min(batch_size(inputs), samples)
        if size:
            kept.append(_first(inputs, size))
        samples -= size
    return kept


def affordable(model: nn.Module, held: Sequence[Any], samples: int) -> list[Any]:
    """The first samples of held batches, fewer where their outputs would take much memory.

    Args:
        model: In eval mode; run once, on a single sample.
        held: See `hold`.
        samples: At most; outputs of a language model's vocabulary allow far fewer.
    """
    return shortened(held, min(samples, affordable_samples(model, held)))


def affordable_samples(model: nn.Module, held: Sequence[Any]) -> int:
    """How many samples' outputs may be kept; runs the model in its mode, on one of them."""
    return max(LEAST_SAMPLES, OUTPUT_BYTES // output_bytes(model, held))


def output_bytes(model: nn.Module, held: Sequence[Any]) -> int:
    """Memory of the outputs of one sample, at least 1; runs the model in its mode."""
    with torch.no_grad(), measure.preserve_rng():
        output = run(model, shortened(held, 1)[0])
    return max(1, sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(output)))


def hold(
    model: nn.Module, data: Any, *, max_samples: int | None = MAX_SAMPLES, labelled: bool = False
) -> list[Any]:
    """The batches of `data`, kept for several passes; see `batches`."""
    found = batches(model, data, max_samples=max_samples, labelled=labelled)
    passing = isinstance(data, Iterator)  # it may fill one buffer again and again
    return [measure.copied(inputs) if passing else inputs for inputs, _ in found]


def digest(held: Iterable[Any]) -> str:
    """SHA-256 of held calibration inputs, in order, however they were batched."""
    parts: dict[int, Any] = {}
    for inputs in held:
        for index, tensor in enumerate(tensors_in(inputs)):
            part = parts.setdefault(index, hashlib.sha256())
            whole = tensor.detach().cpu()
            sparse = whole.layout != torch.strided
            for sample in measure.dense_parts(whole) if sparse or not whole.dim() else whole:
                if sample.numel():
                    part.update(sample.contiguous().view(-1).view(torch.uint8).numpy().data)
    total = hashlib.sha256(b"".join(part.digest() for part in parts.values()))
    return total.hexdigest()


def divergence(before: Any, after: Any) -> float:
    """How far outputs moved, per sample: KL of class probabilities, else relative error².

    Logits are 2-d outputs or what an output calls ``logits``.
    """
    with torch.no_grad():
        return float(divergence_loss(before, after))


def divergence_loss(before: Any, after: Any, *, temperature: float = 1.0) -> Tensor:
    """`divergence` as a float64 scalar with a gradient to `after`.

    Args:
        before: The dense model's output.
        after: Another's.
        temperature: What logits are divided by; the divergence is multiplied by its square,
            so that its slope stays of one size (arXiv 1503.02531, section 2.1).

    Raises:
        CalibrationError: Outputs cannot be compared, or those of `before` are NaN.
    """
    old, new = compared(before), compared(after)
    if old.shape != new.shape:
        raise CalibrationError(f"outputs changed from {list(old.shape)} to {list(new.shape)}")
    scores = scores_classes(before)
    distance = partial(_kl, temperature=temperature) if scores else relative_error
    found = distance(old, new)
    if bool(found.isnan()) and bool(distance(old, old).isnan()):
        raise CalibrationError(
            "the dense model gives outputs that are not finite on these inputs; check them for "
            "NaN, and a model in half precision for overflow"
        )
    return found


def _kl(old: Tensor, new: Tensor, temperature: float) -> Tensor:
    """Mean KL of the classes of two logits, times temperature²; -inf masks a class."""
    dim = class_dim(old)
    if dim == -1:
        old, new = (logits.reshape(-1, logits.shape[-1]) for logits in (old, new))
    total = torch.zeros((), device=old.device)
    for pair in _pieces(old, new):
        p, q = (piece.div(temperature).log_softmax(dim=dim) for piece in pair)
        total = total + (p.exp() * (p - q).masked_fill(p == -math.inf, 0)).sum()
    return temperature**2 * total / (old.numel() // old.shape[dim])


def relative_error(old: Tensor, new: Tensor) -> Tensor:
    """‖new - old‖²/‖old‖² of outputs, without entries that are infinite in the old one."""
    total = torch.zeros(2, device=old.device)
    for pair in _pieces(old.flatten(), new.flatten()):
        a, b = (piece.masked_fill(pair[0].isinf(), 0) for piece in pair)
        total = total + torch.stack([(b - a).square().sum(), a.square().sum()])
    return total[0] / total[1].clamp_min(1e-300)


def _pieces(old: Tensor, new: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of both, about `PIECE` elements at a time, in float64 where the device has it."""
    exact = torch.float64 if old.device.type in ("cpu", "cuda") else torch.float32
    rows = max(1, PIECE // max(old[:1].numel(), 1))
    for pair in zip(old.split(rows), new.split(rows), strict=True):
        yield tuple(piece.to(exact) for piece in pair)


def scores_classes(output: Any) -> bool:
    """Whether an output is taken for class scores: logits by name, or two-dimensional."""
    scores = compared(output)
    named = isinstance(output, Mapping) and "logits" in output
    return (named or scores.dim() == 2) and scores.shape[class_dim(scores)] > 1


def class_dim(logits: Tensor) -> int:
    """Where the classes of logits are: the channels of maps, [n, classes, h, w], else the last."""
    return 1 if logits.dim() >= 4 else -1


def main_output(output: Any) -> Any:
    """The logits of an output, else its first floating-point tensor; {"logits": …} if named."""
    if isinstance(output, Mapping) and "logits" in output:
        return {"logits": output["logits"]}
    return compared(output)


def compared(output: Any) -> Tensor:
    """The tensor of an output that is compared: its logits, else the first of floats."""
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
    except torch.OutOfMemoryError:
        raise
    except MODEL_ERRORS as error:
        shapes = [f"{list(t.shape)} {t.dtype}" for t in tensors_in(inputs)]
        raise CalibrationError(
            f"the model fails on a calibration batch of {', '.join(shapes)}: {error}; "
            + (
                misfit(model, inputs)
                or "calibration yields inputs of the shape and dtype the model takes"
            )
        ) from error


def misfit(model: nn.Module, inputs: Any) -> str | None:
    """How a batch does not match the arguments of forward, and what to do; None where it does.

    Example:
        >>> misfit(nn.Linear(2, 2), (torch.zeros(1, 2), torch.zeros(1)))
        'the entries of a tuple are passed as arguments: forward takes (input), the batch has 2'
    """
    named = isinstance(inputs, Mapping)
    several = inputs if isinstance(inputs, (tuple, list)) else [inputs]
    try:
        signature = inspect.signature(surgery.unwrap(model).forward)
        taken = f"forward takes ({', '.join(signature.parameters)})"
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(**inputs) if named else signature.bind(*several)
    except TypeError:
        if not named:
            have = f"the batch has {len(several)}"
            return f"the entries of a tuple are passed as arguments: {taken}, {have}"
        targets = [key for key in inputs if str(key).lower() in _TARGETS]
        keys = [*[key for key in inputs if key not in targets][:1], *targets[:1]]
        mapped = ", ".join(f"b[{key!r}]" for key in keys)
        mapped = f"({mapped})" if len(keys) > 1 else mapped
        return (
            f"a mapping is passed as keyword arguments: {taken}, the batch has "
            f"{', '.join(map(str, inputs))}; map it, such as [{mapped} for b in loader]"
        )
    return None

"""Calibration inputs: reading them without labels, running them, comparing outputs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import is_dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from rankopt._model import measure, surgery
from rankopt._model.arguments import Arguments, misfit
from rankopt._model.measure import tensors_in
from rankopt._model.sharing import alike, first, shortened
from rankopt._utils.arguments import check_integer
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
    "divergences",
    "entry",
    "hold",
    "kl",
    "main_output",
    "relative_error",
    "run",
    "scores_classes",
    "shared_tensors",
    "tensors_in",
]

# Samples read from an iterable that does not end by itself.
MAX_SAMPLES: Final = 4096
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
    model: nn.Module,
    data: Any,
    *,
    max_samples: int | None = MAX_SAMPLES,
    labelled: bool = False,
    name: str = "calibration",
) -> Iterator[tuple[Any, int]]:
    """Yield (inputs on the model's device, number of samples).

    Args:
        model: Decides the device, and by its signature whether the second item
            of a pair is an argument or a label to leave out.
        data: An iterable of tensors, tuples (positional), mappings (keywords),
            or pairs of inputs and labels, as a DataLoader yields them. The second item of a
            pair is a label where forward does not require it and it has one entry per sample.
            What a model takes as one argument, a dict or a list, comes in a 1-tuple.
        max_samples: Where to stop; None reads to the end.
        labelled: Whether the last item of every tuple is a label, whatever its shape, as in
            data to train on; unless the model requires it.
        name: What messages call the data.

    Raises:
        CalibrationError: Not an iterable of inputs, or empty.
        ValueError: `max_samples` is no integer of at least 1.

    Warns:
        RankoptWarning: What was left out of a pair could have been an optional argument too.
    """
    if isinstance(data, (Tensor, str, Mapping)) or not isinstance(data, Iterable):
        raise CalibrationError(
            f"{name} is a {type(data).__name__}; expected an iterable of batches, such as a "
            "DataLoader or a list of tensors (for one batch x, pass [x])"
        )
    if max_samples is not None:
        check_integer(f"{name}_samples", max_samples, 1)
    device, seen = surgery.device_of(model), 0
    arguments, before = Arguments(model), None
    for batch in data:
        batch = arguments.without_labels(batch, labelled=labelled, name=name)
        inputs = measure.to_device(batch, device)
        size = batch_size(inputs, name)
        if max_samples is not None and seen + size > max_samples:
            known = alike([inputs] if before is None else [before, inputs])
            inputs, size = first(inputs, max_samples - seen, known), max_samples - seen
        if size:
            yield inputs, size
        seen, before = seen + size, inputs
        if max_samples is not None and seen >= max_samples:
            return
    if not seen:
        raise CalibrationError(f"{name} is empty: it yielded no batch")


def batch_size(inputs: Any, name: str = "calibration") -> int:
    """Samples in a batch: the length of its first tensor that has one."""
    first = next((tensor for tensor in tensors_in(inputs) if tensor.dim()), None)
    if first is None:
        raise CalibrationError(f"{name} yielded a batch without a tensor that has a batch size")
    return len(first)


def affordable(model: nn.Module, held: Sequence[Any], samples: int) -> list[Any]:
    """The first samples of held batches, fewer where their outputs would take much memory.

    Args:
        model: In eval mode; run once, on a single sample.
        held: See `hold`.
        samples: At most; outputs of a language model's vocabulary allow far fewer.
    """
    shared = shared_tensors(model, held)
    return shortened(held, min(samples, _affordable_samples(model, held, shared)), shared)


def affordable_samples(model: nn.Module, held: Sequence[Any]) -> int:
    """How many samples' outputs may be kept; runs the model in its mode, on one of them."""
    return _affordable_samples(model, held, shared_tensors(model, held))


def _affordable_samples(model: nn.Module, held: Sequence[Any], shared: Set[int]) -> int:
    return max(LEAST_SAMPLES, OUTPUT_BYTES // output_bytes(model, held, shared))


def output_bytes(model: nn.Module, held: Sequence[Any], shared: Set[int]) -> int:
    """Memory of the outputs of one sample, at least 1; runs the model in its mode.

    Args:
        model: Run on one sample, or on a batch where it takes no part of one.
        held: See `hold`.
        shared: See `shared_tensors`.
    """
    (tried,) = shortened(held[:1], 1, shared)
    with torch.no_grad(), measure.preserve_rng():
        output = run(model, tried)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(output))
    return max(1, size // batch_size(tried))


def shared_tensors(model: nn.Module, held: Sequence[Any]) -> set[int]:
    """The ids of tensors in held batches that all samples share; runs the model in its mode.

    Beside those of `sharing.alike` they are all tensors where the model takes no single sample,
    or gives other than its share of the outputs: graphs, images in lists, models of one batch
    size. Whole batches are the samples then.
    """
    shared = alike(held)
    (one,), size = shortened(held[:1], 1, shared), batch_size(held[0])
    with torch.no_grad(), measure.preserve_rng():
        try:
            found = run(model, one)
        except CalibrationError:
            run(model, held[0])  # it may be the inputs that are at fault
            found = None
        if found is not None:
            several = min(size, 2)
            (some,) = shortened(held[:1], several, shared)
            if size == 1 or _rows(found) * several == _rows(run(model, some)):
                return shared
    return {id(tensor) for inputs in held for tensor in tensors_in(inputs)}


def _rows(output: Any) -> int:
    """The length of an output; 0 of one number."""
    main = compared(output)
    return len(main) if main.dim() else 0


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


def divergences(before: Any, after: Any) -> Tensor:
    """What each sample adds to `divergence`, which is their mean: [n] in float64 on the CPU."""
    divergence(before, after)  # raises its errors
    old, new = (torch.atleast_1d(compared(output)) for output in (before, after))
    with torch.no_grad():
        pieces = _pieces(old, new)
        if scores_classes(before):
            dim = class_dim(old)
            terms = [_kl_terms(pair, dim).flatten(1).sum(dim=1) for pair in pieces]
            per_sample: Tensor = torch.cat(terms).cpu().double()
            return per_sample.mul(old.shape[dim] / old[0].numel())
        squares = [x.reshape(2, x.shape[1], -1).sum(dim=2) for x in map(_squared, pieces)]
    lost, energy = torch.cat(squares, dim=1).cpu().double()
    return torch.div(lost, energy.mean().clamp_min(1e-300))


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
    distance = partial(kl, temperature=temperature) if scores else relative_error
    found = distance(old, new)
    if bool(found.isnan()) and bool(distance(old, old).isnan()):
        raise CalibrationError(
            "the dense model gives outputs that are not finite on these inputs; check them for "
            "NaN, and a model in half precision for overflow"
        )
    return found


def kl(old: Tensor, new: Tensor, *, temperature: float = 1.0, exact: bool = True) -> Tensor:
    """Mean KL of the classes of two logits, times temperature²; -inf masks a class.

    Sums are in float64, piece by piece, where `exact`; a loss of training does with float32.
    """
    dim = class_dim(old)
    if dim == -1:
        old, new = (logits.reshape(-1, logits.shape[-1]) for logits in (old, new))
    total = torch.zeros((), device=old.device)
    for pair in _pieces(old, new) if exact else [_single(old, new)]:
        total = total + _kl_terms([piece.div(temperature) for piece in pair], dim).sum()
    return temperature**2 * total / (old.numel() // old.shape[dim])


def _kl_terms(pair: Iterable[Tensor], dim: int) -> Tensor:
    """What every class adds to the KL of two logits."""
    p, q = (logits.log_softmax(dim=dim) for logits in pair)
    terms: Tensor = p.exp() * (p - q).masked_fill(p == -math.inf, 0)
    return terms


def relative_error(old: Tensor, new: Tensor, *, exact: bool = True) -> Tensor:
    """‖new - old‖²/‖old‖² of outputs, without entries that are infinite in the old one.

    `exact` as of `kl`; a loss also has to stay finite where the old output is zero.
    """
    total = torch.zeros(2, device=old.device)
    for pair in _pieces(old.flatten(), new.flatten()) if exact else [_single(old, new)]:
        total = total + _squared(pair).flatten(1).sum(dim=1)
    return total[0] / total[1].clamp_min(1e-300 if exact else 1e-12)


def _squared(pair: Sequence[Tensor]) -> Tensor:
    """[2, ...]: squares of the difference of two outputs, and of the first."""
    masked = pair[0].isinf()  # such as classes that are left out
    old, new = (x.masked_fill(masked, 0) for x in pair)
    return torch.stack([(new - old).square(), old.square()])


def _pieces(old: Tensor, new: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of both, about `PIECE` elements at a time, in float64 where the device has it."""
    exact = torch.float64 if old.device.type in ("cpu", "cuda") else torch.float32
    rows = max(1, PIECE // max(old[:1].numel(), 1))
    for pair in zip(old.split(rows), new.split(rows), strict=True):
        yield tuple(piece.to(exact) for piece in pair)


def _single(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors whose sums neither overflow nor lose all but the first digits."""
    return tuple(x.float() if x.dtype.itemsize < 4 else x for x in tensors)


def scores_classes(output: Any) -> bool:
    """Whether an output is taken for class scores: logits by name, or two-dimensional."""
    scores = compared(output)
    named = entry(output, "logits") is not None
    matrix = scores.dim() == 2 or (named and scores.dim() > 2)
    return matrix and scores.shape[class_dim(scores)] > 1


def entry(output: Any, name: str) -> Any:
    """What a mapping, a dataclass or a named tuple calls `name`; None if nothing."""
    if isinstance(output, Mapping):
        return output.get(name)
    named = is_dataclass(output) or (isinstance(output, tuple) and hasattr(output, "_fields"))
    return getattr(output, name, None) if named else None


def class_dim(logits: Tensor) -> int:
    """Where the classes of logits are: the channels of maps, [n, classes, h, w], else the last."""
    return 1 if logits.dim() >= 4 else -1


def main_output(output: Any) -> Any:
    """The logits of an output, else its first floating-point tensor; {"logits": …} if named."""
    logits = entry(output, "logits")
    return compared(output) if logits is None else {"logits": logits}


def compared(output: Any) -> Tensor:
    """The tensor of an output that is compared: its logits, else the first of floats."""
    logits = entry(output, "logits")
    for tensor in tensors_in(output if logits is None else logits):
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
                or "calibration has to yield inputs of the shape and dtype the model takes, in "
                "batches of a size it takes"
            )
        ) from error

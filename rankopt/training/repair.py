"""recover(): label-free repair of a compressed model against its dense teacher."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from rankopt._build.apply import settle_norms
from rankopt._calibration.batchnorm import has_norms
from rankopt._model import measure, surgery
from rankopt._model.inputs import (
    MAX_SAMPLES,
    affordable_samples,
    batch_size,
    compared,
    divergence,
    hold,
    main_output,
    run,
    tensors_in,
)
from rankopt._utils.progress import progress_bar
from rankopt.errors import CalibrationError, ModelError
from rankopt.training.augmentation import augmentation
from rankopt.training.distillation import (
    PairedOutputs,
    check_precision,
    decomposed,
    private_teacher,
    train_as_evaluated,
)
from rankopt.training.freezing import release

__all__ = ["Recovery", "check_settings", "recover"]

# Share of the calibration inputs kept out of training, for an honest before and after.
HELD_OUT: Final = 1 / 16
GRADIENT_NORM: Final = 1.0
# Without BatchNorm, and with it.
LEARNING_RATES: Final = (3e-4, 1e-3)
# Weight of the layers' outputs beside the model's.
FEATURES: Final = 3.0


@dataclass(frozen=True)
class Recovery:
    """What a repair achieved.

    Args:
        before: Divergence from the teacher on held-out inputs (see
            `rankopt._model.inputs.divergence`): KL for logits, else relative error².
        after: The same afterwards.
        steps: Optimiser steps taken.
        seconds: Wall-clock time.
        kept: Whether the repaired weights were kept; False if they were no better.
    """

    before: float
    after: float
    steps: int
    seconds: float
    kept: bool

    def __str__(self) -> str:
        verdict = "" if self.kept else "; no better, so the model is as it was"
        return (
            f"recovered for {self.seconds:.0f} s ({self.steps} steps): divergence from the "
            f"teacher on held-out inputs {self.before:.4g} before, {self.after:.4g} after{verdict}"
        )


@measure.outside_inference_mode
@measure.no_autocast()
def recover(
    model: nn.Module,
    *,
    teacher: nn.Module,
    calibration: Any,
    seconds: float = 120.0,
    batch_size: int = 64,
    learning_rate: float | None = None,
    precision: Literal["no", "bf16"] = "no",
    augment: Callable[[Any, torch.Generator], Any] | str = "auto",
    calibration_samples: int | None = MAX_SAMPLES,
    seed: int = 0,
    progress: bool | None = None,
) -> Recovery:
    """Train a compressed model towards its teacher's outputs, in place, without labels.

    The loss is the divergence of the outputs plus the mean relative error² of the
    outputs of the decomposed layers; Adam with a cosine schedule over the time
    given. A part of the inputs is held out, and the model is left as it was if
    it does not come closer to its teacher there.

    Args:
        model: From `rankopt.apply`; its trainable parameters and BatchNorm
            statistics change.
        teacher: The dense model; not changed.
        calibration: Inputs; labels are left out. Batches may differ in shape, such as
            texts of several lengths: a step takes samples of one shape.
        seconds: Wall-clock limit.
        batch_size: Samples per step.
        learning_rate: Adam's, at the start; None for 1e-3 where BatchNorm holds the scale of
            what the layers pass on, 3e-4 elsewhere.
        precision: ``bf16`` trains under autocast, with more steps in the same time where the
            processor multiplies bfloat16; weights and what is measured keep theirs.
        augment: A function of (inputs, generator); ``auto`` shifts and mirrors
            4-d floating-point inputs, ``none`` leaves inputs alone.
        calibration_samples: Where to stop reading.
        seed: Orders the batches and draws the augmentation.
        progress: Whether to show a progress bar.

    Returns:
        What was achieved, measured on the inputs held out.

    Raises:
        CalibrationError: Too few inputs, or inputs a model fails on.
        ModelError: Nothing to train, float16 parameters, or outputs of another shape.

    Example:
        >>> dense = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
        >>> small = rankopt.apply(dense, rankopt.search(dense, "params<=60%"))
        >>> data = [torch.randn(64, 16) for _ in range(4)]
        >>> done = rankopt.recover(small, teacher=dense, calibration=data, seconds=1)
        >>> done.after <= done.before
        True
    """
    surgery.check_model(model)
    surgery.check_model(teacher, "teacher")
    check_settings(seconds, precision, augment, batch_size)
    release(model)
    started = time.perf_counter()
    with measure.preserve_rng():
        samples = _Samples(hold(model, calibration, max_samples=calibration_samples))
    train, test = samples.split(HELD_OUT)
    if learning_rate is None:
        learning_rate = LEARNING_RATES[has_norms(model)]
    least = 2 if has_norms(model) else 1  # a single value has no variance
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ModelError("recover has nothing to train: every parameter has requires_grad=False")
    check_precision(model, "recover")
    generator = torch.Generator().manual_seed(seed)
    change = augmentation(augment)
    guide = private_teacher(teacher).to(surgery.device_of(model))
    device = surgery.device_of(model).type
    tested = list(samples.batches(test, batch_size))
    if len(test) > (most := affordable_samples(guide, tested)):
        tested = list(samples.batches(test[:: math.ceil(len(test) / most)], batch_size))
    with torch.no_grad():
        wanted = [main_output(run(guide, inputs)) for inputs in tested]

    def distance() -> float:
        with torch.no_grad(), measure.evaluation(model):
            pairs = zip(tested, wanted, strict=True)
            return sum(divergence(old, run(model, x)) for x, old in pairs) / len(tested)

    before = distance()
    saved = copy.deepcopy(model.state_dict())  # extra state may be anything
    modes = [(module, module.training) for module in model.modules()]
    layers = PairedOutputs(model, guide, decomposed(model))
    steps = 0
    try:
        with measure.preserve_rng(), torch.enable_grad(), layers:
            torch.manual_seed(seed)
            train_as_evaluated(model)
            optimiser = torch.optim.Adam(parameters, lr=learning_rate)
            limit = seconds * 0.95 - (time.perf_counter() - started)
            begun = time.perf_counter()
            with progress_bar("recovering", None, enabled=progress) as advance:
                for inputs in samples.endless(train, batch_size, generator, least):
                    spent = (time.perf_counter() - begun) / max(limit, 1e-9)
                    if spent >= 1:
                        break
                    for group in optimiser.param_groups:
                        group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * spent))
                    inputs = change(inputs, generator)
                    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                        loss = _loss(layers, inputs)
                    if not bool(loss.isfinite()):
                        break
                    optimiser.zero_grad(set_to_none=True)
                    loss.backward()
                    nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM)
                    optimiser.step()
                    steps += 1
                    advance(f"{spent * limit:.0f} of {limit:.0f} s")
    except BaseException:
        model.load_state_dict(saved)  # Ctrl-C, no memory: never leave it half-trained
        raise
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in parameters:
            parameter.grad = None
    try:
        after = distance()
        if math.isfinite(after):  # else the training diverged: no statistics help
            settle_norms(model, guide, list(samples.batches(train, batch_size)))
            after = distance()
    except BaseException:
        model.load_state_dict(saved)
        raise
    kept = after < before
    if not kept:
        model.load_state_dict(saved)
    elapsed = time.perf_counter() - started
    return Recovery(before, after if kept else before, steps, elapsed, kept)


def check_settings(
    seconds: Any = 1.0, precision: Any = "no", augment: Any = "auto", batch_size: Any = 1
) -> None:
    """Raise `ValueError` for settings of `recover` that it cannot heed."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
        raise ValueError(f"seconds={seconds!r}: expected a positive number")
    if precision not in ("no", "bf16"):
        raise ValueError(f"precision={precision!r}: expected 'no' or 'bf16'")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}: expected a number of samples, 1 or more")
    augmentation(augment)


class _Samples:
    """Calibration inputs by sample, those of one shape joined; others never share a batch."""

    def __init__(self, held: list[Any]) -> None:
        alike: dict[Any, list[Any]] = {}
        counts: dict[Any, int] = {}
        for given in held:
            size = batch_size(given)
            inputs = _by_sample(given, size)
            alike.setdefault(_form(inputs), []).append(inputs)
            counts[_form(inputs)] = counts.get(_form(inputs), 0) + size
        self._joined = [_joined(parts) for parts in alike.values()]
        sizes = list(counts.values())
        self.count = sum(sizes)
        self._shape = torch.repeat_interleave(torch.tensor(sizes))
        self._place = torch.cat([torch.arange(size) for size in sizes])

    def split(self, share: float) -> tuple[Tensor, Tensor]:
        """Indices to train on and to hold out, interleaved."""
        every = max(2, round(1 / share))
        if self.count < every:
            raise CalibrationError(
                f"recover needs at least {every} calibration samples, got {self.count}"
            )
        index = torch.arange(self.count)
        return index[index % every != 0], index[index % every == 0]

    def batches(self, index: Tensor, size: int) -> Iterator[Any]:
        """The samples at `index` in batches of one shape each."""
        yield from map(self._take, self._parts(index, size))

    def endless(
        self, index: Tensor, size: int, generator: torch.Generator, least: int = 1
    ) -> Iterator[Any]:
        """Shuffled batches, epoch after epoch; of at least so many samples where there are any."""
        while True:
            shuffled = index[torch.randperm(len(index), generator=generator)]
            parts = list(self._parts(shuffled, size, whole=True))
            parts = [part for part in parts if len(part) >= least] or parts
            for i in torch.randperm(len(parts), generator=generator):
                yield self._take(parts[i])

    def _parts(self, index: Tensor, size: int, *, whole: bool = False) -> Iterator[Tensor]:
        """Indices of one shape each; `whole` leaves out short rests of what fills a batch."""
        for shape in range(len(self._joined)):
            parts = index[self._shape[index] == shape].split(size)
            # Batches of one or two would upset BatchNorm.
            short = whole and len(parts) > 1 and 2 * len(parts[-1]) < size
            yield from (part for part in (parts[:-1] if short else parts) if len(part))

    def _take(self, index: Tensor) -> Any:
        return _indexed(self._joined[self._shape[index[0]]], self._place[index])


@dataclass(frozen=True)
class _Shared:
    """What all samples of a batch share, such as a mask over positions."""

    value: Any


def _by_sample(inputs: Any, size: int) -> Any:
    """The inputs with all but tensors of one row per sample marked as shared."""
    if isinstance(inputs, Tensor):
        return inputs if inputs.dim() and len(inputs) == size else _Shared(inputs)
    if isinstance(inputs, Mapping):
        return {key: _by_sample(value, size) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(_by_sample(value, size) for value in inputs)
    return _Shared(inputs)


def _form(inputs: Any) -> Any:
    """What two batches must have in common to be joined."""
    if isinstance(inputs, Tensor):
        return inputs.shape[1:], inputs.dtype
    if isinstance(inputs, Mapping):
        return tuple((key, _form(value)) for key, value in inputs.items())
    if isinstance(inputs, tuple):
        return tuple(map(_form, inputs))
    value = inputs.value
    return measure.tensor_digest(value) if isinstance(value, Tensor) else repr(value)


def _joined(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, Mapping):
        return {key: _joined([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple):
        return tuple(_joined([part[i] for part in parts]) for i in range(len(first)))
    return first


def _indexed(inputs: Any, index: Tensor) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[index.to(inputs.device)]
    if isinstance(inputs, Mapping):
        return {key: _indexed(value, index) for key, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(_indexed(value, index) for value in inputs)
    return inputs.value


def _loss(layers: PairedOutputs, inputs: Any) -> Tensor:
    """Relative error² of the outputs, and of those of the layers the plan decomposed."""
    layers.forget()
    with torch.no_grad():
        wanted = run(layers.teacher, inputs)
    found = run(layers.model, inputs)
    total = _output_loss(wanted, found)
    errors = [_relative(old, new) for old, new in layers.pairs()]
    return total + FEATURES * torch.stack(errors).mean() if errors else total


def _relative(wanted: Tensor, found: Tensor) -> Tensor:
    if wanted.dtype.itemsize < 4:  # sums would lose all but the first digits, or overflow
        wanted, found = wanted.float(), found.float()
    masked = wanted.isinf()  # such as classes that are left out
    difference, size = (x.masked_fill(masked, 0) for x in (wanted - found, wanted))
    error: Tensor = difference.square().sum() / size.square().sum().clamp_min(1e-12)
    return error


def _output_loss(wanted: Any, found: Any) -> Tensor:
    """Relative error² of every floating-point tensor the models return."""
    old, new = (
        [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
        for output in (wanted, found)
    )
    if len(old) != len(new):  # such as more in train mode
        old, new = [compared(wanted)], [compared(found)]
    pairs = list(zip(old, new, strict=True))
    if not pairs:
        raise CalibrationError("the model's output holds no floating-point tensor to compare")
    if any(a.shape != b.shape for a, b in pairs):
        raise ModelError("teacher and model return outputs of different shapes")
    return torch.stack([_relative(a, b) for a, b in pairs]).mean()

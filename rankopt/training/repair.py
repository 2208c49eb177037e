"""recover(): label-free repair of a compressed model against its dense teacher."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from rankopt._build.apply import settle_norms
from rankopt._build.settle import COMPARED_SAMPLES
from rankopt._calibration.batchnorm import has_norms, input_sums
from rankopt._model import measure, surgery
from rankopt._model.inputs import (
    MAX_SAMPLES,
    affordable_samples,
    divergence,
    divergences,
    hold,
    main_output,
    run,
    shared_tensors,
)
from rankopt._model.inputs import (
    batch_size as size_of,
)
from rankopt._utils.arguments import check_choice, check_integer, is_number
from rankopt._utils.progress import progress_bar
from rankopt.errors import ModelError, warn
from rankopt.training.augmentation import Augment, augmentation
from rankopt.training.distillation import (
    check_trainable,
    decomposed,
    private_teacher,
    train_as_evaluated,
)
from rankopt.training.freezing import release
from rankopt.training.limit import REASONS, Limit, Stopped
from rankopt.training.paired_outputs import PairedOutputs
from rankopt.training.repair_loss import repair_loss
from rankopt.training.samples import Samples

__all__ = ["Recovery", "check_settings", "recover"]

# Share of the calibration inputs kept out of training, for an honest before and after.
HELD_OUT: Final = 1 / 16
# Share of the divergence by which it may rise at most, if that could be chance.
MOST_RISE: Final = 0.25
GRADIENT_NORM: Final = 1.0
# Without BatchNorm, and with it.
LEARNING_RATES: Final = (3e-4, 1e-3)
# What a step costs, in runs of the model: the teacher's, its own, and twice for the gradient.
STEP_PASSES: Final = 4
# Share of the time left that BatchNorm statistics may take.
SETTLING: Final = 0.25


@dataclass(frozen=True)
class Recovery:
    """What a repair achieved.

    Args:
        before: Divergence from the teacher on held-out inputs (see
            `rankopt._model.inputs.divergence`): KL for logits, else relative error².
        after: The same afterwards.
        steps: Optimiser steps taken.
        seconds: Wall-clock time.
        kept: Whether the repaired weights were kept; False if they were clearly worse: by more
            than a standard error of the difference, or by more than a quarter.
        stopped: Why the training ended: ``seconds`` or ``steps`` were used up, there was
            nothing to repair (``converged``), or the loss was ``not finite``.
    """

    before: float
    after: float
    steps: int
    seconds: float
    kept: bool
    stopped: Stopped

    def __str__(self) -> str:
        if not self.kept:
            verdict = ("; it came out worse, so" if self.steps else ";") + " the model is as it was"
        elif self.after < self.before:
            verdict = ""
        else:
            verdict = ", too little apart to tell; the repaired weights are kept"
        return (
            f"recovered for {self.seconds:.0f} s ({self.steps} steps, until "
            f"{REASONS[self.stopped]}): divergence from the teacher on held-out inputs "
            f"{self.before:.4g} before, {self.after:.4g} after{verdict}"
        )


@measure.outside_inference_mode
@measure.no_autocast()
def recover(
    model: nn.Module,
    *,
    teacher: nn.Module,
    calibration: Any,
    seconds: float | None = None,
    steps: int | None = None,
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
    outputs of the decomposed layers; Adam with a cosine schedule over the time or the
    steps given. A part of the inputs is held out, and the model is left as it was if it is
    clearly further from its teacher there: by more than a standard error of the difference, or
    by more than a quarter.

    Args:
        model: From `rankopt.apply`; its trainable parameters and BatchNorm
            statistics change.
        teacher: The dense model; not changed.
        calibration: Inputs; labels are left out. Batches may differ in shape, such as
            texts of several lengths: a step takes samples of one shape.
        seconds: Wall-clock limit of all, reading inputs and settling BatchNorm statistics
            included; these use fewer samples where the time would not do for all. How far
            training comes depends on the machine. None for no limit beside `steps`, and for 120
            seconds without `steps`.
        steps: Limit of optimiser steps. Without `seconds` no clock matters, and two runs with
            one `seed` on one machine give the same weights. With both, the first to be
            reached ends it.
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
        What was achieved, measured on the inputs held out, and why it ended.

    Raises:
        ValueError: A setting out of range.
        CalibrationError: Too few inputs, inputs a model fails on or for which the teacher's
            outputs are not finite, or outputs of another shape than the teacher's.
        ModelError: `model` or `teacher` is no module, nothing in the model trains, float16
            parameters do, or the model's output has no gradient.

    Warns:
        RankoptWarning: The time was up before the first step.

    Example:
        >>> dense = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
        >>> small = rankopt.apply(dense, rankopt.search(dense, "params<=60%"))
        >>> data = [torch.randn(64, 16) for _ in range(4)]
        >>> done = rankopt.recover(small, teacher=dense, calibration=data, steps=50)
        >>> done.steps, done.stopped
        (50, 'steps')
    """
    surgery.check_model(model)
    surgery.check_model(teacher, "teacher")
    check_settings(
        seconds=seconds,
        steps=steps,
        precision=precision,
        augment=augment,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
    )
    release(model)
    limit = Limit(seconds, steps)
    with measure.preserve_rng():
        held = hold(model, calibration, max_samples=calibration_samples)
    repair = _Repair(model, teacher, held, batch_size, limit)
    apart = repair.distances()
    before = float(apart.mean())
    if before == 0:
        return Recovery(before, before, 0, limit.elapsed, False, "converged")
    settling = repair.settled_in_time()
    try:
        taken, stopped = repair.train(
            LEARNING_RATES[has_norms(model)] if learning_rate is None else learning_rate,
            augmentation(augment),
            bf16=precision == "bf16",
            seed=seed,
            progress=progress,
        )
        kept, after = False, before
        if taken and stopped != "not finite":
            after = float(repair.distances().mean())
            if math.isfinite(after):  # else the training diverged: no statistics help
                repair.settle(settling)
                found = repair.distances()
                kept, after = not clearly_worse(apart, found), float(found.mean())
        elif stopped == "seconds":
            warn(
                f"recover took no step: after {limit.elapsed:.1f} s with {repair.samples.count} "
                f"inputs none fits into {limit.seconds:g} s beside what comes after it; the model "
                "is as it was: give more seconds, fewer calibration_samples or a smaller batch_size"
            )
        if not kept:
            repair.undo()
    except BaseException:  # Ctrl-C, no memory: never leave it half-trained
        repair.undo()
        raise
    return Recovery(before, after if kept else before, taken, limit.elapsed, kept, stopped)


def clearly_worse(before: Tensor, after: Tensor) -> bool:
    """Whether divergences of the same samples rose by more than the standard error of the mean.

    Few samples are held out, and a few of them hold most of the divergence. Training
    rarely does harm, so that what cannot be told apart is better kept; but a rise above
    `MOST_RISE` is none of these, even where a single sample makes it.
    """
    if not bool(after.isfinite().all()):
        return True
    if not bool(before.isfinite().all()):
        return False
    rise = after - before
    error = float(rise.std()) / math.sqrt(len(rise)) if len(rise) > 1 else 0.0
    return float(rise.mean()) > min(error, MOST_RISE * float(before.mean()))


def check_settings(
    seconds: Any = None,
    steps: Any = None,
    precision: Any = "no",
    augment: Any = "auto",
    batch_size: Any = 1,
    learning_rate: Any = None,
    seed: Any = 0,
) -> None:
    """Raise `ValueError` for settings of `recover` that it cannot heed."""
    for name, value in (("seconds", seconds), ("learning_rate", learning_rate)):
        if value is not None and not (is_number(value) and value > 0):
            raise ValueError(f"{name}={value!r}: expected a positive number")
    if steps is not None:
        check_integer("steps", steps, 1)
    check_choice("precision", precision, ("no", "bf16"))
    check_integer("batch_size", batch_size, 1)
    check_integer("seed", seed, 0)
    augmentation(augment)


class _Repair:
    """A model, its teacher, and the samples to train and to judge by.

    Args:
        model: Changed in place.
        teacher: Copied.
        held: Batches; some samples are held out.
        size: Samples per batch.
        limit: How long all of it may last.

    Raises:
        ModelError: Nothing to train.
        CalibrationError: Too few samples, or those a model fails on.
    """

    def __init__(
        self, model: nn.Module, teacher: nn.Module, held: list[Any], size: int, limit: Limit
    ) -> None:
        self.model, self.size, self.limit = model, size, limit
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ModelError(
                "recover has nothing to train: every parameter has requires_grad=False"
            )
        check_trainable(model, "recover")
        self.guide = private_teacher(teacher).to(surgery.device_of(model))
        self.samples = samples = Samples(held, shared_tensors(self.guide, held))
        self.train_index, test = samples.split(HELD_OUT)
        self.layers = PairedOutputs(model, self.guide, decomposed(model))
        tested = list(samples.batches(test, size))
        if len(test) > (most := affordable_samples(self.guide, tested)):
            tested = list(samples.batches(test[:: math.ceil(len(test) / most)], size))
        with torch.no_grad():
            self._tested = [(inputs, main_output(run(self.guide, inputs))) for inputs in tested]
        with torch.no_grad(), measure.evaluation(model):
            run(model, tested[0])  # a first run may take far longer than those that are timed
        self._judging = 0.0  # seconds that `distances` takes
        self._saved = copy.deepcopy(model.state_dict())  # extra state may be anything

    def distances(self) -> Tensor:
        """Divergences from the teacher on the held-out samples."""
        started = self.limit.elapsed
        with torch.no_grad(), measure.evaluation(self.model):
            found = [divergences(old, run(self.model, x)) for x, old in self._tested]
        self._judging = self.limit.elapsed - started
        return torch.cat(found)

    def undo(self) -> None:
        """The model as it was."""
        self.model.load_state_dict(self._saved)

    def settled_in_time(self) -> Tensor:
        """The samples to settle BatchNorm on in a part of the time left, which is reserved.

        Time to judge the outcome before and after is reserved too, by what `distances` took.

        Settling runs the teacher once and the model twice to collect statistics, and on a
        part of the samples the teacher once and the model three times to compare these.
        """
        limit = self.limit
        limit.reserve(2 * self._judging)
        if limit.seconds is None or not has_norms(self.model):
            return self.train_index
        batch = next(self.samples.batches(self.train_index, self.size))

        def seconds_per_sample(network: nn.Module) -> float:
            started = limit.elapsed
            for calls in input_sums(network, batch).values():
                calls[0].total.sum().item()  # waits for the device
            return (limit.elapsed - started) / size_of(batch)

        teacher, model = map(seconds_per_sample, (self.guide, self.model))

        def cost(count: int) -> float:
            comparing = min(count, COMPARED_SAMPLES) * (teacher + 3 * model)
            return count * (teacher + 2 * model) + comparing

        count = len(self.train_index)
        while count > self.size and cost(count) > SETTLING * limit.left:
            count //= 2
        limit.reserve(cost(count))
        return self.train_index[:: math.ceil(len(self.train_index) / count)]

    def settle(self, index: Tensor) -> None:
        """Refresh BatchNorm statistics by the samples at `index`."""
        settle_norms(self.model, self.guide, list(self.samples.batches(index, self.size)))

    def train(
        self,
        learning_rate: float,
        change: Augment,
        *,
        bf16: bool,
        seed: int,
        progress: bool | None,
    ) -> tuple[int, Stopped]:
        """Steps until the limit; how many, and why there are no more.

        Raises:
            CalibrationError: The teacher's outputs are not finite.
        """
        generator = torch.Generator().manual_seed(seed)
        least = 2 if has_norms(self.model) else 1  # a single value has no variance
        modes = [(module, module.training) for module in self.model.modules()]
        device, taken = surgery.device_of(self.model).type, 0
        tested = sum(size_of(inputs) for inputs, _ in self._tested)
        first = STEP_PASSES * self._judging * min(self.size, len(self.train_index)) / tested
        try:
            with measure.preserve_rng(), torch.enable_grad(), self.layers:
                torch.manual_seed(seed)
                train_as_evaluated(self.model)
                optimiser = torch.optim.Adam(self.parameters, lr=learning_rate)
                self.limit.begin_training(first)
                batches = self.samples.endless(self.train_index, self.size, generator, least)
                with progress_bar("recovering", self.limit.steps, enabled=progress) as advance:
                    while self.limit.allows(taken):
                        decay = 0.5 * (1 + math.cos(math.pi * self.limit.spent(taken)))
                        for group in optimiser.param_groups:
                            group["lr"] = learning_rate * decay
                        inputs = change(next(batches), generator)
                        with torch.autocast(device, torch.bfloat16, enabled=bf16):
                            loss = repair_loss(self.layers, inputs)
                        if not bool(loss.isfinite()):
                            self._check_teacher(inputs)
                            return taken, "not finite"
                        self._step(optimiser, loss)
                        taken += 1
                        advance(self.limit.note())
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter in self.parameters:
                parameter.grad = None
        return taken, "steps" if taken == self.limit.steps else "seconds"

    def _step(self, optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, GRADIENT_NORM)
        optimiser.step()

    def _check_teacher(self, inputs: Any) -> None:
        """Raise `CalibrationError` where it is the teacher's outputs that are not finite."""
        with torch.no_grad():
            wanted = run(self.guide, inputs)
            divergence(wanted, wanted)

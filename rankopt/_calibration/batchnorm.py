"""BatchNorm statistics from calibration inputs alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from rankopt._model import measure, surgery
from rankopt._model.inputs import MAX_SAMPLES, batches, run
from rankopt.errors import CalibrationError

__all__ = [
    "CallSums",
    "NonFiniteStatisticsError",
    "copy_statistics",
    "has_norms",
    "input_sums",
    "recalibrate",
    "settle_in_one_pass",
]

_NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# While a pass is under way, a norm has the statistics of about so many samples, the last ones:
# enough for batches of one, and so few that no batch counts more than another.
WINDOW: Final = 64
# A channel that varies by less than this share of eps is as good as constant.
NEGLIGIBLE: Final = 1e-4


class NonFiniteStatisticsError(CalibrationError):
    """What a norm takes in is not finite, or its statistics overflow the dtype it has."""


def recalibrate(
    model: nn.Module,
    data: Any,
    *,
    teacher: nn.Module | None = None,
    max_samples: int | None = MAX_SAMPLES,
) -> int:
    """Refresh the running statistics of BatchNorm layers from inputs alone, in place.

    Without a teacher they become the mean and variance of what each layer takes in,
    pooled over all samples. With one, they are set so that each channel
    leaves the layer with the mean and variance it has in the teacher: the
    statistics of a model equal to its teacher then stay as they are, where
    plain recalibration is known to do harm.

    It takes one pass, in which layers see what earlier ones give with new statistics.
    That is exact for one batch, and for the first layer with any number of them, where a
    layer is called once in a forward. With several batches later layers come close to what
    one pass for each layer would give: while they are measured, an earlier layer has the
    statistics of the batch at hand, or of the last 64 samples where batches are smaller;
    only at the end has it those of all samples.

    Args:
        model: Its BatchNorm layers are changed; dropout stays off.
        data: An iterable of inputs, as `calibration` of `rankopt.search`; read once.
        teacher: The dense model. Layers without one of the same name and width in it are
            left alone; it runs on each batch too.
        max_samples: Where to stop.

    Returns:
        The number of layers changed; 0 for a model without BatchNorm. A layer that takes in
        a single value, which has no variance, is left alone.

    Raises:
        CalibrationError: It is empty, no iterable of inputs, or gives a layer values that are
            not finite or statistics beyond the range of its dtype. The model is then as it was.
        ModelError: `model` or `teacher` is no module.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> recalibrate(net, [torch.randn(64, 4)])
        1
    """
    surgery.check_model(model)
    if teacher is not None:
        surgery.check_model(teacher, "teacher")
    if not has_norms(model):
        return 0
    read = (inputs for inputs, _ in batches(model, data, max_samples=max_samples))
    if teacher is None:
        return settle_in_one_pass(model, ((inputs, {}) for inputs in read))
    pairs = ((inputs, input_sums(teacher, inputs)) for inputs in read)
    return settle_in_one_pass(model, pairs, teacher)


def has_norms(model: nn.Module) -> bool:
    """Whether there is a BatchNorm layer with running statistics."""
    return bool(_norms_of(model))


def copy_statistics(source: nn.Module, target: nn.Module) -> None:
    """Give the BatchNorm layers of `target` the running statistics of those in `source`."""
    theirs = _norms_of(source)
    with torch.no_grad():
        for name, norm in _norms_of(target).items():
            norm.running_mean.copy_(theirs[name].running_mean)
            norm.running_var.copy_(theirs[name].running_var)


@dataclass(frozen=True)
class CallSums:
    """What one call of a norm took in.

    Args:
        samples: Length of the batch.
        count: Values of each channel.
        total: Their sums [channels], float64.
        squares: Sums of their squares [channels], float64.
    """

    samples: int
    count: int
    total: Tensor
    squares: Tensor

    @staticmethod
    def of(x: Tensor) -> CallSums:
        """Of an input [samples, channels, ...]."""
        # Squares in half precision would overflow; float64 squares cancel safely.
        rows = x.detach().transpose(0, 1).flatten(1).to(torch.float64)
        return CallSums(len(x), rows.shape[1], rows.sum(dim=1), rows.square().sum(dim=1))

    def __add__(self, other: CallSums) -> CallSums:
        return CallSums(
            self.samples + other.samples,
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
        )

    def __sub__(self, other: CallSums) -> CallSums:
        return CallSums(
            self.samples - other.samples,
            self.count - other.count,
            self.total - other.total,
            self.squares - other.squares,
        )

    def statistics(self) -> tuple[Tensor, Tensor]:
        """(mean, variance) of each channel."""
        mean = self.total / self.count
        return mean, (self.squares / self.count - mean.square()).clamp_min(0)


Calls = tuple[CallSums, CallSums | None]


def input_sums(model: nn.Module, inputs: Any) -> dict[str, list[CallSums]]:
    """What each BatchNorm layer takes in on one batch, call by call, in eval mode."""
    plain, found = surgery.unwrap(model), dict[str, list[CallSums]]()

    def note(name: str, x: Tensor) -> None:
        found.setdefault(name, []).append(CallSums.of(x))

    inputs = measure.to_device(inputs, surgery.device_of(plain))
    watching = _watched(_norms_of(plain), note)
    with torch.no_grad(), measure.preserve_rng(), measure.evaluation(plain), watching:
        run(plain, inputs)
    return found


def settle_in_one_pass(
    model: nn.Module,
    pairs: Iterable[tuple[Any, Mapping[str, list[CallSums]]]],
    teacher: nn.Module | None = None,
    without: Collection[str] = (),
) -> int:
    """`recalibrate` on batches that come with what the teacher's norms take in on them.

    Args:
        model: Its BatchNorm layers are changed.
        pairs: Inputs on the model's device, and the teacher's `input_sums` of them.
        teacher: Its norms and their statistics are read; it does not run.
        without: Names of norms to leave as they are.
    """
    plain = surgery.unwrap(model)
    norms = {name: norm for name, norm in _norms_of(plain).items() if name not in without}
    reference: Mapping[str, Any] = {}
    if teacher is not None:
        reference = _norms_of(surgery.unwrap(teacher))
        norms = {name: norm for name, norm in norms.items() if _alike(norm, reference.get(name))}
    if not norms:
        return 0
    found: dict[str, _Statistics] = {}  # in the order of calls
    saved = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms.values()]
    try:
        with torch.no_grad(), measure.preserve_rng(), measure.evaluation(plain):
            for inputs, expected in pairs:
                waiting = {name: deque(calls) for name, calls in expected.items()}

                def meet(name: str, x: Tensor, waiting: Any = waiting) -> None:
                    if name not in found:
                        found[name] = _Statistics(name, norms[name], reference.get(name))
                    theirs = waiting.get(name)
                    found[name].add(CallSums.of(x), theirs.popleft() if theirs else None)

                with _watched(norms, meet):
                    run(plain, inputs)
            return sum(statistics.settle() for statistics in found.values())
    except BaseException:
        with torch.no_grad():
            for norm, (mean, variance) in zip(norms.values(), saved, strict=True):
                norm.running_mean.copy_(mean)
                norm.running_var.copy_(variance)
        raise


class _Statistics:
    """The running statistics of one norm, while batches pass through it."""

    def __init__(self, name: str, norm: Any, reference: Any | None) -> None:
        self._name, self._norm, self._reference = name, norm, reference
        self._pooled: Calls | None = None
        self._recent: deque[Calls] = deque()
        self._window: Calls | None = None  # the sum of these

    def add(self, mine: CallSums, theirs: CallSums | None) -> None:
        """Take in a call, and give the norm the statistics of the last samples."""
        if self._reference is not None and theirs is None:
            return  # the teacher's norm was called less often
        call = (mine, theirs)
        self._pooled = call if self._pooled is None else _joined(self._pooled, call)
        self._recent.append(call)
        window = call if self._window is None else _joined(self._window, call)
        while window[0].samples - self._recent[0][0].samples >= WINDOW:
            window = _parted(window, self._recent.popleft())
        self._window = window
        self._write(*window)

    def settle(self) -> bool:
        """Give the norm the statistics of all samples; whether it has any."""
        return self._pooled is not None and self._write(*self._pooled, last=True)

    def _write(self, mine: CallSums, theirs: CallSums | None, *, last: bool = False) -> bool:
        if mine.count < 2 or (theirs is not None and theirs.count < 2):
            return False  # a single value has no variance
        norm = self._norm
        mean, variance = mine.statistics()
        if theirs is not None:
            mean, variance = _matched(norm, mean, variance, self._reference, *theirs.statistics())
        if last:
            self._check(mean, variance)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        return True

    def _check(self, mean: Tensor, variance: Tensor) -> None:
        where = f"norm {self._name}"
        if not bool(mean.isfinite().all() and variance.isfinite().all()):
            raise NonFiniteStatisticsError(
                f"{where}: what it takes in on the calibration inputs is not finite; check them "
                "for NaN, and a model in half precision for overflow"
            )
        for key, values in (("running_mean", mean), ("running_var", variance)):
            dtype = getattr(self._norm, key).dtype
            most, largest = torch.finfo(dtype).max, float(values.abs().max())
            if largest > most:
                raise NonFiniteStatisticsError(
                    f"{where}: its {key} would be {largest:.4g}, beyond the {most:.4g} of {dtype}; "
                    "keep this norm in float32, or the model in bfloat16"
                )


def _matched(
    norm: Any, mean: Tensor, variance: Tensor, theirs: Any, their_mean: Tensor, their_var: Tensor
) -> tuple[Tensor, Tensor]:
    """Running statistics with which channels leave `norm` as they leave the teacher's.

    A channel leaves with mean (m - running_mean) / σ and variance v / σ², where
    σ² = running_var + eps.
    """
    least = NEGLIGIBLE * theirs.eps  # the ratio of two constants says nothing
    their_sigma2 = theirs.running_var.to(mean) + theirs.eps
    ratio = variance.clamp_min(least) / their_var.to(mean).clamp_min(least)
    running_var = (their_sigma2 * ratio - norm.eps).clamp_min(0)
    scale = ((running_var + norm.eps) / their_sigma2).sqrt()
    return mean - (their_mean.to(mean) - theirs.running_mean.to(mean)) * scale, running_var


def _joined(a: Calls, b: Calls) -> Calls:
    theirs = None if a[1] is None or b[1] is None else a[1] + b[1]
    return a[0] + b[0], theirs


def _parted(whole: Calls, part: Calls) -> Calls:
    theirs = None if whole[1] is None or part[1] is None else whole[1] - part[1]
    return whole[0] - part[0], theirs


def _alike(norm: Any, other: Any | None) -> bool:
    return other is not None and norm.running_mean.shape == other.running_mean.shape


def _norms_of(model: nn.Module) -> dict[str, Any]:
    """Names and norms with running statistics, one that stands in several places once."""
    found: dict[Any, str] = {}
    for name, module in surgery.named_modules(model):
        if isinstance(module, _NORMS) and module.running_mean is not None:
            found.setdefault(module, name)
    return {name: norm for norm, name in found.items()}


@contextmanager
def _watched(norms: Mapping[str, Any], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``see(name, input)`` before each call of a norm."""

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            see(name, measure.first_argument(args, kwargs))

        return hook

    handles = [
        norm.register_forward_pre_hook(watch(name), with_kwargs=True)
        for name, norm in norms.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""Timing callables side by side so that a noisy machine cannot fool the reader.

Candidates run interleaved in rounds of random order; each round gives one
paired ratio to the baseline, and the median ratio comes with a bootstrap interval.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rankopt._model import measure, surgery
from rankopt._model.inputs import tensors_in

__all__ = [
    "MODES",
    "Clock",
    "Interval",
    "Measured",
    "Mode",
    "Timings",
    "process_ms",
    "runner",
    "time_interleaved",
]

Array = npt.NDArray[np.float64]
# Runs a function and returns the milliseconds it took.
Clock: TypeAlias = Callable[[Callable[[], Any]], float]
Mode = Literal["inference", "training"]
MODES: Final[tuple[str, ...]] = get_args(Mode)

CONFIDENCE: Final = 0.95
BOOTSTRAP_SAMPLES: Final = 2000
# Warm-up ends when three calls in a row agree this well, or after this many.
STABLE_SPREAD: Final = 0.10
MAX_WARMUP_CALLS: Final = 20
# An interval wider than this share of its median decides nothing.
NOISY_WIDTH: Final = 0.10
MAX_REPEATS: Final = 100
_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Interval:
    """A median with the ends of its 95% bootstrap interval."""

    median: float
    low: float
    high: float

    @property
    def noisy(self) -> bool:
        """Whether the interval is too wide to be of use."""
        return self.high - self.low > NOISY_WIDTH * self.median

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"

    @classmethod
    def of(cls, values: Array, seed: int = 0) -> Interval:
        """The median of `values` and its bootstrap interval."""
        generator = np.random.default_rng(seed)
        draws = generator.choice(values, size=(BOOTSTRAP_SAMPLES, len(values)))
        tail = 100 * (1 - CONFIDENCE) / 2
        low, high = np.percentile(np.median(draws, axis=1), [tail, 100 - tail])
        return cls(float(np.median(values)), float(low), float(high))


@dataclass(frozen=True)
class Timings:
    """Raw milliseconds of interleaved rounds.

    Args:
        latency_ms: Candidate to one time per round, rounds aligned.
        seed: For the bootstrap.
        calls: How often candidates ran in all, warm-up and repeats included.
    """

    latency_ms: Mapping[str, Array]
    seed: int = 0
    calls: int = 0

    def interval(self, name: str) -> Interval:
        """Median milliseconds of one candidate."""
        return Interval.of(self.latency_ms[name], self.seed)

    def ratio(self, name: str, baseline: str) -> Interval:
        """Median of the paired ratios time(name) / time(baseline); below 1 is faster."""
        return Interval.of(self.latency_ms[name] / self.latency_ms[baseline], self.seed)

    def __add__(self, other: Timings) -> Timings:
        joined = {
            name: np.concatenate([times, other.latency_ms[name]])
            for name, times in self.latency_ms.items()
        }
        return Timings(joined, self.seed, self.calls + other.calls)


@dataclass(frozen=True)
class Measured:
    """The measured time of a whole model.

    Args:
        ratio: Paired ratio to the dense model's time; below 1 is faster.
        latency_ms: Milliseconds.
        dense_ms: Milliseconds of the dense model in the same rounds.
    """

    ratio: Interval
    latency_ms: Interval
    dense_ms: Interval


def time_interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 30,
    device: torch.device | str = "cpu",
    seed: int = 0,
    clock: Clock | None = None,
    min_ms: float = 0.0,
    max_warmup: int = MAX_WARMUP_CALLS,
) -> Timings:
    """Time every candidate once per round, in random order.

    Args:
        candidates: Name to a function without arguments.
        rounds: Number of rounds after the warm-up, at least 3.
        device: Where the work happens; CUDA work is timed with events.
        seed: Orders the rounds.
        clock: Takes the place of the wall clock or the events.
        min_ms: A shorter candidate is repeated within one timing until it lasts
            about this long (at most 100 times), and the mean is taken.
        max_warmup: Calls after which a candidate counts as warm, steady or not.

    Raises:
        ValueError: Fewer than 3 rounds, or nothing to time.
    """
    if rounds < 3 or not candidates:
        raise ValueError(f"rounds={rounds}: expected at least 3, and at least one candidate")
    chosen = clock or _clock_of(torch.device(device))
    calls = 0
    repeats: dict[str, int] = {}
    order, shuffle = list(candidates), random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    with measure.current_device(device):
        for name, function in candidates.items():
            warm = _warm_up(function, chosen, max_warmup)
            wanted = math.ceil(min_ms / max(min(warm), 1e-6))
            repeats[name] = min(MAX_REPEATS, max(1, wanted))
            calls += len(warm) + rounds * repeats[name]
        for _ in range(rounds):
            shuffle.shuffle(order)
            for name in order:
                repeated = _repeated(candidates[name], repeats[name])
                times[name].append(chosen(repeated) / repeats[name])
    return Timings({name: np.asarray(values) for name, values in times.items()}, seed, calls)


def runner(
    module: nn.Module,
    inputs: Any,
    *,
    mode: Mode = "inference",
    cuda_graph: bool = False,
    compile: bool = False,
) -> Callable[[], Any]:
    """A function that runs `module` once on `inputs`, to be timed.

    Args:
        module: In the mode (train or eval) it is to be timed in.
        inputs: A tensor, a tuple or a mapping.
        mode: ``inference`` without gradients, or ``training``: forward, and backward
            to the parameters and to floating-point inputs; no ``grad`` is left behind.
        cuda_graph: Whether to capture one inference call and replay it (CUDA only).
        compile: Whether to run it under `torch.compile`, for these shapes; the first call
            compiles.

    Raises:
        ValueError: An unknown mode, or a graph that cannot be captured.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
    forward = _compiled(module) if compile else module

    def infer() -> None:
        with torch.no_grad():
            measure.call(forward, inputs, copy=False)

    if mode == "inference":
        return _graphed(infer, surgery.device_of(module)) if cuda_graph else infer
    if cuda_graph:
        raise ValueError("cuda_graph=True replays inference; it has no mode='training'")
    wanted: list[Tensor] = [
        parameter for parameter in module.parameters() if parameter.requires_grad
    ]
    leaves = _with_gradients(inputs)
    wanted += [leaf for leaf in tensors_in(leaves) if leaf.requires_grad]

    def step() -> None:
        with torch.enable_grad():
            found = measure.call(forward, leaves, copy=False)
            outputs = [x for x in tensors_in(found) if x.requires_grad]
            ones = [torch.ones_like(output) for output in outputs]
            torch.autograd.grad(outputs, wanted, ones, allow_unused=True)

    return step


def _compiled(module: nn.Module) -> Callable[..., Any]:
    """`module` under `torch.compile`, with a compilation cache of its own.

    Dynamo keeps what it compiled on the code object. Modules of one class would share one:
    lookups slower with each, and silently eager beyond ``recompile_limit`` of them.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    code = forward.__code__.replace(co_name=f"forward_{next(_NUMBERS)}")
    own = FunctionType(code, forward.__globals__, code.co_name, None, forward.__closure__)
    return torch.compile(own, dynamic=False)


def _graphed(function: Callable[[], None], device: torch.device) -> Callable[[], Any]:
    if device.type != "cuda":  # where nothing would be captured, and replayed in no time
        raise ValueError(f"cuda_graph=True needs a CUDA device; what is timed is on {device}")
    with measure.current_device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # lazy initialisation must not be captured
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
    return partial(_replay, graph, function)


def _replay(graph: Any, captured: Callable[[], None]) -> None:
    """Replay a graph, which reads weights that live as long as what was captured is held."""
    graph.replay()


def _with_gradients(inputs: Any) -> Any:
    """`inputs` with floating-point tensors replaced by leaves that want gradients."""
    if isinstance(inputs, Tensor):
        return inputs.detach().requires_grad_(True) if inputs.is_floating_point() else inputs
    if isinstance(inputs, Mapping):
        return {key: _with_gradients(value) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return [_with_gradients(value) for value in inputs]
    return inputs


def _warm_up(function: Callable[[], Any], clock: Clock, most: int) -> list[float]:
    """Times of the warm-up calls, which end once three in a row agree."""
    times: list[float] = []
    while len(times) < most:
        times.append(clock(function))
        recent = times[-3:]
        if len(recent) == 3 and max(recent) - min(recent) <= STABLE_SPREAD * min(recent):
            break
    return times


def _repeated(function: Callable[[], Any], times: int) -> Callable[[], Any]:
    if times == 1:
        return function

    def repeat() -> None:
        for _ in range(times):
            function()

    return repeat


def process_ms(function: Callable[[], Any]) -> float:
    """A clock of this process's CPU time: milliseconds, without those others had the core.

    On a machine shared with other work the wall clock counts the turns of others, which
    long runs meet and short ones slip past, so that ratios of the two mislead.

    Raises:
        ValueError: More than one thread, whose CPU times add up to no latency.
    """
    if torch.get_num_threads() != 1:
        raise ValueError(
            f"CPU time is a latency on one thread only, torch has {torch.get_num_threads()}: "
            "call torch.set_num_threads(1), or use the wall clock"
        )
    started = time.process_time()
    function()
    return 1000 * (time.process_time() - started)


def _wall_ms(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - started)


def _clock_of(device: torch.device) -> Clock:
    if device.type in ("cpu", "cuda"):
        return _cuda_ms if device.type == "cuda" else _wall_ms
    return partial(_accelerator_ms, device)


def _accelerator_ms(device: torch.device, function: Callable[[], Any]) -> float:
    """Wall-clock time of a device that works behind the caller's back, MPS or XPU."""
    torch.accelerator.synchronize(device)

    def finished() -> None:
        function()
        torch.accelerator.synchronize(device)

    return _wall_ms(finished)


def _cuda_ms(function: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))

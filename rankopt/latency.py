"""Timing callables side by side so that a noisy machine cannot fool the reader.

Candidates run interleaved in rounds of random order; each round gives one
paired ratio to the baseline, and the median ratio comes with a bootstrap interval.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Interval", "Timings", "time_interleaved"]

CONFIDENCE: Final = 0.95
BOOTSTRAP_SAMPLES: Final = 2000
# Warm-up ends when three calls in a row agree this well, or after this many.
STABLE_SPREAD: Final = 0.10
MAX_WARMUP_CALLS: Final = 20
# An interval wider than this share of its median decides nothing.
NOISY_WIDTH: Final = 0.10


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


@dataclass(frozen=True)
class Timings:
    """Raw milliseconds of interleaved rounds.

    Args:
        latency_ms: Candidate to one time per round, rounds aligned.
        seed: For the bootstrap.
    """

    latency_ms: Mapping[str, npt.NDArray[np.float64]]
    seed: int = 0

    def interval(self, name: str) -> Interval:
        """Median milliseconds of one candidate."""
        return _bootstrap(self.latency_ms[name], self.seed)

    def ratio(self, name: str, baseline: str) -> Interval:
        """Median of the paired ratios time(name) / time(baseline); below 1 is faster."""
        return _bootstrap(self.latency_ms[name] / self.latency_ms[baseline], self.seed)


def time_interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 30,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Timings:
    """Time every candidate once per round, in random order.

    Args:
        candidates: Name to a function without arguments.
        rounds: Number of rounds after the warm-up, at least 3.
        device: Where the work happens; CUDA work is timed with events.
        seed: Orders the rounds.

    Raises:
        ValueError: Fewer than 3 rounds, or nothing to time.
    """
    if rounds < 3 or not candidates:
        raise ValueError(f"rounds={rounds}: expected at least 3, and at least one candidate")
    clock = _cuda_ms if torch.device(device).type == "cuda" else _wall_ms
    for function in candidates.values():
        _warm_up(function, clock)
    order, shuffle = list(candidates), random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            times[name].append(clock(candidates[name]))
    return Timings({name: np.asarray(values) for name, values in times.items()}, seed)


def _warm_up(function: Callable[[], Any], clock: Callable[[Callable[[], Any]], float]) -> None:
    recent: list[float] = []
    for _ in range(MAX_WARMUP_CALLS):
        recent = [*recent[-2:], clock(function)]
        if len(recent) == 3 and max(recent) - min(recent) <= STABLE_SPREAD * min(recent):
            return


def _wall_ms(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - started)


def _cuda_ms(function: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _bootstrap(values: npt.NDArray[np.float64], seed: int) -> Interval:
    generator = np.random.default_rng(seed)
    draws = generator.choice(values, size=(BOOTSTRAP_SAMPLES, len(values)))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.median(draws, axis=1), [tail, 100 - tail])
    return Interval(float(np.median(values)), float(low), float(high))

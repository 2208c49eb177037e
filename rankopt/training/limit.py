"""When `rankopt.recover` ends, and why."""

from __future__ import annotations

import math
import time
from typing import Final, Literal

__all__ = ["REASONS", "Limit", "Stopped"]

SECONDS: Final = 120.0
# Share of a time limit that is planned with.
PLANNED: Final = 0.95

Stopped = Literal["seconds", "steps", "converged", "not finite"]
REASONS: Final[dict[Stopped, str]] = {
    "seconds": "the time was up",
    "steps": "all steps were taken",
    "converged": "there was nothing to repair",
    "not finite": "the loss was not finite: lower learning_rate",
}


class Limit:
    """How long a repair may last: so many seconds from now, so many steps, or either.

    Args:
        seconds: None for any number, beside `steps`; for `SECONDS` without.
        steps: None for any number.
    """

    def __init__(self, seconds: float | None, steps: int | None) -> None:
        self.seconds = SECONDS if seconds is None and steps is None else seconds
        self.steps = steps
        self._started = time.perf_counter()
        self._reserved = 0.0
        # Of training: when it began, how long it may take, and its first step.
        self._training = (0.0, math.inf, 0.0)

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._started

    @property
    def left(self) -> float:
        """Seconds that may still be planned with."""
        if self.seconds is None:
            return math.inf
        return PLANNED * self.seconds - self.elapsed - self._reserved

    def reserve(self, seconds: float) -> None:
        """Keep some of what is left for what comes after training."""
        self._reserved += seconds

    def begin_training(self, step: float) -> None:
        """From now on, training spends what is left; a step takes about so many seconds."""
        self._training = (self.elapsed, self.left, step)

    def allows(self, steps: int) -> bool:
        """Whether one more fits, after so many steps."""
        if self.steps is not None and steps >= self.steps:
            return False
        if self.seconds is None:
            return True
        begun, limit, step = self._training
        spent = self.elapsed - begun
        return spent + (spent / steps if steps else step) <= limit

    def spent(self, steps: int) -> float:
        """Share of what training may take, from 0 to 1."""
        begun, limit, _ = self._training
        by_steps = 0.0 if self.steps is None else steps / self.steps
        by_time = 0.0 if self.seconds is None else (self.elapsed - begun) / limit
        return min(max(by_steps, by_time), 1.0)

    def note(self) -> str | None:
        """For the progress bar, which counts steps by itself."""
        return None if self.seconds is None else f"{self.elapsed:.0f} of {self.seconds:.0f} s"

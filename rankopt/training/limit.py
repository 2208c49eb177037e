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
        self._training = (0.0, math.inf)  # when it began, and how long it may take

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

    def begin_training(self) -> None:
        """From now on, training spends what is left."""
        self._training = (self.elapsed, self.left)

    def spent(self, steps: int) -> float:
        """Share of what training may take, from 0; 1 or more at the end."""
        shares = [0.0]
        if self.steps is not None:
            shares.append(steps / self.steps)
        if self.seconds is not None:
            begun, limit = self._training
            shares.append((self.elapsed - begun) / limit if limit > 0 else 1.0)
        return max(shares)

    def note(self) -> str | None:
        """For the progress bar, which counts steps by itself."""
        return None if self.seconds is None else f"{self.elapsed:.0f} of {self.seconds:.0f} s"

"""Saying so where measured times vary too much to decide by."""

from __future__ import annotations

from collections.abc import Sequence

from rankopt._timing.latency import Interval
from rankopt.errors import warn

__all__ = ["warn_of_noise"]


def warn_of_noise(ratios: Sequence[Interval], *, what: str, again: str = "search again") -> None:
    """Warn if any interval is too wide to be of use, and show the widest.

    Args:
        ratios: Shares of the dense time that something was decided by.
        what: The times, and their verb: "the time of the whole model varies".
        again: What to do on a calmer machine.

    Warns:
        RankoptWarning: At least one interval is noisy.
    """
    noisy = [ratio for ratio in ratios if ratio.noisy]
    if not noisy:
        return
    widest = max(noisy, key=lambda ratio: (ratio.high - ratio.low) / ratio.median)
    warn(
        f"{what} too much to decide: {widest} of dense; the machine is busy, throttled or not "
        f"warm; close other programs and {again}"
    )

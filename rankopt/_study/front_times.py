"""Timing the whole models of a study's front."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from rankopt._study.front import Front, Seen, timed, timed_key, timing_of
from rankopt._timing.latency import Interval, Measured
from rankopt._utils.progress import progress_bar
from rankopt.strategy import LATENCY

if TYPE_CHECKING:
    import optuna

__all__ = ["time_front"]

UNCHANGED: Final = Interval(1.0, 1.0, 1.0)


def time_front(
    study: optuna.Study,
    front: Front,
    measure: Callable[[Any], Measured],
    *,
    renew: bool,
    progress: bool | None,
) -> list[Interval]:
    """Time the models of a front that were not timed, and write down what they took.

    Args:
        study: Keeps the times.
        front: As predicted, without measured times.
        measure: Times the model of a trial's rows.
        renew: Whether to time those again whose time varied too much.
        progress: Whether to show a progress bar.

    Returns:
        The shares of the dense time that were measured now.
    """
    known = {trial: Interval(*timing["ratio"]) for trial, timing in timed(study).items()}
    wanted = [
        point
        for point in front.pareto()
        if point.trial not in known or (renew and known[point.trial].noisy)
    ]
    found = []
    with progress_bar("timing the front", len(wanted), enabled=progress) as advance:
        for point in wanted:
            took = _timed(measure, point, front.dense[LATENCY])
            study.set_user_attr(timed_key(point.trial), timing_of(took))
            found.append(took.ratio)
            advance()
    return found


def _timed(measure: Callable[[Any], Measured], point: Seen, dense_ms: float) -> Measured:
    rows = point.record["rows"]
    if any(rows):
        return measure(rows)
    same = Interval(dense_ms, dense_ms, dense_ms)  # the dense model takes its own time
    return Measured(UNCHANGED, same, same)

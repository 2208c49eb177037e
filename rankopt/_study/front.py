"""The points of a study: which are on the front, and which is best within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from rankopt._search.metric_drop import lost
from rankopt._study.reading import record_of
from rankopt._study.records import Point, to_plan
from rankopt._timing.latency import Measured
from rankopt.budget import RATIO_AXES, Budget
from rankopt.errors import BudgetInfeasible, StudyError
from rankopt.plan import RankPlan
from rankopt.strategy import LATENCY

if TYPE_CHECKING:
    import optuna

__all__ = ["Front", "Seen", "timed", "timed_key", "timing_of"]

_TIMED: Final = "rankopt.timed:"


def timed_key(trial: int) -> str:
    """Where a study keeps the measured time of a trial's model."""
    return f"{_TIMED}{trial}"


def timing_of(measured: Measured) -> dict[str, Any]:
    """A measured time as JSON; the intervals are (median, low, high)."""
    return {
        name: [value.median, value.low, value.high]
        for name in ("ratio", "latency_ms", "dense_ms")
        for value in [getattr(measured, name)]
    }


def timed(study: optuna.Study) -> dict[int, Mapping[str, Any]]:
    """Trial to what `timing_of` wrote, for every model that was timed as a whole."""
    return {
        int(key.removeprefix(_TIMED)): value
        for key, value in study.user_attrs.items()
        if key.startswith(_TIMED)
    }


@dataclass(frozen=True)
class Seen:
    """A completed trial whose plan is not built yet.

    Args:
        trial: Its number.
        metric: What `evaluate` gave.
        figures: Axis to figure; the time is the measured one where there is one.
        upper: The same; of a measured time the upper end of its interval.
        record: What the trial wrote down.
        timing: The measured time, as `timing_of` gives it.
    """

    trial: int
    metric: float
    figures: Mapping[str, float]
    upper: Mapping[str, float]
    record: Mapping[str, Any]
    timing: Mapping[str, Any] | None = None

    @property
    def warm(self) -> str | None:
        """The strategy whose plan this is."""
        return self.record.get("warm")

    def plan(self, request: Mapping[str, Any]) -> RankPlan:
        """The plan, with the time as measured."""
        plan = to_plan(request, self.record, self.trial, self.metric)
        if self.timing is None:
            return plan
        ratio, low, high = self.timing["ratio"]
        entry = {**plan.totals[LATENCY], "measured": self.figures[LATENCY]}
        facts = {"ratio": ratio, "low": low, "high": high}
        return replace(
            plan,
            totals={**plan.totals, LATENCY: entry},
            extensions={**plan.extensions, LATENCY: facts},
        )

    def point(self, request: Mapping[str, Any]) -> Point:
        """The point as users see it."""
        plan = self.plan(request)
        return Point(self.trial, self.metric, dict(self.figures), plan, self.warm)


class Front:
    """The completed trials of a study, once its whole models have been timed only those.

    Args:
        request: What the study was made for.
        trials: Its completed trials.
        times: As of `timed`; empty for the figures that trials predicted.
    """

    def __init__(
        self,
        request: Mapping[str, Any],
        trials: Sequence[optuna.trial.FrozenTrial],
        times: Mapping[int, Mapping[str, Any]],
    ) -> None:
        totals = request["plan"]["totals"]
        self.dense = {axis: float(entry["before"]) for axis, entry in totals.items()}
        self.axis: str = request["objective"]
        self.maximise: bool = request["direction"] == "maximize"
        self.every = [self._seen(t, times.get(t.number)) for t in trials if t.values is not None]
        self.points = [point for point in self.every if point.timing] or self.every

    def _seen(self, trial: optuna.trial.FrozenTrial, timing: Mapping[str, Any] | None) -> Seen:
        record = record_of(trial)
        figures: dict[str, float] = dict(record["figures"])
        upper = dict(figures)
        if timing is not None:
            ratio, _, high = timing["ratio"]
            figures[LATENCY] = ratio * self.dense[LATENCY]
            upper[LATENCY] = high * self.dense[LATENCY]
        return Seen(trial.number, trial.values[0], figures, upper, record, timing)

    def share(self, point: Seen) -> float:
        """Of the dense model's figure."""
        return point.figures[self.axis] / self.dense[self.axis]

    def pareto(self, points: Sequence[Seen] | None = None) -> list[Seen]:
        """Those that no other beats in both figure and metric, the smallest first."""
        sign = -1 if self.maximise else 1
        chosen = self.points if points is None else points
        front: list[Seen] = []
        for point in sorted(chosen, key=lambda p: (p.figures[self.axis], sign * p.metric)):
            if not front or sign * point.metric < sign * front[-1].metric:
                front.append(point)
        return front

    def fitting(self, budget: Budget | None) -> list[Seen]:
        """Those within the shares of a budget, of measured times with their upper end."""
        if budget is None:
            return self.points
        most_ms = budget.latency_ms
        return [
            point
            for point in self.points
            if budget.fits(point.upper, self.dense)
            and (most_ms is None or point.upper[LATENCY] <= most_ms)
        ]

    def best_of(self, points: Sequence[Seen]) -> Seen:
        """The best metric, of equals the smallest."""
        sign = -1 if self.maximise else 1
        return min(points, key=lambda p: (sign * p.metric, p.figures[self.axis]))

    @property
    def dense_metric(self) -> float | None:
        """The metric of the model as it is; None until that trial has run."""
        return next((point.metric for point in self.every if point.warm == "dense"), None)

    def best(self, budget: Budget | None) -> Seen:
        """The best metric within a budget; under ``metric_drop`` the smallest that keeps it.

        Raises:
            BudgetInfeasible: None is within it.
            StudyError: It bounds what the study does not know.
        """
        self._check(budget)
        points = self.fitting(budget)
        if budget is not None and budget.metric_drop is not None:
            points = self._within_drop(points, budget)
        elif points:
            return self.best_of(points)
        if points:
            axis = budget.minimize if budget is not None and budget.minimize else self.axis
            return min(points, key=lambda p: p.figures[axis])
        assert budget is not None
        axes = [axis for axis in budget.axes if axis in RATIO_AXES]
        axes += [LATENCY] if budget.latency_ms is not None and LATENCY not in axes else []
        least = {a: min(p.upper[a] for p in self.points) / self.dense[a] for a in axes}
        seen = ", ".join(f"{axis} {share:.1%}" for axis, share in least.items()) or "–"
        raise BudgetInfeasible(
            f"{budget.explain()}: none of {len(self.points)} trials meets it (smallest: {seen}); "
            "run more trials, or loosen the budget",
            least,
        )

    def lead(self, point: Seen, budget: Budget | None) -> dict[str, Any] | None:
        """How far a sampled point is above the best queued plan within the budget.

        Returns:
            Trial and name of that plan, the gain (positive is better) and its standard error, from
            the batches both were evaluated on; None for a queued plan, or where none fits.
        """
        queued = [other for other in self.fitting(budget) if other.warm is not None]
        if point.warm is not None or not queued:
            return None
        other = self.best_of(queued)
        sign = 1 if self.maximise else -1
        error = _paired_error(point.record.get("batches", ()), other.record.get("batches", ()))
        return {
            "over": other.warm,
            "trial": other.trial,
            "gain": sign * (point.metric - other.metric),
            "standard_error": error,
        }

    def _check(self, budget: Budget | None) -> None:
        known = {*self.dense, "metric_drop"} | ({"latency_ms"} if LATENCY in self.dense else set())
        unknown = [axis for axis in (budget.axes if budget else ()) if axis not in known]
        if unknown:
            raise StudyError(
                f"the study knows {', '.join(self.dense)} of its plans, not {', '.join(unknown)}"
            )
        sense = "maximize" if self.maximise else "minimize"
        if budget is not None and budget.metric_drop is not None and budget.direction != sense:
            raise StudyError(
                f"the budget's metric is to {budget.direction}, the study's to {sense}: add "
                f"direction={sense} to the budget"
            )
        if budget is not None and (budget.minimize or self.axis) not in self.dense:
            raise StudyError(f"minimize={budget.minimize}: the study knows {', '.join(self.dense)}")

    def _within_drop(self, points: Sequence[Seen], budget: Budget) -> list[Seen]:
        dense = self.dense_metric
        if dense is None:
            raise StudyError("metric_drop needs the dense model's metric, whose trial has not run")
        drop = budget.metric_drop or 0.0
        return [point for point in points if lost(budget, dense, point.metric) <= drop]


def _paired_error(ours: Sequence[Any], theirs: Sequence[Any]) -> float | None:
    """Standard error of the difference of two weighted means over the same batches."""
    if len(ours) != len(theirs) or len(ours) < 2:
        return None
    differences, weights = np.array(
        [(a - b, w) for (a, w), (b, _) in zip(ours, theirs, strict=True)]
    ).T
    shares = weights / weights.sum()
    away = shares * (differences - shares @ differences)
    return float(np.sqrt(len(ours) / (len(ours) - 1) * (away @ away)))

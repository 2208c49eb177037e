"""Budgets on time: solve on layer times, measure the whole model, correct, solve again.

Times of layers do not add up to the time of a model. So the plan that layer times
suggest is built and measured against the dense model, the share of the predicted saving
that came true corrects the target, and the strategy chooses again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

from torch import nn

from rankopt import measure, surgery
from rankopt._apply import build_random
from rankopt.budget import Budget
from rankopt.errors import BudgetInfeasible, ModelError, RankoptWarning
from rankopt.latency import Measured, Timings
from rankopt.plan import RankPlan
from rankopt.probe import Probe
from rankopt.profile_table import ProfileTable
from rankopt.site_times import SiteTimes
from rankopt.strategy import LATENCY, Option, Problem, Strategy, decide

__all__ = ["ModelClock", "adopt_times", "bounds_latency", "price_time", "solve"]

MAX_ROUNDS: Final = 6
# Aim this far below the budget, so that the next measurement still meets it.
AIM: Final = 0.99
# A plan that meets the budget and leaves less than this unused, or less than the noise of
# its own measurement, is good enough.
SLACK: Final = 0.01
# Bounds on the share of a predicted saving that is believed to come true.
MIN_REALISED, MAX_REALISED = 0.05, 2.0
CLOSE: Final = 0.003
# More rounds are timed, this often at most, while an interval is wider than this share.
MAX_EXTENSIONS: Final = 5
WIDTH: Final = 0.03


class ModelClock:
    """Times plans of one model, built with random factors, against the dense model.

    Args:
        model: Not changed; a copy is timed.
        example_inputs: A tensor, a tuple or a mapping.
        table: Says in which mode, with how many rounds and by which clock.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, table: ProfileTable) -> None:
        self.table = table
        self.device = surgery.device_of(model)
        self._inputs = measure.to_device(example_inputs, self.device)
        self._dense = self._ready(surgery.clone(model))

    def _ready(self, model: nn.Module) -> nn.Module:
        return model.train(self.table.mode == "training")

    @cached_property
    def dense_ms(self) -> float:
        """Median milliseconds of the dense model."""
        return self._timed({"dense": self._run_dense}).interval("dense").median

    @cached_property
    def _run_dense(self) -> Callable[[], Any]:
        return self.table.runner(self._dense, self._inputs)

    def measure(self, plan: RankPlan) -> Measured:
        """Build the model of a plan and time it against the dense one."""
        built = self._ready(build_random(self._dense, plan))
        runners = {"dense": self._run_dense, "plan": self.table.runner(built, self._inputs)}
        timings = self._timed(runners)
        for _ in range(MAX_EXTENSIONS):
            ratio = timings.ratio("plan", "dense")
            if ratio.high - ratio.low <= WIDTH * ratio.median:
                break
            timings += self._timed(runners)
        ratio = timings.ratio("plan", "dense")
        return Measured(ratio, timings.interval("plan"), timings.interval("dense"))

    def _timed(self, runners: dict[str, Callable[[], Any]]) -> Timings:
        try:
            return self.table.time_runners(runners, device=self.device)
        except RuntimeError as error:
            raise ModelError(
                f"{type(self._dense).__name__} cannot be timed for {self.table.mode}: {error}"
            ) from error


def price_time(
    problem: Problem,
    clock: ModelClock,
    seen: Probe,
    *,
    axis: bool | None = None,
    known: Mapping[str, Any] | None = None,
) -> None:
    """Give a problem its layer times and, where it is asked for, that cost axis.

    Args:
        problem: Changed.
        clock: Times whole models.
        seen: The layers' inputs.
        axis: Whether latency becomes a cost axis; None for under a budget on it.
        known: Times of layers and of the dense model, as `adopt_times` takes them; they
            are measured where it is None.
    """
    times = SiteTimes(
        clock.table,
        seen.calls,
        device=clock.device,
        step=problem.step,
        check=problem.check_deadline,
    )
    problem.times = times

    def measured(options: Sequence[Option]) -> Measured:
        problem.check_deadline()
        pairs = zip(problem.sites, options, strict=True)
        decisions = tuple(decide(site, option) for site, option in pairs if not option.keeps)
        return clock.measure(RankPlan(model={}, decisions=decisions))

    problem.measure = measured
    if not (bounds_latency(problem.budget) if axis is None else axis):
        return
    if known is None:
        times.prepare(problem.sites, progress=problem.progress)
        _add_axis(problem, times, clock.dense_ms)
    else:
        adopt_times(problem, known)


def adopt_times(problem: Problem, known: Mapping[str, Any]) -> None:
    """Let a problem price time as another process does.

    Args:
        problem: With `times`; changed.
        known: What `SiteTimes.to_dict` gave there, and ``dense_ms`` of the whole model.
    """
    assert problem.times is not None
    problem.times.restore(known)
    _add_axis(problem, problem.times, float(known["dense_ms"]))


def _add_axis(problem: Problem, times: SiteTimes, dense_ms: float) -> None:
    problem.totals = {**problem.totals, LATENCY: dense_ms}
    problem.sites = tuple(
        replace(site, cost={**site.cost, LATENCY: times.dense_ms(site)}, times=times)
        for site in problem.sites
    )


@dataclass(frozen=True)
class _Round:
    """One plan, what was asked of the layer times, and what the model took.

    Args:
        asked: The share of the dense time that layer times had to predict.
        predicted: What they predicted.
    """

    plan: RankPlan
    asked: float
    predicted: float
    measured: Measured
    met: bool

    @property
    def used(self) -> float:
        return self.measured.ratio.high

    @property
    def slack(self) -> float:
        """What may stay unused: less than this is not worth another plan, or not to be told."""
        ratio = self.measured.ratio
        return max(SLACK, min(ratio.high - ratio.median, WIDTH))


def bounds_latency(budget: Budget | None) -> bool:
    """Whether `budget` is on time: as a share, in milliseconds, or to be made small."""
    if budget is None:
        return False
    named = (budget.latency, budget.latency_ms)
    return budget.minimize == LATENCY or any(value is not None for value in named)


def solve(
    problem: Problem, strategy: Strategy, measure: Callable[[RankPlan], Measured], dense_ms: float
) -> RankPlan:
    """The plan whose *measured* time is within the budget, at the least error found.

    Args:
        problem: With the axis ``latency`` in its costs.
        strategy: Chooses on predicted time.
        measure: Builds a plan's model and times it against the dense one.
        dense_ms: Median milliseconds of the dense model.

    Raises:
        BudgetInfeasible: No plan was measured to be fast enough.

    Warns where intervals are too wide to decide anything.
    """
    budget = problem.budget
    assert budget is not None
    share = min(budget.latency or 1.0, (budget.latency_ms or dense_ms) / dense_ms)
    done: list[_Round] = []
    asked = share if share >= 1 else AIM * share
    while len(done) < MAX_ROUNDS:
        inner = problem.with_budget(replace(budget, latency=asked, latency_ms=None))
        try:
            plan = strategy.search(inner)
        except BudgetInfeasible as error:
            if not done:
                raise _slower(problem, error, done) from error
            break
        same = [entry for entry in done if entry.plan.decisions == plan.decisions]
        measured = same[0].measured if same else measure(plan)
        done.append(_judged(plan, asked, measured, budget, dense_ms))
        spent = done[-1].used >= share - done[-1].slack or not plan.changes or same
        if done[-1].met and spent:
            break
        following = _corrected(done, share)
        if following is None:
            break
        asked = following
    if any(entry.measured.ratio.noisy for entry in done):
        widest = max((e.measured.ratio for e in done), key=lambda r: (r.high - r.low) / r.median)
        warnings.warn(
            f"the time of the whole model varies too much to decide: {widest} of dense; the "
            "machine is busy, throttled or not warm; close other programs and search again",
            RankoptWarning,
            stacklevel=3,
        )
    fitting = [entry for entry in done if entry.met]
    if not fitting:
        raise _slower(problem, None, done)
    best = max(fitting, key=lambda entry: entry.asked)
    return _annotated(best, done, budget, dense_ms)


def _judged(
    plan: RankPlan, asked: float, measured: Measured, budget: Budget, dense_ms: float
) -> _Round:
    entry = plan.totals[LATENCY]
    predicted = float(entry["predicted"] or 0) / float(entry["before"] or 1)
    unchanged = not plan.changes  # the dense model takes exactly its own time
    ratio = 1.0 if unchanged else measured.ratio.high
    took = dense_ms if unchanged else measured.latency_ms.high
    met = ratio <= (budget.latency or 1.0) or (unchanged and budget.latency is None)
    if budget.latency_ms is not None:
        met = met and took <= budget.latency_ms
    return _Round(plan, asked, predicted, measured, met)


def _corrected(done: list[_Round], share: float) -> float | None:
    """What to ask of layer times next; None if there is nothing left to try."""
    last = done[-1]
    saved, promised = 1 - last.measured.ratio.median, 1 - last.predicted
    realised = min(MAX_REALISED, max(MIN_REALISED, saved / promised if promised > 0 else 1.0))
    # A burst of noise widens one interval, not the next one.
    ratio = last.measured.ratio
    spread = min(ratio.high - ratio.median, WIDTH * ratio.median)
    asked = min(1.0, 1 - (1 - AIM * share + spread) / realised)
    met = [entry.asked for entry in done if entry.met]
    missed = [entry.asked for entry in done if not entry.met]
    if met and asked <= max(met):  # slack is to be used up, not added to
        asked = (max(met) + min(missed, default=1.0)) / 2
    if missed and asked >= min(missed):
        low = max(met, default=0.0)
        asked = (low + min(missed)) / 2 if met else 0.85 * min(missed)
    if asked <= 0:
        asked = 0.75 * min(entry.asked for entry in done)
    close = min(abs(asked - entry.asked) for entry in done)
    return None if close < CLOSE else asked


def _slower(
    problem: Problem, cause: BudgetInfeasible | None, done: list[_Round]
) -> BudgetInfeasible:
    budget = problem.budget
    assert budget is not None
    if done:
        best = min(done, key=lambda entry: entry.used)
        reached = (
            f"the fastest plan that was built took {best.measured.ratio} of the dense model's time "
            f"({best.measured.latency_ms} against {best.measured.dense_ms} ms)"
        )
        smallest = {LATENCY: best.used}
    else:
        assert cause is not None
        smallest = dict(cause.smallest)
        share = smallest.get(LATENCY, 1.0)
        reached = f"layer times foresee no less than {100 * share:.1f}% of the dense model's time"
    dense = " As measured, dense is the right answer here:" if smallest[LATENCY] >= 0.97 else ""
    return BudgetInfeasible(
        f"{budget.explain()}: cannot be met;{dense} {reached}; loosen the budget, free more "
        "layers, or use a larger batch, where chains gain more",
        smallest,
    )


def _annotated(best: _Round, done: list[_Round], budget: Budget, dense_ms: float) -> RankPlan:
    measured = best.measured
    before = round(dense_ms, 4)
    after = before if not best.plan.changes else round(before * measured.ratio.median, 4)
    totals = {
        **best.plan.totals,
        LATENCY: {**best.plan.totals[LATENCY], "before": before, "measured": after},
    }
    facts: dict[str, Any] = {
        "ratio": measured.ratio.median,
        "low": measured.ratio.low,
        "high": measured.ratio.high,
        "rounds": [
            {
                "predicted": round(entry.predicted, 4),
                "measured": round(entry.measured.ratio.median, 4),
                "high": round(entry.measured.ratio.high, 4),
            }
            for entry in done
        ],
    }
    extensions = {**best.plan.extensions, LATENCY: facts}
    return replace(best.plan, budget=budget, totals=totals, extensions=extensions)

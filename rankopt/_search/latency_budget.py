"""Budgets on time: solve on layer times, measure the whole model, correct, solve again.

Times of layers do not add up to the time of a model. So the plan that layer times
suggest is built and measured against the dense model, what it took corrects the target,
and the strategy chooses again. Between a plan that keeps to the budget and one that does
not, layer by layer the choices of the one give way to those of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Final

from rankopt._search.model_clock import SLACK, WIDTH
from rankopt._timing.latency import Measured
from rankopt._timing.noise import warn_of_noise
from rankopt.budget import Budget
from rankopt.errors import BudgetInfeasible, DeadlineExceeded
from rankopt.plan import RankPlan
from rankopt.strategy import LATENCY, Problem, Strategy
from rankopt.strategy.sites import figure

__all__ = ["solve"]

# Plans of the strategy, then plans between two of them.
MAX_ROUNDS: Final = 6
MAX_BLENDS: Final = 6
# Aim this far below the budget: half of what may stay unused.
AIM: Final = 1 - SLACK / 2
# Bounds on the share of a predicted saving that is believed to come true.
MIN_REALISED, MAX_REALISED = 0.05, 2.0
# What is asked of layer times is told apart from here on.
CLOSE: Final = 0.001
# A share of the dense time that no model would be changed for.
DENSE: Final = 0.97
# Where no plan has met the budget yet, ask for this share of what was asked.
DOWN: Final = 0.85


@dataclass(frozen=True)
class _Round:
    """One plan, what was asked of the layer times, and what the model took.

    Args:
        asked: The share of the dense time that layer times had to predict; None for a
            plan between two others.
        predicted: What they predicted.
    """

    plan: RankPlan
    asked: float | None
    predicted: float
    measured: Measured
    met: bool

    @property
    def took(self) -> float:
        """Median share of the dense time."""
        return self.measured.ratio.median if self.plan.changes else 1.0

    def undecided(self, share: float) -> bool:
        """Whether its time, measured again on a calmer machine, may well be within the budget."""
        ratio = self.measured.ratio
        return bool(self.plan.changes) and not self.met and ratio.noisy and ratio.low <= share

    def spends(self, share: float) -> bool:
        """Whether it meets the budget and leaves next to nothing of it."""
        return self.met and (self.took >= (1 - SLACK) * share or not self.plan.changes)


class _Rounds:
    """The plans tried under one budget.

    Args:
        measure: Builds a plan's model and times it against the dense one, until it is told
            whether it keeps to a share.
    """

    def __init__(
        self,
        problem: Problem,
        strategy: Strategy,
        measure: Callable[[RankPlan, float | None], Measured],
        dense_ms: float,
    ) -> None:
        assert problem.budget is not None
        self.problem, self.strategy, self.budget = problem, strategy, problem.budget
        self.dense_ms, self._measure = dense_ms, measure
        limit = (self.budget.latency_ms or dense_ms) / dense_ms
        self.share = min(self.budget.latency or 1.0, limit)
        self.done: list[_Round] = []

    @property
    def spent(self) -> bool:
        """Whether one of them is what was wanted."""
        return any(entry.spends(self.share) for entry in self.done)

    @property
    def met(self) -> list[_Round]:
        """Those that keep to the budget."""
        return [entry for entry in self.done if entry.met]

    def search(self) -> None:
        """Let the strategy choose, under targets corrected by what its plans took."""
        asked = self.share if self.share >= 1 else AIM * self.share
        for _ in range(MAX_ROUNDS):
            try:
                plan = self._chosen(asked)
            except BudgetInfeasible as error:
                # The smallest the layer times foresee: what it takes is to be seen.
                least = error.smallest.get(LATENCY, 1.0) * (1 + 1e-6)
                tried = [entry.asked for entry in self.done]
                if self.met or not asked < least < 1 or least in tried:
                    if not self.done:
                        raise _slower(self.budget, error, self.done) from error
                    return
                asked = least
                try:
                    plan = self._chosen(asked)
                except BudgetInfeasible:
                    if not self.done:
                        raise _slower(self.budget, error, self.done) from error
                    return
            known = any(entry.plan.decisions == plan.decisions for entry in self.done)
            self.take(plan, asked)
            if self.spent:
                return
            if known and self.met:  # where plans come again, those between two are left
                if len(self.met) < len(self.done) or asked >= 1:
                    return
                asked = 1.0  # for an upper end
                continue
            following = _corrected(self.done, self.share)
            if following is None:
                return
            asked = following

    def _chosen(self, asked: float) -> RankPlan:
        limits = replace(self.budget, latency=asked, latency_ms=None)
        return self.strategy.search(self.problem.with_budget(limits))

    def blend(self) -> None:
        """Plans between one that meets the budget and one that does not."""
        missed = [entry for entry in self.done if not entry.met]
        if not self.met or not missed:
            return
        low, high = max(self.met, key=lambda e: e.took), min(missed, key=lambda e: e.took)
        between = _between(low.plan, high.plan, self.budget)
        tried: set[int] = set()
        for _ in range(MAX_BLENDS):
            part = (AIM * self.share - low.took) / max(high.took - low.took, 1e-9)
            if not 0 < part < 1:  # a miss by noise alone
                part = 0.5
            wanted = low.predicted + part * (high.predicted - low.predicted)
            ends = sorted((low.predicted, high.predicted))
            left = [
                (abs(_predicted(plan) - wanted), index)
                for index, plan in enumerate(between)
                if index not in tried and ends[0] < _predicted(plan) < ends[1]
            ]
            if not left:
                return
            index = min(left)[1]
            tried.add(index)
            entry = self.take(between[index], None)
            if entry.spends(self.share):
                return
            if entry.met:
                low = entry
            else:
                high = entry

    def take(self, plan: RankPlan, asked: float | None) -> _Round:
        """Measure a plan, unless it came before."""
        self.problem.check_deadline()
        same = [entry for entry in self.done if entry.plan.decisions == plan.decisions]
        unchanged = not plan.changes  # the dense model takes exactly its own time
        limit = None if unchanged else self.share
        measured = same[0].measured if same else self._measure(plan, limit)
        met = (1.0 if unchanged else measured.ratio.high) <= self.share
        self.done.append(_Round(plan, asked, _predicted(plan), measured, met))
        return self.done[-1]


def solve(
    problem: Problem,
    strategy: Strategy,
    measure: Callable[[RankPlan, float | None], Measured],
    dense_ms: float,
) -> RankPlan:
    """The plan whose *measured* time is within the budget and uses most of it.

    Args:
        problem: With the axis ``latency`` in its costs.
        strategy: Chooses on predicted time.
        measure: Builds a plan's model and times it against the dense one; also takes the
            share of the dense time that is to be kept to.
        dense_ms: Median milliseconds of the dense model.

    Raises:
        BudgetInfeasible: No plan was measured to be fast enough.
        DeadlineExceeded: Before there was one.

    Warns where a plan is returned although intervals were too wide to decide much.
    """
    rounds = _Rounds(problem, strategy, measure, dense_ms)
    done = rounds.done
    try:
        rounds.search()
        if not rounds.spent:
            rounds.blend()
    except DeadlineExceeded:
        if not any(entry.met for entry in done):
            raise
    fitting = [entry for entry in done if entry.met]
    if not fitting:
        raise _slower(rounds.budget, None, done, rounds.share)
    best = max(fitting, key=lambda e: e.took)
    # A plan that changes nothing takes the dense model's time, however that is measured.
    if best.plan.changes:
        ratios = [entry.measured.ratio for entry in done]
        warn_of_noise(ratios, what="the time of the whole model varies")
    return _annotated(best, done, rounds.budget, dense_ms)


def _predicted(plan: RankPlan) -> float:
    entry = plan.totals[LATENCY]
    return float(entry["predicted"] or 0) / float(entry["before"] or 1)


def _corrected(done: Sequence[_Round], share: float) -> float | None:
    """What to ask of layer times next; None if there is nothing left to try."""
    last = done[-1]
    assert last.asked is not None
    saved, promised = 1 - last.took, 1 - last.predicted
    realised = min(MAX_REALISED, max(MIN_REALISED, saved / promised if promised > 0 else 1.0))
    over = last.took - AIM * share
    if not last.met:
        # A burst of noise widens one interval, not the next one; what comes again is no burst.
        ratio = last.measured.ratio
        misses = len(list(takewhile(lambda entry: not entry.met, reversed(done))))
        over += 2 ** (misses - 1) * min(ratio.high - ratio.median, WIDTH * ratio.median)
    asked = min(1.0, last.asked - over / realised)
    asks = [(entry.asked, entry.met) for entry in done if entry.asked is not None]
    low = max((one for one, met in asks if met), default=None)
    high = min((one for one, met in asks if not met and one > (low or 0.0)), default=1.0)
    if low is None:
        if asked >= high:
            asked = DOWN * high
        if asked <= 0:
            asked = DOWN * min(one for one, _ in asks)
    elif not low < asked < high or min(abs(asked - one) for one, _ in asks) < CLOSE:
        asked = (low + high) / 2  # slack is to be used up, not added to
    if min(abs(asked - one) for one, _ in asks) >= CLOSE:
        return asked
    return None if low is not None else DOWN * high


def _between(fast: RankPlan, slow: RankPlan, budget: Budget) -> list[RankPlan]:
    """Plans that take the first sites from `slow`, least added time first, the rest from `fast`.

    Those that break a bound on another axis are left out.
    """
    others = replace(budget, latency=1.0, latency_ms=None)
    pairs = list(zip(fast.decisions, slow.decisions, strict=True))

    def added(index: int) -> float:
        one, other = (decision.cost.get(LATENCY, (0.0, 0.0))[1] for decision in pairs[index])
        return other - one

    # How a search went is told; the figures of its own choice are not those of this one.
    told = {
        name: {key: value for key, value in facts.items() if isinstance(value, (list, dict))}
        for name, facts in fast.extensions.items()
        if isinstance(facts, Mapping)
    }
    moved = sorted((i for i, (a, b) in enumerate(pairs) if a != b), key=added)
    decisions, found = list(fast.decisions), []
    original = {axis: float(entry["before"] or 0) for axis, entry in fast.totals.items()}
    sums = {axis: float(entry["predicted"] or 0) for axis, entry in fast.totals.items()}
    for index in moved[:-1]:
        before, after = pairs[index]
        decisions[index] = after
        for axis in sums:
            sums[axis] += after.cost[axis][1] - before.cost[axis][1]
        totals = {
            axis: {**entry, "predicted": figure(axis, sums[axis])}
            for axis, entry in fast.totals.items()
        }
        if others.fits(sums, original):
            found.append(replace(fast, decisions=tuple(decisions), totals=totals, extensions=told))
    return found


def _slower(
    budget: Budget, cause: BudgetInfeasible | None, done: Sequence[_Round], share: float = 1.0
) -> BudgetInfeasible:
    """The error where no plan was measured to keep to `share` of the dense time."""
    verdict = "cannot be met"
    if done:
        undecided = [entry for entry in done if entry.undecided(share)]
        best = min(undecided or done, key=lambda entry: entry.measured.ratio.high)
        ratio = best.measured.ratio
        reached = (
            f"the fastest plan that was built took {ratio} of the dense model's time "
            f"({best.measured.latency_ms} against {best.measured.dense_ms} ms)"
        )
        smallest = {LATENCY: ratio.high}
        dense = not undecided and (ratio.low >= DENSE or not best.plan.changes)
        if undecided:
            verdict = (
                "could not be decided, for the time of the whole model varies too much (the "
                "machine is busy, throttled or not warm; close other programs and search again)"
            )
    else:
        assert cause is not None
        smallest = dict(cause.smallest)
        least = smallest.get(LATENCY, 1.0)
        reached = f"layer times foresee no less than {100 * least:.1f}% of the dense model's time"
        dense = least >= DENSE
    if dense:
        verdict += "; as measured, dense is the right answer here"
    return BudgetInfeasible(
        f"{budget.explain()}: {verdict}; {reached}; loosen the budget, free more layers, or use a "
        "larger batch, where chains gain more",
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
                **({"between": True} if entry.asked is None else {}),
            }
            for entry in done
        ],
    }
    extensions = {**best.plan.extensions, LATENCY: facts}
    return replace(best.plan, budget=budget, totals=totals, extensions=extensions)

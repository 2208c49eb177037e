"""Budgets on the metric: the smallest figure with little enough lost, by bisection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from rankopt._model.metric import mean
from rankopt.budget import RATIO_AXES, Budget
from rankopt.errors import BudgetInfeasible, DeadlineExceeded, warn
from rankopt.plan import RankPlan
from rankopt.strategy import Problem, Strategy

__all__ = ["lost", "within_drop"]

# Halvings of the interval of shares: the answer is within 1/128 of where the strategy's
# plans cross the bound, where losses grow with compression.
STEPS: Final = 7
# Shares closer than this are not told apart.
RESOLUTION: Final = 1e-3


def lost(budget: Budget, dense: float, metric: float) -> float:
    """What `metric` loses against the dense model's, positive for worse."""
    return dense - metric if budget.direction == "maximize" else metric - dense


def within_drop(
    strategy: Strategy, problem: Problem, find: Callable[[Problem], RankPlan]
) -> RankPlan:
    """The smallest plan of any budgeted strategy that keeps the metric.

    Bisects the share of the `minimize` axis; every plan it accepts was built,
    recalibrated and evaluated. Other shares in the budget hold throughout.

    Args:
        strategy: Searched once per share.
        problem: With a budget on ``metric_drop``, and `evaluate`.
        find: The strategy's plan under a budget on shares alone.

    Raises:
        BudgetInfeasible: No plan within the other shares keeps the metric.
        EvaluationError: From the user's `evaluate`.
    """
    bisection = _Bisection(strategy, problem, find)
    low, high = 0.0, 1.0
    if bisection.shares or bisection.budget.latency_ms is not None:
        high = bisection.shares.get(bisection.axis, 1.0)
        found = bisection.attempt(high)
        if found is None:
            raise bisection.infeasible()
        high = min(high, found)
    try:
        for _ in range(STEPS):
            if high - low < RESOLUTION:
                break
            middle = (low + high) / 2
            try:
                found = bisection.attempt(middle)
            except BudgetInfeasible as error:
                low = max(middle, min(error.smallest.get(bisection.axis, middle), high))
                continue
            if found is None:
                low = middle
            else:
                high = min(middle, found)
    except DeadlineExceeded:
        if bisection.accepted is None:
            raise
    return bisection.answer()


class _Bisection:
    """The points tried so far, and the smallest accepted one."""

    def __init__(
        self, strategy: Strategy, problem: Problem, find: Callable[[Problem], RankPlan]
    ) -> None:
        budget = problem.budget
        assert budget is not None
        assert budget.minimize is not None
        assert problem.evaluate is not None
        self.strategy, self.problem, self.budget = strategy, problem, budget
        self.find = find
        self.axis = budget.minimize
        self.shares = {name: budget.ratio(name) for name in budget.axes if name in RATIO_AXES}
        self.evaluate = problem.evaluate
        self.dense = mean(list(self.evaluate(())))
        self.tried: list[dict[str, float]] = []
        self.accepted: tuple[RankPlan, float] | None = None

    def attempt(self, share: float) -> float | None:
        """Search at a share of the axis; the share reached, None if it loses too much."""
        self.problem.check_deadline()
        shares = Budget.from_dict({**self.shares, self.axis: share})
        limits = replace(shares, latency_ms=self.budget.latency_ms)
        plan = self.find(self.problem.with_budget(limits))
        metric = mean(list(self.evaluate(plan.decisions)))
        entry = plan.totals[self.axis]
        figure = entry["predicted"] if entry["measured"] is None else entry["measured"]
        reached = float(figure or 0) / float(entry["before"] or 1)
        self.tried.append({self.axis: reached, "metric": metric})
        if lost(self.budget, self.dense, metric) > (self.budget.metric_drop or 0.0):
            return None
        self.accepted = (plan, metric)
        return reached

    @property
    def _story(self) -> str:
        points = ", ".join(f"{one['metric']:.4g} at {one[self.axis]:.1%}" for one in self.tried)
        return (
            f"{self.budget.explain()}: no plan of {self.strategy.name!r} keeps the metric "
            f"(dense {self.dense:.4g}; tried {points or 'nothing'})"
        )

    def infeasible(self) -> BudgetInfeasible:
        """The error where other shares forbid to keep every layer."""
        return BudgetInfeasible(f"{self._story}; loosen the budget", self.shares)

    def answer(self) -> RankPlan:
        """The smallest accepted plan; the model as it is where there is none."""
        if self.accepted is None:
            warn(f"{self._story}; every layer is kept")
            problem = self.problem
            kept = [
                problem.keep(site, "every smaller model loses too much") for site in problem.sites
            ]
            plan, metric = problem.plan(self.strategy, kept), self.dense
        else:
            plan, metric = self.accepted
        facts = {"dense": self.dense, "metric": metric, "tried": self.tried}
        return replace(self.problem.annotate(plan, {"metric_drop": facts}), budget=self.budget)

"""How factors are made, where a search is to find out: built each way, the nearest outputs win."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

from rankopt.errors import BudgetError, DeadlineExceeded, ModelError
from rankopt.plan import MERGE, RankPlan
from rankopt.strategy import Problem

__all__ = ["SEARCH", "Choice", "check_choices", "fitted_in_order", "nearest"]

SEARCH: Final = "search"
Choice = bool | Literal["search"]
WORDS: Final = {
    "asymmetric": "inputs to fit the layers on",
    "fisher": "inputs to take gradients on",
}


def check_choices(calibration: Any, *, drops: bool, **choices: Choice) -> None:
    """Raise unless `asymmetric` and `fisher` can be what they are asked to be.

    Args:
        calibration: As given to `rankopt.search`.
        drops: Whether the budget is on the metric.
        choices: By name.

    Raises:
        ValueError: Neither a truth value nor ``search``.
        ModelError: There are no calibration inputs.
        BudgetError: The budget is on the metric, which compares plans in its own way.
    """
    for name, choice in choices.items():
        if not isinstance(choice, bool) and choice != SEARCH:
            raise ValueError(f"{name}={choice!r}: expected True, False or 'search'")
        if choice and calibration is None:
            raise ModelError(f"{name}={choice!r} needs calibration=: {WORDS[name]}")
        if choice == SEARCH and drops:
            raise BudgetError(
                f"{name}='search' picks what keeps the outputs nearest at a given size, and a "
                f"budget on metric_drop looks for the size; pass {name}=True or False"
            )


def nearest(
    problem: Problem,
    find: Callable[[Problem], RankPlan],
    *,
    asymmetric: Choice,
    fisher: Choice,
    judged: bool,
) -> RankPlan:
    """The plan whose model's outputs are nearest to the dense model's on calibration inputs.

    Ranks are searched once without and once with the Fisher information, if that is to be found
    out, and by a strategy that judges plans by the metric once for factors in order, too. Every
    plan is built and its BatchNorm settled as `rankopt.apply` would.

    Args:
        problem: With calibration inputs.
        find: Searches the ranks for a problem.
        asymmetric: As of `rankopt.search`.
        fisher: As of `rankopt.search`.
        judged: Whether plans that `find` returns were judged by the metric, with the factors
            that their problem says.

    Raises:
        DeadlineExceeded: Before there was a plan.
    """
    assert problem.distance is not None
    best, least, tried = None, float("inf"), list[dict[str, Any]]()
    try:
        for weighed in _values(fisher):
            plan: RankPlan | None = None
            for ordered in _values(asymmetric):
                if plan is None or judged:
                    searched = {"fisher": weighed and fisher == SEARCH}
                    searched["asymmetric"] = judged and ordered and asymmetric == SEARCH
                    variant = ", ".join(name for name, on in searched.items() if on)
                    in_order = ordered if judged else asymmetric
                    plan = find(
                        problem.with_factors(fisher=weighed, asymmetric=in_order, variant=variant)
                    )
                made = fitted_in_order(plan) if ordered else plan
                found = problem.distance(made.decisions)
                tried.append({"fisher": weighed, "asymmetric": ordered, "divergence": found})
                if best is None or found < least:
                    best, least = made, found
    except DeadlineExceeded:
        if best is None:
            raise
    assert best is not None
    return problem.annotate(best, {"factors": tried})


def fitted_in_order(plan: RankPlan) -> RankPlan:
    """The plan with ``asymmetric`` factors; the errors it states are those of dense inputs."""
    return replace(
        plan,
        decisions=tuple(
            decision
            if decision.method == MERGE
            else replace(decision, factors=decision.factors.in_order())
            for decision in plan
        ),
    )


def _values(choice: Choice) -> Sequence[bool]:
    return (False, True) if choice == SEARCH else (bool(choice),)

"""`knapsack`: the plan of least total damage under the budget, solved globally."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from rankopt._utils.arguments import check_choice
from rankopt.errors import ModelError
from rankopt.plan import RankPlan
from rankopt.strategy import Option, Problem, Strategy, Tags, check_share
from rankopt.strategy.allocation import choose, damage, menu, sensitivities

__all__ = ["Knapsack"]

# What of the measured divergence of a site alone counts among others, as a power.
_POWERS = {"auto": 0.5, "measured": 1.0, "equal": 0.0}


@dataclass(frozen=True)
class Knapsack(Strategy):
    """Choose decomposition and ranks of all layers at once.

    The damage of an option is its squared relative error (of the output, given
    calibration; without, minus the log of the weight's retained energy) times the
    sensitivity of its site. With calibration inputs the
    sensitivity follows from a measurement: how far the model's outputs move when
    this site alone is decomposed. Total damage under every axis of the budget is
    then minimised by Lagrangian relaxation and proved, or improved, by HiGHS.

    The plan's extension ``knapsack`` states the ``damage`` that was minimised, its lower
    ``bound`` and their relative ``gap``. Where errors are estimates, as of cp, so are
    these three: the gap says how well the estimates were minimised.
    ``fitted_damage`` is that of the errors the plan states, after the fits.

    Args:
        sensitivity: ``auto`` weighs sites by the square root of the measured
            divergence: what one site does alone foretells only part of what it does
            among others; without calibration it weighs them alike. ``measured`` weighs
            them by the divergence itself, ``equal`` all alike.
        exact: Whether HiGHS closes a gap above 0.01% that the relaxation leaves.
        threshold: Without a budget: each site keeps this share of its energy.
    """

    name: ClassVar[str] = "knapsack"
    tags: ClassVar[Tags] = Tags()
    sensitivity: Literal["auto", "measured", "equal"] = "auto"
    exact: bool = True
    threshold: float = 0.9

    def __post_init__(self) -> None:
        check_choice("sensitivity", self.sensitivity, _POWERS)
        if not isinstance(self.exact, bool):
            raise ValueError(f"exact={self.exact!r}: expected True or False")
        check_share("threshold", self.threshold)

    def search(self, problem: Problem) -> RankPlan:
        """Solve the allocation; see `Strategy.search`."""
        problem.prepare()
        menus = [menu(problem, site) for site in problem.sites]
        if problem.budget is None:
            return problem.plan(self, [_natural(options, self.threshold) for options in menus])
        weights = self._weights(problem, menus)
        damages = [
            np.array([weight * damage(option) for option in options])
            for weight, options in zip(weights, menus, strict=True)
        ]
        found = choose(problem, menus, damages, problem.budget.ratios, exact=self.exact)
        if found is None:
            load = problem.load
            raise problem.infeasible([min(o, key=lambda one: load(one.cost)) for o in menus])
        options, allocation = found
        plan = problem.plan(self, options)
        fitted = [
            replace(option, error=plan[site.name].error)
            for site, option in zip(problem.sites, options, strict=True)
        ]
        facts = {
            "damage": allocation.damage,
            "bound": allocation.bound,
            "gap": allocation.gap,
            "fitted_damage": sum(
                weight * damage(option) for weight, option in zip(weights, fitted, strict=True)
            ),
        }
        return problem.annotate(plan, {"knapsack": facts})

    def _weights(self, problem: Problem, menus: Sequence[Sequence[Option]]) -> list[float]:
        """Damage per unit of squared error, for each site."""
        if problem.divergence is None and self.sensitivity == "measured":
            raise ModelError("sensitivity='measured' needs calibration=")
        power = _POWERS[self.sensitivity]
        measured = sensitivities(problem, menus) if power else None
        return [1.0] * len(menus) if measured is None else [value**power for value in measured]


def _natural(menu: Sequence[Option], threshold: float) -> Option:
    fitting = [option for option in menu if (option.error or 0.0) ** 2 <= 1 - threshold]
    decomposed = [option for option in fitting if not option.keeps]
    return min(decomposed or fitting, key=lambda option: option.cost["params"])

"""`knapsack`: the plan of least total damage under the budget, solved globally."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from rankopt._utils.arguments import check_choice
from rankopt.errors import ModelError
from rankopt.plan import RankPlan
from rankopt.strategy import Option, Problem, Strategy, Tags, check_share
from rankopt.strategy.allocation import choose, damage, menu, sensitivities

__all__ = ["Knapsack"]

_POWERS = {"auto": 0.5, "tempered": 0.5, "measured": 1.0, "equal": 0.0}


@dataclass(frozen=True)
class Knapsack(Strategy):
    """Choose decomposition and ranks of all layers at once.

    The damage of an option is its squared relative error (of the output, given
    calibration; without, minus the log of the weight's retained energy) times the
    sensitivity of its site. With calibration inputs the
    sensitivity follows from a measurement: how far the model's outputs move when
    this site alone is decomposed. Total damage under every axis of the budget is
    then minimised by Lagrangian relaxation and proved, or improved, by HiGHS.

    Args:
        sensitivity: ``equal`` weighs all sites alike. ``measured`` weighs them by
            the measured divergence. ``tempered`` takes the square root of that:
            what one site does alone foretells only part of what it does among
            others. ``auto`` is ``tempered`` given calibration, else ``equal``.
        exact: Whether HiGHS closes a gap above 0.01% that the relaxation leaves.
        threshold: Without a budget: each site keeps this share of its energy.
    """

    name: ClassVar[str] = "knapsack"
    tags: ClassVar[Tags] = Tags()
    sensitivity: Literal["auto", "tempered", "measured", "equal"] = "auto"
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
        ratios = {axis: problem.budget.ratio(axis) for axis in problem.budget.axes}
        found = choose(problem, menus, damages, ratios, exact=self.exact)
        if found is None:
            load = problem.load
            raise problem.infeasible([min(o, key=lambda one: load(one.cost)) for o in menus])
        options, allocation = found
        facts = {"damage": allocation.damage, "bound": allocation.bound, "gap": allocation.gap}
        return problem.annotate(problem.plan(self, options), {"knapsack": facts})

    def _weights(self, problem: Problem, menus: Sequence[Sequence[Option]]) -> list[float]:
        """Damage per unit of squared error, for each site."""
        if problem.divergence is None and self.sensitivity not in ("auto", "equal"):
            raise ModelError(f"sensitivity={self.sensitivity!r} needs calibration=")
        power = _POWERS[self.sensitivity]
        measured = sensitivities(problem, menus) if power else None
        return [1.0] * len(menus) if measured is None else [value**power for value in measured]


def _natural(menu: Sequence[Option], threshold: float) -> Option:
    fitting = [option for option in menu if (option.error or 0.0) ** 2 <= 1 - threshold]
    decomposed = [option for option in fitting if not option.keeps]
    return min(decomposed or fitting, key=lambda option: option.cost["params"])

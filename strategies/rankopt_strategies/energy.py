"""`energy`: every layer keeps the same share of its squared singular values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rankopt.plan import RankPlan
from rankopt.strategy import Option, Problem, Site, Strategy, Tags, check_share

__all__ = ["Energy"]


@dataclass(frozen=True)
class Energy(Strategy):
    """Cheapest ranks that retain a share of each weight's energy, 1 − error².

    With a budget the share is bisected, the same for every layer, so layers
    with fast spectral decay are compressed most. Without one, `threshold` holds.

    Args:
        threshold: Share of ‖W‖² to retain when there is no budget, in (0, 1].

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
        >>> plan = rankopt.search(model, "params<=50%", strategy=Energy())
        >>> plan.changes[0].method
        'svd'
    """

    name: ClassVar[str] = "energy"
    tags: ClassVar[Tags] = Tags()
    threshold: float = 0.9

    def __post_init__(self) -> None:
        check_share("threshold", self.threshold)

    def search(self, problem: Problem) -> RankPlan:
        """Bisect the retained share to the budget; see `Strategy.search`."""
        problem.prepare()
        if problem.budget is None:
            return problem.plan(self, self._choose(problem, self.threshold))
        _, options = problem.fit(lambda share: self._choose(problem, share))
        return problem.plan(self, options)

    @staticmethod
    def _choose(problem: Problem, share: float) -> list[Option]:
        return [_cheapest(problem, site, share) for site in problem.sites]


def _cheapest(problem: Problem, site: Site, share: float) -> Option:
    """The option of least load whose error² is at most 1 − share."""
    allowed = np.sqrt(max(0.0, 1.0 - share))
    best = None
    for method in site.methods:
        frontier = problem.frontier(site, method)
        # Errors fall along the frontier while the load grows.
        index = int(np.searchsorted(-frontier.error, -allowed, side="left"))
        if index < len(frontier) and (best is None or frontier.load[index] < best[0]):
            best = (frontier.load[index], method, frontier.ranks[index])
    if best is None:
        return problem.keep(site, f"no cheaper chain retains {100 * share:.1f}% of its energy")
    return problem.option(site, best[1], best[2], f"retains {100 * share:.1f}% of its energy")

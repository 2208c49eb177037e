"""Ranks as probabilities: one distribution per site over everything that can be done with it.

The options of a site are *dense* and the undominated ranks of each of its
decompositions, so the expected cost and the expected loss are linear in the
probabilities, and minimising one under a bound on the other is a linear program.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rankopt._decompositions.base import Decomposition
from rankopt.errors import ModelError, warn
from rankopt.strategy.allocation import NEGLIGIBLE_ERROR, allocate, fixed, limits, within
from rankopt.strategy.problem import Problem
from rankopt.strategy.sites import Option, Site

__all__ = ["Menu", "Relaxation"]

Array = npt.NDArray[np.float64]
BISECTIONS: Final = 60
SWEEPS: Final = 20


@dataclass(frozen=True)
class Menu:
    """The options of one site, by ascending cost, dense last unless it is never better.

    Args:
        site: The site.
        methods: The decomposition of each option; None for dense.
        ranks: The ranks of each option; () for dense.
        shares: [options, axes] cost as a share of what the budget allows the whole model.
        error: [options] relative error as `Frontier` states it.
    """

    site: Site
    methods: tuple[Decomposition | None, ...]
    ranks: tuple[tuple[int, ...], ...]
    shares: Array
    error: Array

    def __len__(self) -> int:
        return len(self.methods)


class Relaxation:
    """The options of every site in flat arrays, and what their probabilities imply.

    Args:
        problem: The model and a budget.
        soft: Whether to leave out methods that cannot mix the ranks of a weight that
            trains: neither `Decomposition.soft` nor `Decomposition.refits`.

    Attributes:
        menus: One per site.
        owner: [options] index of each option's site.
        shares: [options, axes] cost in shares of the budget.
        room: [axes] what the sites may use, in the same shares.
        limits: [axes] what the whole model may cost, in each axis's unit.
        error: [options] relative errors.
    """

    def __init__(self, problem: Problem, *, soft: bool = False) -> None:
        assert problem.budget is not None
        self.problem, self.axes = problem, problem.budget.axes
        if soft:
            _check_soft(problem)
        self.limits = _limits(problem)
        self.menus = tuple(_menu(problem, site, self.limits, soft=soft) for site in problem.sites)
        sizes = [len(menu) for menu in self.menus]
        self.owner = np.repeat(np.arange(len(sizes)), sizes)
        self.starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        self.shares: Array = np.concatenate([menu.shares for menu in self.menus])
        self.error: Array = np.concatenate([menu.error for menu in self.menus])
        self.room: Array = 1.0 - fixed(problem, self.axes) / self.limits
        self.sizes = np.array(sizes)
        self._check_room()

    def digest(self) -> str:
        """SHA-256 of the options and their costs."""
        named = [
            (menu.site.name, [repr(method) for method in menu.methods], menu.ranks)
            for menu in self.menus
        ]
        return hashlib.sha256(repr(named).encode() + self.shares.tobytes()).hexdigest()

    def within(self, problem: Problem) -> Relaxation:
        """The same options under another budget on the same axes, shares and room in its terms.

        Raises:
            BudgetInfeasible: Even the cheapest options exceed it.
        """
        other = copy.copy(self)
        other.problem, other.limits = problem, _limits(problem)
        ratio = self.limits / other.limits
        other.menus = tuple(replace(menu, shares=menu.shares * ratio) for menu in self.menus)
        other.shares, other.room = self.shares * ratio, 1.0 - (1.0 - self.room) * ratio
        other._check_room()
        return other

    def _check_room(self) -> None:
        least = np.minimum.reduceat(self.shares, self.starts, axis=0).sum(axis=0)
        if (least > self.room).any():
            raise self.problem.infeasible(self.options(self.starts))

    def __len__(self) -> int:
        return len(self.owner)

    # Distributions

    def softmax(self, logits: Array) -> Array:
        """[options] probabilities, a distribution per site."""
        peaks = np.maximum.reduceat(logits, self.starts)
        grown = np.exp(logits - peaks[self.owner])
        return np.asarray(grown / np.add.reduceat(grown, self.starts)[self.owner])

    def entropy(self, probabilities: Array) -> Array:
        """[sites] entropy as a share of that of the uniform distribution; 0 for one option."""
        terms = -probabilities * np.log(np.maximum(probabilities, 1e-300))
        nats = np.add.reduceat(terms, self.starts)
        return np.asarray(nats / np.log(np.maximum(self.sizes, 2)))

    def expected(self, values: Array, probabilities: Array) -> Array:
        """[sites] or [sites, axes] means of [options] or [options, axes]."""
        weighted = values * (probabilities if values.ndim == 1 else probabilities[:, None])
        return np.asarray(np.add.reduceat(weighted, self.starts, axis=0))

    def priced(self, scores: Array, temperature: float) -> tuple[Array, Array]:
        """The distribution that minimises the expected score within the budget.

        With `temperature` times the entropy as a bonus, the minimiser is
        p ∝ exp(−(score + price · cost) / temperature); the price of each axis is
        the least at which the expected cost is within the budget.

        Args:
            scores: [options] what choosing an option loses, in any unit.
            temperature: In the unit of the scores.

        Returns:
            Probabilities [options] and prices [axes].
        """
        prices = np.zeros(len(self.axes))

        def solve(prices: Array) -> Array:
            return self.softmax(-(scores + self.shares @ prices) / temperature)

        def excess(axis: int, price: float) -> float:
            at = prices.copy()
            at[axis] = price
            return float(self.shares[:, axis] @ solve(at) - self.room[axis])

        unit = max(temperature, float(np.ptp(scores)), 1e-12)
        for _ in range(SWEEPS if len(self.axes) > 1 else 1):
            before = prices.copy()
            for axis in range(len(self.axes)):
                prices[axis] = _root(lambda price, axis=axis: excess(axis, price), unit)
            if np.allclose(before, prices, rtol=1e-6, atol=0.0):
                break
        return solve(prices), prices

    # Decisions

    def round(
        self, log_probabilities: Array, scores: Array, prices: Array, *, exact: bool = False
    ) -> list[int]:
        """The most probable choice within the budget, its slack then spent.

        A common price on the cost, bisected, trades probability for cost until the
        choice fits. What is left of the budget goes, swap by swap, to the options
        that lower the score most.

        Args:
            log_probabilities: [options].
            scores: [options] what choosing an option loses.
            prices: [axes] what the axes cost relative to each other.
            exact: Whether to take the choice of least score, by integer programming
                over the options that the prices do not rule out, where that is better.

        Returns:
            For each site the index among all options.

        Raises:
            BudgetInfeasible: Nothing fits.
        """
        directions = [prices, np.ones(len(self.axes)), *np.eye(len(self.axes))]
        for direction in directions:
            if not direction.any():
                continue
            load = self.shares @ (direction / direction.sum())
            chosen = self._fitting(np.maximum(log_probabilities, -1e6), load)
            if chosen is None:
                continue
            chosen = self._spend(chosen, scores)
            if exact:
                chosen = self._solved(chosen, scores, prices)
            return [int(index) for index in chosen]
        raise self.problem.infeasible(self.options(self.starts))

    def _best(self, values: Array) -> npt.NDArray[np.int64]:
        """The first option of the largest value, for each site."""
        peaks = np.maximum.reduceat(values, self.starts)[self.owner]
        first = np.where(values >= peaks, np.arange(len(self)), len(self))
        return np.minimum.reduceat(first, self.starts)

    def _fitting(self, values: Array, load: Array) -> npt.NDArray[np.int64] | None:
        def choose(price: float) -> npt.NDArray[np.int64]:
            return self._best(values - price * load)

        def fits(price: float) -> bool:
            return bool(within(self.shares[choose(price)].sum(axis=0), self.room))

        if fits(0.0):
            return choose(0.0)
        low, high = 0.0, 1.0
        while not fits(high):
            low, high = high, 4 * high
            if high > 1e30:
                return None
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return choose(high)

    def _spend(self, chosen: npt.NDArray[np.int64], scores: Array) -> npt.NDArray[np.int64]:
        chosen = chosen.copy()
        used = self.shares[chosen].sum(axis=0)
        while True:
            now = chosen[self.owner]
            gains = scores[now] - scores
            fits = within(used - self.shares[now] + self.shares, self.room)
            gains = np.where(fits, gains, 0.0)
            best = int(np.argmax(gains))
            if gains[best] <= 0:
                return chosen
            site = self.owner[best]
            used = used - self.shares[chosen[site]] + self.shares[best]
            chosen[site] = best

    def bound(self, scores: Array, prices: Array) -> float:
        """No choice within the budget has a lower total score than this."""
        least = np.minimum.reduceat(scores + self.shares @ prices, self.starts)
        return float(least.sum() - prices @ self.room)

    def _solved(
        self, chosen: npt.NDArray[np.int64], scores: Array, prices: Array
    ) -> npt.NDArray[np.int64]:
        """The least score among the options that could be part of a better choice."""
        gap = float(scores[chosen].sum()) - self.bound(scores, prices)
        reduced = scores + self.shares @ prices
        reduced = reduced - np.minimum.reduceat(reduced, self.starts)[self.owner]
        open_ = reduced <= gap
        open_[chosen] = True
        places = [start + np.flatnonzero(part) for start, part in
                  zip(self.starts, np.split(open_, self.starts[1:]), strict=True)]  # fmt: skip
        found = allocate([scores[i] for i in places], [self.shares[i] for i in places], self.room)
        if found is None:
            return chosen
        best = np.array([i[k] for i, k in zip(places, found.chosen, strict=True)])
        fits = bool(within(self.shares[best].sum(axis=0), self.room))
        return best if fits and scores[best].sum() < scores[chosen].sum() else chosen

    def options(self, chosen: Sequence[int] | npt.NDArray[np.int64]) -> list[Option]:
        """The chosen options, one per site, as a plan takes them."""
        made, dense = [], f"dense {self.problem.load_name}"
        for menu, start, index in zip(self.menus, self.starts, chosen, strict=True):
            place = int(index - start)
            method = menu.methods[place]
            if method is None:
                made.append(self.problem.keep(menu.site, "dense is worth its cost here"))
                continue
            share = self.problem.load(menu.site.price(method, menu.ranks[place]))
            share = float(share / self.problem.load(menu.site.cost))
            reason = f"relaxed search within the budget ({100 * share:.0f}% of its {dense})"
            made.append(self.problem.option(menu.site, method, menu.ranks[place], reason))
        return made


def softmax(logits: Tensor, owner: Tensor, sites: int) -> Tensor:
    """`Relaxation.softmax` for tensors, differentiable."""
    peaks = logits.new_full((sites,), -torch.inf)
    peaks = peaks.scatter_reduce(0, owner, logits.detach(), "amax")
    grown = torch.exp(logits - peaks[owner])
    return grown / torch.zeros_like(peaks).index_add(0, owner, grown)[owner]


def _root(excess: Any, unit: float) -> float:
    """The least price ≥ 0 at which a decreasing `excess` is not positive."""
    if excess(0.0) <= 0:
        return 0.0
    low, high = 0.0, unit
    while excess(high) > 0:
        low, high = high, 4 * high
        if high > 1e18 * unit:  # the cheapest options alone: as near as it gets
            return high
    from scipy.optimize import brentq

    found = float(brentq(excess, low, high, rtol=1e-9, xtol=1e-15 * unit, disp=False))
    # To the side where the budget holds.
    step = 1e-9 * found
    while found < high and excess(found) > 0:
        found, step = found + step, 4 * step
    return min(found, high)


def _check_soft(problem: Problem) -> None:
    """Say which methods a gradient cannot reach; raise where none is left."""
    methods = {method.name: _trains(method) for site in problem.sites for method in site.methods}
    left_out = ", ".join(sorted(name for name, soft in methods.items() if not soft))
    if not any(methods.values()):
        raise ModelError(
            f"{left_out} cannot follow a weight that trains; allow svd, tucker2 or "
            "spatial_svd (methods=), or choose ranks by rankopt.search"
        )
    if left_out:
        warn(
            f"{left_out} left out: its factors cannot follow a weight that trains; "
            "rankopt.search, with strategy 'knapsack' or 'relaxed', chooses among them"
        )


def _trains(method: Decomposition) -> bool:
    """Whether the method can mix ranks of a weight that trains."""
    return method.soft or method.refits


def _limits(problem: Problem) -> Array:
    """[axes] the most the whole model may cost, in the axes' units."""
    assert problem.budget is not None
    return limits(problem.budget.ratios, problem.totals)


def _menu(problem: Problem, site: Site, whole: Array, *, soft: bool) -> Menu:
    """Every undominated option of a site over all its methods."""
    rows: list[tuple[float, float, int, tuple[int, ...]]] = []
    for index, method in enumerate(site.methods):
        if soft and not _trains(method):
            continue
        frontier = problem.frontier(site, method)
        rows += [
            (float(frontier.load[i]), float(frontier.error[i]), index, tuple(frontier.ranks[i]))
            for i in range(len(frontier))
        ]
    methods: list[Decomposition | None] = []
    ranks: list[tuple[int, ...]] = []
    errors: list[float] = []
    best = np.inf
    for _, error, index, wanted_ranks in sorted(rows):
        # Below rounding all errors are equal, and the cheapest option stands for them all.
        if error < best and best > NEGLIGIBLE_ERROR:
            best = error
            methods.append(site.methods[index])
            ranks.append(tuple(int(rank) for rank in wanted_ranks))
            errors.append(error)
    if best > NEGLIGIBLE_ERROR:
        methods.append(None)
        ranks.append(())
        errors.append(0.0)
    assert problem.budget is not None
    costs = [
        site.cost if method is None else site.price(method, chosen)
        for method, chosen in zip(methods, ranks, strict=True)
    ]
    figures = np.array([[float(cost[a]) for a in problem.budget.axes] for cost in costs])
    return Menu(site, tuple(methods), tuple(ranks), figures / whole, np.array(errors))

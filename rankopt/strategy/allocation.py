"""Choosing one option per site: menus, sensitivities, and the allocation under a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rankopt._decompositions.base import Decomposition
from rankopt._utils.streams import stdout_to_stderr
from rankopt.errors import CalibrationError, warn
from rankopt.strategy.problem import Problem
from rankopt.strategy.sites import LATENCY, Frontier, Option, Site

__all__ = [
    "Allocation",
    "allocate",
    "choose",
    "damage",
    "damage_of",
    "fixed",
    "limits",
    "menu",
    "sensitivities",
    "within",
]

Array = npt.NDArray[np.float64]
# Options per site after thinning; neighbours differ by little beyond this.
MAX_OPTIONS = 96
BISECTIONS = 60
# Share of the dense load at which a site's sensitivity is measured.
PROBE_LOAD = 0.5
MILP_SECONDS = 5.0
NEGLIGIBLE_ERROR = 1e-6
TIE_BREAK = 1e-9
# A plan proved to be within this of the optimum needs no further proof.
GOOD_GAP = 1e-4
# Rounding errors of a sum of shares; below one unit of 1e12 MACs.
WITHIN = 1.0 + 1e-13
# A layer that leaves no finite outputs matters this much more than any other.
FATAL = 100.0


@dataclass(frozen=True)
class Allocation:
    """A choice of one option per site.

    Args:
        chosen: Index of the option of each site.
        damage: Total damage of the choice.
        bound: A lower bound on the damage of any choice within the budget.
    """

    chosen: tuple[int, ...]
    damage: float
    bound: float

    @property
    def gap(self) -> float:
        """Relative distance from the bound; 0 proves the optimum."""
        return (self.damage - self.bound) / self.damage if self.damage > 0 else 0.0


def allocate(
    damages: Sequence[Array], costs: Sequence[Array], room: Array, *, exact: bool = True
) -> Allocation | None:
    """Choose one option per site: least total damage, every cost within the room.

    Lagrangian bisection on a common price gives a feasible choice and a bound; if
    they are further apart than `GOOD_GAP`, HiGHS then solves the integer program.

    Args:
        damages: Per site [options].
        costs: Per site [options, axes].
        room: [axes] what they may cost together.
        exact: Whether to call HiGHS at all.

    Returns:
        The allocation; None if no choice is within the room.
    """
    scaled = [cost / room for cost in costs]
    found = _lagrangian(damages, scaled)
    if exact and (found is None or found.gap > GOOD_GAP):
        solved = _integer_program(damages, scaled, found)
        if solved is not None and (found is None or solved.damage <= found.damage):
            return solved
    return found


def choose(
    problem: Problem,
    menus: Sequence[Sequence[Option]],
    damages: Sequence[Array],
    ratios: Mapping[str, float],
    *,
    exact: bool = True,
) -> tuple[list[Option], Allocation] | None:
    """One option per site: least total damage, within shares of the whole model's figures.

    Args:
        problem: The model at hand.
        menus: The options of each site.
        damages: Per site [options].
        ratios: Axis to the largest share of the original model's figure.
        exact: Whether to call HiGHS where relaxation leaves a gap.

    Returns:
        The options and how good they are; None if no choice is within the ratios.
    """
    axes = list(ratios)
    room = limits(ratios, problem.totals) - fixed(problem, axes)
    if (room <= 0).any():
        return None
    # Among options of equal damage the cheapest is preferred.
    spent = [
        worth + TIE_BREAK * np.array([problem.load(option.cost) for option in options])
        for worth, options in zip(damages, menus, strict=True)
    ]
    costs = [
        np.array([[option.cost[axis] for axis in axes] for option in options], dtype=np.float64)
        for options in menus
    ]
    found = allocate(spent, costs, room, exact=exact)
    if found is None:
        return None
    return [options[i] for options, i in zip(menus, found.chosen, strict=True)], found


def limits(ratios: Mapping[str, float], totals: Mapping[str, float]) -> Array:
    """[axes] the most that a whole model may cost, in the unit of each axis.

    Args:
        ratios: Axis to the largest share of the original model's figure.
        totals: Axis to that figure.
    """
    whole = {axis: ratio * totals[axis] for axis, ratio in ratios.items()}
    # Counts are whole numbers, times are not; nothing costs less than one.
    return np.array([x if axis == LATENCY else max(math.floor(x), 1) for axis, x in whole.items()])


def fixed(problem: Problem, axes: Sequence[str]) -> Array:
    """[axes] what the layers cost that are not among the sites."""
    return np.array(
        [problem.totals[axis] - sum(site.cost[axis] for site in problem.sites) for axis in axes]
    )


def within(used: Array, room: Array | float = 1.0) -> Any:
    """[...] whether costs [..., axes] are within the room, but for rounding."""
    return (used <= room * WITHIN).all(axis=-1)


def _lagrangian(damages: Sequence[Array], costs: Sequence[Array]) -> Allocation | None:
    """Price all axes alike, by their mean share of the limit."""

    def pick(price: float) -> list[int]:
        return [
            int(np.argmin(damage + price * cost.mean(axis=1)))
            for damage, cost in zip(damages, costs, strict=True)
        ]

    def used(chosen: Sequence[int]) -> Array:
        total: Array = np.sum([cost[i] for cost, i in zip(costs, chosen, strict=True)], axis=0)
        return total

    def dual(price: float) -> float:
        terms = sum(
            float(np.min(damage + price * cost.mean(axis=1)))
            for damage, cost in zip(damages, costs, strict=True)
        )
        return terms - price

    low, high = 0.0, 1.0
    if within(used(pick(low))):
        chosen = pick(low)
        return Allocation(tuple(chosen), _total(damages, chosen), _total(damages, chosen))
    for _ in range(200):
        if within(used(pick(high))):
            break
        high *= 4
    else:
        return None
    bound = -math.inf
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        bound = max(bound, dual(middle))
        if within(used(pick(middle))):
            high = middle
        else:
            low = middle
    chosen = _spend_slack(damages, costs, pick(high))
    return Allocation(tuple(chosen), _total(damages, chosen), max(bound, 0.0))


def _spend_slack(damages: Sequence[Array], costs: Sequence[Array], chosen: list[int]) -> list[int]:
    """Take the swaps that lower the damage most until none fits the budget."""
    used = np.sum([cost[i] for cost, i in zip(costs, chosen, strict=True)], axis=0)
    while True:
        best: tuple[float, int, int] | None = None
        for site, (damage, cost) in enumerate(zip(damages, costs, strict=True)):
            now = chosen[site]
            fits = within(used - cost[now] + cost)
            gains = np.where(fits, damage[now] - damage, 0.0)
            option = int(np.argmax(gains))
            if gains[option] > 0 and (best is None or gains[option] > best[0]):
                best = (float(gains[option]), site, option)
        if best is None:
            return chosen
        _, site, option = best
        used = used - costs[site][chosen[site]] + costs[site][option]
        chosen[site] = option


def _total(damages: Sequence[Array], chosen: Sequence[int]) -> float:
    return float(sum(damage[i] for damage, i in zip(damages, chosen, strict=True)))


def _integer_program(
    damages: Sequence[Array], costs: Sequence[Array], start: Allocation | None
) -> Allocation | None:
    """Solve with HiGHS through scipy; None if it finds no feasible choice."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    sizes = [len(damage) for damage in damages]
    owners = np.repeat(np.arange(len(sizes)), sizes)
    one_each = csr_matrix(
        (np.ones(len(owners)), (owners, np.arange(len(owners)))), shape=(len(sizes), len(owners))
    )
    flat = np.concatenate(damages)
    scale = float(flat.max()) or 1.0
    with stdout_to_stderr(without="Highs"):
        result = milp(
            flat / scale,
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(np.concatenate(costs).T, -np.inf, 1.0),
            ],
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            options={"time_limit": MILP_SECONDS, "mip_rel_gap": GOOD_GAP / 10},
        )
    if result.x is None:
        return None
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    chosen = [
        int(np.argmax(result.x[start : start + size]))
        for start, size in zip(offsets, sizes, strict=True)
    ]
    used = np.sum([cost[i] for cost, i in zip(costs, chosen, strict=True)], axis=0)
    if not within(used):  # within the solver's tolerance, not ours
        return None
    bound = result.mip_dual_bound
    known = start.bound if start is not None else 0.0
    lower = max(known, float(bound) * scale if bound is not None else 0.0)
    return Allocation(tuple(chosen), _total(damages, chosen), lower)


def damage(option: Option) -> float:
    """`damage_of` the error of an option."""
    return float(damage_of(option.error or 0.0, aware=option.factors.kind != "weights"))


def damage_of(error: Any, *, aware: bool) -> Any:
    """Squared relative error; of a weight, minus the log of the energy it retains.

    The two agree where little is lost. Errors of outputs say what a layer loses;
    those of weights only guess it, and −log(1 − e²) keeps a guess from giving up
    whole layers, whose error² is never above 1.

    Args:
        error: Relative errors, a number or an array.
        aware: Whether they are errors of the output.
    """
    squared = np.square(error)
    return squared if aware else -np.log(np.maximum(1.0 - squared, 1e-12))


def menu(problem: Problem, site: Site) -> list[Option]:
    """Every undominated option of a site, `keep` first, over all its methods."""
    rows: list[tuple[float, float, Decomposition, list[int]]] = []
    for method in site.methods:
        frontier = problem.frontier(site, method)
        kept = _thinned(frontier)
        rows += [
            (float(frontier.load[i]), float(frontier.error[i]), method, frontier.ranks[i].tolist())
            for i in kept
        ]
    options = [problem.keep(site, "dense is worth its cost here")]
    best, dense = math.inf, f"dense {problem.load_name}"
    for load, error, method, ranks in sorted(rows, key=lambda row: row[:2]):
        # Below rounding all errors are equal, and the cheapest option is the first.
        if error < best and best > NEGLIGIBLE_ERROR:
            best = error
            share = load / problem.load(site.cost)
            reason = f"least total damage within the budget ({100 * share:.0f}% of its {dense})"
            options.append(problem.option(site, method, ranks, reason))
    return options


def _thinned(frontier: Frontier) -> list[int]:
    """Indices of at most `MAX_OPTIONS` options, evenly spread over the load."""
    if len(frontier) <= MAX_OPTIONS:
        return list(range(len(frontier)))
    wanted = np.linspace(frontier.load[0], frontier.load[-1], MAX_OPTIONS)
    return sorted({int(i) for i in np.searchsorted(frontier.load, wanted, side="left")})


def sensitivities(problem: Problem, menus: Sequence[Sequence[Option]]) -> list[float] | None:
    """How far the model's outputs move per unit of squared error of each site alone.

    Returns:
        One figure per site; None without calibration inputs, or where the outputs of
        the model cannot be compared (a `RankoptWarning` then says so).
    """
    if problem.divergence is None:
        return None
    found = []
    for index, (site, options) in enumerate(zip(problem.sites, menus, strict=True)):
        probe = _probe(problem, site, options)
        if probe is None:
            found.append(1.0)
            continue
        try:
            moved = problem.divergence({index: probe})
        except CalibrationError as error:  # outputs whose shape depends on their values
            warn(f"sensitivities cannot be measured ({error}); all layers weigh alike")
            return None
        found.append(max(moved, 1e-12) / float(probe.error or 1.0) ** 2)
    return _finite(problem, found)


def _finite(problem: Problem, found: Sequence[float]) -> list[float]:
    """The sensitivities, with a large one for layers that leave no finite outputs."""
    lost = [i for i, figure in enumerate(found) if not math.isfinite(figure)]
    if not lost:
        return [*found]
    most = FATAL * max((figure for figure in found if math.isfinite(figure)), default=1.0)
    names = ", ".join(problem.sites[i].name for i in lost)
    warn(
        f"layer {names}: decomposed alone to half its cost, the model's outputs are not finite; it "
        f"weighs {FATAL:.0f} times as much as any other, ignore= leaves it dense"
    )
    return [most if i in lost else figure for i, figure in enumerate(found)]


def _probe(problem: Problem, site: Site, options: Sequence[Option]) -> Option | None:
    """The option to measure a site by: half its dense load, of a closed-form method if any.

    What matters is how far outputs move for a known error, whatever caused it.
    """
    closed = [method for method in site.methods if method.exact_error]
    found = [
        problem.option(site, method, frontier.ranks[i].tolist())
        for method in closed
        for frontier in [problem.frontier(site, method)]
        for i in _thinned(frontier)
    ]
    usable = [option for option in found or options if not option.keeps and option.error]
    target = PROBE_LOAD * problem.load(site.cost)
    return min(usable, key=lambda o: abs(problem.load(o.cost) - target), default=None)

"""Which ranks an axis allows, how others are rounded to them, and which choices are undominated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from rankopt._decompositions.base import RankAxis
from rankopt._utils.arguments import check_choice, check_integer
from rankopt.strategy.sites import Frontier

__all__ = [
    "ROUNDINGS",
    "allowed_ranks",
    "check_round_to",
    "check_rounding",
    "rank_step",
    "rounded_rank",
    "thinned",
    "undominated",
]

# Rank tuples looked at per site and method: every pair of up to 512 x 512.
GRID_POINTS: Final = 2**18
ROUNDINGS: Final = ("down", "nearest", "up")

Ranks = npt.NDArray[np.int64]


def check_round_to(round_to: int) -> None:
    """Raise ValueError unless ranks can be multiples of `round_to`."""
    check_integer("round_to", round_to, 1)


def check_rounding(rounding: str) -> None:
    """Raise ValueError unless `rounding` says which multiple a rank becomes."""
    check_choice("rounding", rounding, ROUNDINGS)


def rank_step(axis: RankAxis, round_to: int) -> int:
    """What ranks along an axis are multiples of; its own where `round_to` is too large."""
    both = math.lcm(round_to // math.gcd(round_to, axis.width), axis.step)
    return both if both <= axis.maximum else axis.step


def allowed_ranks(axis: RankAxis, round_to: int) -> Ranks:
    """The ranks that an axis and `round_to` allow, its maximum among them."""
    step = rank_step(axis, round_to)
    allowed = np.arange(step, axis.maximum + 1, step)
    return np.unique(np.append(allowed, axis.maximum)).astype(np.int64)


def rounded_rank(rank: int, axis: RankAxis, round_to: int, rounding: str) -> int:
    """`rank` as the allowed one that ``down``, ``nearest`` or ``up`` asks for."""
    step, maximum = rank_step(axis, round_to), axis.maximum
    if rank % step == 0 or rank == maximum:
        return rank
    below = rank // step * step
    above = min(below + step, maximum)
    if below == 0 or rounding == "up":
        return above
    if rounding == "nearest" and above - rank < rank - below:
        return above
    return below


def thinned(choices: Sequence[Ranks]) -> list[Ranks]:
    """Ranks per axis, evenly spread so that their grid stays within `GRID_POINTS`."""
    if math.prod(map(len, choices)) <= GRID_POINTS:
        return list(choices)
    most = int(GRID_POINTS ** (1 / len(choices)))
    picks = [np.unique(np.linspace(0, len(c) - 1, min(most, len(c))).astype(int)) for c in choices]
    return [choice[pick] for choice, pick in zip(choices, picks, strict=True)]


def undominated(
    choices: Sequence[Ranks],
    load: Callable[[Sequence[Any]], Any],
    error: Callable[[Sequence[Any]], Any],
    dense: float,
) -> Frontier:
    """The rank tuples below the load `dense` that no cheaper one equals in error.

    Args:
        choices: Ranks of each axis.
        load: Of grids of ranks, one per axis.
        error: The same.
        dense: Load of the layer as it is.
    """
    grids = np.meshgrid(*choices, indexing="ij", sparse=True)
    loads = np.broadcast_arrays(load(grids), *grids)[0].ravel()
    errors = np.broadcast_to(error(grids), [len(ranks) for ranks in choices]).ravel()
    cheaper = np.flatnonzero(loads < dense)
    order = cheaper[np.lexsort((errors[cheaper], loads[cheaper]))]
    best = np.minimum.accumulate(errors[order]) if len(order) else errors[order]
    improving = np.append(True, errors[order][1:] < best[:-1]) if len(order) else order
    chosen = order[np.asarray(improving, dtype=bool)]
    places = np.unravel_index(chosen, [len(ranks) for ranks in choices])
    ranks = np.stack([axis[i] for axis, i in zip(choices, places, strict=True)], axis=1)
    return Frontier(ranks, loads[chosen], errors[chosen])

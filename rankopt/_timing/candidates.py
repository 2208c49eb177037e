"""Which ranks are worth timing: hardware likes multiples and powers of two.

Time falls in steps as the rank shrinks; a step's fast side is where a rank should lie. So
instead of every rank, aligned ones are timed, and neighbours of the jumps between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["MULTIPLES", "aligned_below", "cliffs", "grid_values", "line", "lowest_on_line"]

MULTIPLES: Final = (8, 16, 32, 64)
# A jump is a fall in time this many times steeper than the fall in work.
CLIFF_STEEPNESS: Final = 2.0
# And at least this share of the time: less is noise.
CLIFF_HEIGHT: Final = 0.03

# Multiples that would give more ranks than this are too fine.
MAX_PER_STEP: Final = 10

Ranks = tuple[int, ...]


def grid_values(maximum: int, count: int, multiple: int = 1) -> npt.NDArray[np.int64]:
    """About `count` ranks up to `maximum`, evenly spaced and aligned, denser at the low end.

    Args:
        maximum: The largest rank, always among the result.
        count: How many, roughly.
        multiple: What the others are multiples of, if it is at most `maximum`.

    Example:
        >>> grid_values(64, 4).tolist()
        [4, 8, 16, 32, 48, 64]
    """
    least = multiple if multiple <= maximum else 1
    step = least
    while maximum > step * count:
        step *= 2
    values = {rank for rank in (step // 4, step // 2) if rank >= 4 and rank % least == 0}
    values |= set(range(step, maximum + 1, step)) | {maximum}
    return np.array(sorted(values), dtype=np.int64)


def line(ranks: Sequence[int], first: int) -> Ranks:
    """The point of the line through the origin and `ranks` whose largest rank is `first`.

    Example:
        >>> line((300, 150), 100)
        (100, 50)
    """
    longest = max(ranks)
    return tuple(max(1, min(rank, round(first * rank / longest))) for rank in ranks)


def lowest_on_line(ranks: Sequence[int], cost: Callable[[Ranks], float], limit: float) -> Ranks:
    """The largest point below `ranks` on its line that costs at most `limit`, else the smallest.

    Args:
        ranks: Where to begin.
        cost: Grows with every rank.
        limit: In the unit of `cost`.
    """
    low, high = 1, max(ranks)
    while low < high:
        middle = (low + high + 1) // 2
        if cost(line(ranks, middle)) <= limit:
            low = middle
        else:
            high = middle - 1
    return line(ranks, low)


def aligned_below(
    upper: Sequence[int], lower: Sequence[int], multiples: Iterable[int] = MULTIPLES
) -> list[Ranks]:
    """`upper`, `lower`, and what lies between them aligned to multiples and powers of two.

    Args:
        upper: The largest ranks, one per axis.
        lower: The smallest, on the same line.
        multiples: What to align to; empty for powers of two only.

    Example:
        >>> aligned_below((40,), (20,), (8,))
        [(40,), (32,), (24,), (20,)]
    """
    longest, shortest = max(upper), max(lower)
    steps = sorted(multiples)
    fine = [step for step in steps if longest - shortest <= MAX_PER_STEP * step]
    steps = fine or steps[-1:]
    targets = {2**power for power in range(longest.bit_length()) if 2**power >= shortest}
    for step in steps:
        targets |= set(range(-(-shortest // step) * step, longest + 1, step))
    found = {tuple(upper), tuple(lower)}
    for target in targets:
        point = line(upper, target)
        for step in steps or [1]:
            if target % step == 0 or not steps:
                found.add(tuple(_down(rank, step) for rank in point))
    within = [
        ranks
        for ranks in found
        if all(low <= r <= up for low, r, up in zip(lower, ranks, upper, strict=True))
    ]
    return sorted(within, key=lambda ranks: (-sum(ranks), ranks))


def _down(rank: int, step: int) -> int:
    return rank // step * step or rank


def cliffs(
    ranks: Sequence[int], latency: Sequence[float], work: Sequence[float]
) -> list[tuple[int, int]]:
    """(fast, slow) neighbours between which time falls far more steeply than work.

    Args:
        ranks: Ascending.
        latency: Time at each rank.
        work: MACs at each rank.

    Returns:
        The steepest first.

    Example:
        >>> cliffs([240, 248, 256, 264], [9.0, 9.1, 9.2, 12.0], [240, 248, 256, 264])
        [(256, 264)]
    """
    found = []
    for i in range(len(ranks) - 1):
        fall = (latency[i + 1] - latency[i]) / latency[i + 1]
        expected = (work[i + 1] - work[i]) / work[i + 1]
        if fall > CLIFF_HEIGHT and fall > CLIFF_STEEPNESS * expected:
            found.append((fall - expected, (ranks[i], ranks[i + 1])))
    return [pair for _, pair in sorted(found, reverse=True)]

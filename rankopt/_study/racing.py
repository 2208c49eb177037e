"""Stopping a trial early: when even its optimistic bound is beaten, or below what is asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

__all__ = ["Rival", "Values", "bound", "hopeless"]

# Batches seen before anything is concluded.
MIN_BATCHES: Final = 3
# So many batches of one value say something; three single images may well be alike.
ALIKE_BATCHES: Final = 10

Values = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Rival:
    """A finished trial that costs no more than the running one.

    Args:
        trial: Its number.
        values: Its (value, weight) of every batch.
    """

    trial: int
    values: Values


def bound(
    values: Sequence[float], weights: Sequence[float], total: int | None, confidence: float
) -> float:
    """Upper confidence bound on the mean over all batches, from those seen so far.

    Student's t with the weights' effective number of batches; where the number of
    batches is known, the error shrinks as they run out: √(1 − seen/total).

    Args:
        values: One per batch seen.
        weights: Of the batches.
        total: Batches in all; None if unknown.
        confidence: One-sided, such as 0.99.

    Example:
        >>> round(bound([0.5, 0.6, 0.7], [1, 1, 1], None, 0.975), 3)
        0.848
        >>> round(bound([0.5, 0.6, 0.7], [1, 1, 1], 3, 0.975), 6)
        0.6
    """
    from scipy.stats import t as student

    x, w = np.asarray(values, dtype=float), np.asarray(weights, dtype=float)
    mean = float(np.average(x, weights=w))
    effective = float(w.sum() ** 2 / np.square(w).sum())
    if effective <= 1:
        return math.inf
    variance = float(np.average((x - mean) ** 2, weights=w)) * effective / (effective - 1)
    left = 1.0 if total is None else max(0.0, 1 - len(x) / total)
    if variance == 0 and left > 0 and len(x) < ALIKE_BATCHES:
        return math.inf
    error = math.sqrt(variance / effective * left)
    return mean + float(student.ppf(confidence, effective - 1)) * error


def hopeless(
    values: Values,
    rivals: Sequence[Rival],
    *,
    maximise: bool,
    drop: float | None = None,
    dense: Values = (),
    total: int | None = None,
    confidence: float = 0.99,
) -> str | None:
    """Why a trial need not be finished; None if it should go on.

    A rival that was evaluated on the same batches is compared batch by batch, which
    takes out what makes a batch easy or hard for every model.

    Args:
        values: (value, weight) of the batches so far.
        rivals: Finished trials that cost no more.
        maximise: Whether a higher metric is better.
        drop: How much worse than the dense model is feasible; None for any.
        dense: (value, weight) of the dense model's batches, compared batch by batch too.
        total: Batches in all; None if unknown.
        confidence: Of each look, one-sided.
    """
    seen = len(values)
    if seen < MIN_BATCHES or seen == total:
        return None
    sign = 1.0 if maximise else -1.0
    mine = [sign * value for value, _ in values]
    weights = [weight for _, weight in values]

    def gained(theirs: Values) -> float | None:
        """Upper bound on the mean gain over another; None if it saw other batches."""
        if len(theirs) <= seen or [weight for _, weight in theirs[:seen]] != weights:
            return None
        gains = [a - sign * b for a, (b, _) in zip(mine, theirs, strict=False)]
        return bound(gains, weights, len(theirs), confidence)

    gain = gained(dense)
    if drop is not None and gain is not None and gain < -drop:
        return f"infeasible: after {seen} batches more than {drop:g} below the dense model"
    for rival in rivals:
        gain = gained(rival.values)
        if gain is not None:
            beaten = gain < 0
        else:
            theirs = [sign * value for value, _ in rival.values]
            every = [weight for _, weight in rival.values]
            best = float(np.average(theirs, weights=every))
            beaten = bound(mine, weights, total, confidence) < best
        if beaten:
            return (
                f"dominated: after {seen} batches behind trial {rival.trial}, which costs no more"
            )
    return None

"""Stopping a trial early: when even its optimistic bound is beaten, or below what is asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

__all__ = ["Rival", "bound", "hopeless"]

# Batches seen before anything is concluded.
MIN_BATCHES: Final = 3

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
    error = math.sqrt(variance / effective * left)
    return mean + float(student.ppf(confidence, effective - 1)) * error


def hopeless(
    values: Values,
    rivals: Sequence[Rival],
    *,
    maximise: bool,
    floor: float | None = None,
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
        floor: The worst metric that is feasible.
        total: Batches in all; None if unknown.
        confidence: Of each look, one-sided.
    """
    seen = len(values)
    if seen < MIN_BATCHES or seen == total:
        return None
    sign = 1.0 if maximise else -1.0
    mine = [sign * value for value, _ in values]
    weights = [weight for _, weight in values]
    if floor is not None and bound(mine, weights, total, confidence) < sign * floor:
        return f"infeasible: after {seen} batches the metric cannot reach {floor:.6g}"
    for rival in rivals:
        theirs = [sign * value for value, _ in rival.values]
        shared = [weight for _, weight in rival.values[:seen]]
        paired = len(theirs) > seen and shared == weights
        if paired:
            gains = [a - b for a, b in zip(mine, theirs, strict=False)]
            beaten = bound(gains, weights, len(theirs), confidence) < 0
        else:
            every = [weight for _, weight in rival.values]
            best = float(np.average(theirs, weights=every))
            beaten = bound(mine, weights, total, confidence) < best
        if beaten:
            return (
                f"dominated: after {seen} batches behind trial {rival.trial}, which costs no more"
            )
    return None

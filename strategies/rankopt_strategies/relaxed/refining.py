"""Ranks driven by a loss on data: gradients through the soft model, accepted when they pay."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from rankopt._progress import progress_bar
from rankopt.errors import ModelError, RankoptWarning
from rankopt.relaxation import Relaxation
from rankopt_strategies.relaxed.annealing import Record, anneal, at_entropy
from rankopt_strategies.relaxed.losses import Losses

__all__ = ["Refined", "certain", "first_choice", "refine"]

Array = npt.NDArray[np.float64]
# Entropy at which gradients are taken: the mixture's loss is then close to the
# expected one, and neighbouring ranks are told apart.
LOCAL_ENTROPY: Final = 0.08
# Share of the way (in logarithms) to what the gradient asks for that a round takes:
# ranks jump along their frontiers, so the gradient is to be trusted nearby only.
FIRST_STEP: Final = 0.1
LAST_STEP: Final = 0.01
GROWTH: Final = 1.5
# No gradient makes a site matter less or more than this, relative to the median.
RANGE: Final = (0.05, 20.0)


@dataclass(frozen=True)
class Refined:
    """What a refinement found.

    Args:
        chosen: [sites] index among all options.
        soft_loss: Loss of the mixture at the final entropy.
        loss: Loss of the discretised model.
        first_loss: Loss of the discretised model before the data had a say.
    """

    chosen: list[int]
    soft_loss: float
    loss: float
    first_loss: float


def refine(
    losses: Losses,
    damage: Array,
    weights: Array,
    *,
    entropy: float,
    rounds: int,
    record: Record,
) -> Refined:
    """Learn how much each site matters to the loss, at the ranks being chosen.

    The score of an option is its own damage times the weight of its site. A round
    takes the gradient of the loss with respect to the probabilities, over all batches
    and near the current ranks, and reads the weight of each site off the slope of the
    loss along its options. The annealed and rounded choice that follows is kept if
    its loss is lower; if not, the step is halved.

    Args:
        losses: Of a soft model that nobody else uses.
        damage: [options] in the sites' own units.
        weights: [sites] to start from.
        entropy: Where annealing ends.
        rounds: At most so many.
        record: Takes one step per round.

    Raises:
        ModelError: The loss of the starting choice is not finite.
    """
    relaxation = losses.soft.relaxation
    weights = weights / np.median(weights)
    chosen, probabilities, first = first_choice(losses, damage, weights, entropy)
    best = first
    step, wanted, slope_loss, prices = FIRST_STEP, None, 0.0, np.zeros(len(relaxation.axes))
    with progress_bar("refining ranks", rounds, enabled=relaxation.problem.progress) as advance:
        for _ in range(rounds):
            if wanted is None:
                wanted, slope_loss, near, prices = _wanted(losses, damage, weights)
            logarithms = np.log(weights)
            trial = np.exp(logarithms + step * (wanted - logarithms))
            found, spread = _settled(relaxation, trial, damage, entropy)
            loss = losses(certain(relaxation, found))
            record.add(
                relaxation, near, prices, soft_loss=slope_loss, loss=loss, best=min(best, loss)
            )
            if loss < best:  # false for NaN too
                best, chosen, probabilities, weights, wanted = loss, found, spread, trial, None
                step = min(step * GROWTH, 1.0)
            else:
                step /= 2
            advance()
            if step < LAST_STEP:
                break
    return Refined(chosen, losses(probabilities), best, first)


def first_choice(
    losses: Losses, damage: Array, weights: Array, entropy: float
) -> tuple[list[int], Array, float]:
    """The choice of least weighted damage, its distribution before rounding, its loss.

    Raises:
        ModelError: The loss is not finite.
    """
    relaxation = losses.soft.relaxation
    chosen, probabilities = _settled(relaxation, weights / np.median(weights), damage, entropy)
    first = losses(certain(relaxation, chosen))
    if not np.isfinite(first):
        raise ModelError(f"the loss of the first choice of ranks is {first}; check the criterion")
    return chosen, probabilities, first


def certain(relaxation: Relaxation, chosen: list[int]) -> Array:
    """[options] one for each chosen option."""
    sure = np.zeros(len(relaxation))
    sure[chosen] = 1.0
    return sure


def _settled(
    relaxation: Relaxation, weights: Array, damage: Array, entropy: float
) -> tuple[list[int], Array]:
    scores = weights[relaxation.owner] * damage
    logs, prices, _ = anneal(relaxation, scores, entropy, None)
    return relaxation.round(logs, scores, prices, exact=True), np.exp(logs)


def _wanted(losses: Losses, damage: Array, weights: Array) -> tuple[Array, float, Array, Array]:
    """Log-weights that the gradient asks for, the loss, and where it was taken."""
    relaxation = losses.soft.relaxation
    near, prices = at_entropy(relaxation, weights[relaxation.owner] * damage, LOCAL_ENTROPY)
    gradient, loss = losses.gradient(near)
    if not np.isfinite(gradient).all():
        warnings.warn(
            "the gradient of the loss is not finite at the current ranks: they stay as they are",
            RankoptWarning,
            stacklevel=4,
        )
        return np.log(weights), loss, near, prices
    # Least squares of the loss on the damage of each site, where its probability lies.
    centred = damage - relaxation.expected(damage, near)[relaxation.owner]
    spread = relaxation.expected(centred**2, near)
    slopes = relaxation.expected(gradient * centred, near) / np.maximum(spread, 1e-14)
    positive = slopes[slopes > 0]
    if not len(positive):
        return np.log(weights), loss, near, prices
    return np.log(np.clip(slopes / np.median(positive), *RANGE)), loss, near, prices

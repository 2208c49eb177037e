"""Ranks driven by a loss on data: gradients through the soft model, accepted when they pay."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from rankopt._utils.progress import progress_bar
from rankopt.errors import DeadlineExceeded, ModelError, warn
from rankopt.strategy.relaxation import Relaxation
from rankopt_strategies.relaxed.annealing import COOLING, LEVELS, Record, anneal, at_entropy
from rankopt_strategies.relaxed.losses import Losses

__all__ = ["Choice", "Refined", "certain", "closed", "first_choice", "refine", "settled"]

Array = npt.NDArray[np.float64]
# Entropy at which gradients are taken: the mixture's loss is then close to the
# expected one, and neighbouring ranks are told apart.
LOCAL_ENTROPY: Final = 0.08
# Share of the way (in logarithms) to what the gradient asks for that a round takes:
# ranks jump along their frontiers, so the gradient is to be trusted nearby only.
FIRST_STEP: Final = 0.1
LAST_STEP: Final = 0.01
GROWTH: Final = 1.5
# Annealing onto the choice: how the bonus of the chosen options grows, and where it ends.
BONUS_GROWTH: Final = 1.5
NEARLY: Final = 0.999
# No gradient makes a site matter less or more than this, relative to the median.
RANGE: Final = (0.05, 20.0)


@dataclass(frozen=True)
class Refined:
    """What a refinement found.

    Args:
        path: [sites] index among all options: of the first choice and of each with a lower
            loss than those before.
        losses: [path] of the discretised models.
        soft_loss: Loss of the mixture as its annealing ends.
        first_loss: Loss of the discretised model before the data had a say.
    """

    path: list[list[int]]
    losses: list[float]
    soft_loss: float
    first_loss: float


@dataclass(frozen=True)
class Choice:
    """Options as rounded, and the distribution they were rounded from.

    Args:
        chosen: [sites] index among all options.
        scores: [options] what each loses.
        spread: [options] probabilities.
        prices: [axes].
    """

    chosen: list[int]
    scores: Array
    spread: Array
    prices: Array


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
    kept, first = first_choice(losses, damage, weights, entropy)
    best, step, wanted = first, FIRST_STEP, None
    path, passed = [kept.chosen], [first]
    progress = progress_bar("refining ranks", rounds, enabled=relaxation.problem.progress)
    with suppress(DeadlineExceeded), progress as advance:  # there is a choice
        for _ in range(rounds):
            if wanted is None:
                wanted = _wanted(losses, damage, weights)
            logarithms = np.log(weights)
            trial = np.exp(logarithms + step * (wanted - logarithms))
            found = settled(relaxation, trial[relaxation.owner] * damage, entropy)
            loss, soft_loss = losses(certain(relaxation, found.chosen)), losses(found.spread)
            record.add(
                relaxation, found.spread, found.prices,
                soft_loss=soft_loss, loss=loss, best=min(best, loss),
            )  # fmt: skip
            if loss < best:  # false for NaN too
                best, kept, weights, wanted = loss, found, trial, None
                path.append(found.chosen)
                passed.append(loss)
                step = min(step * GROWTH, 1.0)
            else:
                step /= 2
            advance()
            if step < LAST_STEP:
                break
    return Refined(path, passed, closed(losses, kept, best, record), first)


def first_choice(
    losses: Losses, damage: Array, weights: Array, entropy: float
) -> tuple[Choice, float]:
    """The choice of least weighted damage, and its loss.

    Raises:
        ModelError: The loss is not finite.
    """
    relaxation = losses.soft.relaxation
    scores = (weights / np.median(weights))[relaxation.owner] * damage
    found = settled(relaxation, scores, entropy)
    first = losses(certain(relaxation, found.chosen))
    if not np.isfinite(first):
        raise ModelError(f"the loss of the first choice of ranks is {first}; check the criterion")
    return found, first


def closed(losses: Losses, choice: Choice, loss: float, record: Record) -> float:
    """Anneal onto a choice, within the budget, so that the mixture's loss meets the plan's.

    The minimum under the budget stays fractional in a site per axis, however cold, and its
    vertex need not be the choice of whole ranks. So a growing bonus on the chosen options
    goes with the cooling.

    Args:
        losses: Of the soft model.
        choice: What was chosen.
        loss: Its loss.
        record: Takes one step per level; in the last the choice is certain.

    Returns:
        The mixture's loss before the last step.
    """
    relaxation = losses.soft.relaxation
    sure = certain(relaxation, choice.chosen)
    _, prices, temperature = at_entropy(relaxation, choice.scores, LOCAL_ENTROPY)
    reduced = choice.scores + relaxation.shares @ prices
    least = np.minimum.reduceat(reduced, relaxation.starts)
    gap, bonus, soft_loss = float((reduced[choice.chosen] - least).sum()), 0.0, loss
    for _ in range(LEVELS):
        spread, prices = relaxation.priced(choice.scores - bonus * sure, temperature)
        try:
            soft_loss = losses(spread)
        except DeadlineExceeded:  # the choice is made
            break
        record.add(relaxation, spread, prices, soft_loss=soft_loss, loss=loss, best=loss)
        if spread[choice.chosen].min() >= NEARLY:
            break
        temperature *= COOLING
        bonus = max(BONUS_GROWTH * bonus, gap / 4 + temperature)
    record.add(relaxation, sure, prices, soft_loss=losses(sure), loss=loss, best=loss)
    return soft_loss


def certain(relaxation: Relaxation, chosen: list[int]) -> Array:
    """[options] one for each chosen option."""
    sure = np.zeros(len(relaxation))
    sure[chosen] = 1.0
    return sure


def settled(relaxation: Relaxation, scores: Array, entropy: float) -> Choice:
    """The choice of least score within the budget."""
    logs, prices, _ = anneal(relaxation, scores, entropy, None)
    chosen = relaxation.round(logs, scores, prices, exact=True)
    return Choice(chosen, scores, np.exp(logs), prices)


def _wanted(losses: Losses, damage: Array, weights: Array) -> Array:
    """Log-weights that the gradient asks for."""
    relaxation = losses.soft.relaxation
    near, _, _ = at_entropy(relaxation, weights[relaxation.owner] * damage, LOCAL_ENTROPY)
    gradient = losses.gradient(near)
    if not np.isfinite(gradient).all():
        warn("the gradient of the loss is not finite at the current ranks: they stay as they are")
        return np.log(weights)
    # Least squares of the loss on the damage of each site, where its probability lies.
    centred = damage - relaxation.expected(damage, near)[relaxation.owner]
    spread = relaxation.expected(centred**2, near)
    slopes = relaxation.expected(gradient * centred, near) / np.maximum(spread, 1e-14)
    positive = slopes[slopes > 0]
    if not len(positive):
        return np.log(weights)
    found: Array = np.log(np.clip(slopes / np.median(positive), *RANGE))
    return found

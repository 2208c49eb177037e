"""Ranks driven by a loss on data that is measured: trust-region steps on the sites' own curves."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from rankopt._utils.progress import progress_bar
from rankopt.errors import DeadlineExceeded
from rankopt.strategy.relaxation import Relaxation
from rankopt_strategies.relaxed.annealing import Record
from rankopt_strategies.relaxed.losses import Losses
from rankopt_strategies.relaxed.refining import (
    Choice,
    Refined,
    certain,
    closed,
    first_choice,
    settled,
)

__all__ = ["measured"]

Array = npt.NDArray[np.float64]
# How far a site is moved to see what the loss makes of it, as a ratio of its damage.
FIRST_RATIO: Final = 1.5
LAST_RATIO: Final = 1.1
# Shares of the measured range that a choice may use, until one does not pay: sites that
# move together lose more than the sum of what each loses alone.
REACHES: Final = (1.0, 0.6, 0.35, 0.2)
# Damage below which all options of a site are alike.
LEAST_DAMAGE: Final = 1e-9


@dataclass(frozen=True)
class _Curve:
    """What the loss makes of one site between two of its options, the others as they are.

    Args:
        start: Index of the site's first option among all.
        damage: [options of the site].
        now: Damage of the option it has.
        points: [measured] damages, ascending.
        rise: [measured] loss over the present one.
    """

    start: int
    damage: Array
    now: float
    points: Array
    rise: Array

    def scores(self, reach: float) -> Array:
        """[options] rise of the loss, interpolated; infinite beyond a share of the range."""
        ends = self.now + reach * (self.points[[0, -1]] - self.now)
        inside = (self.damage >= ends[0]) & (self.damage <= ends[1])
        found: Array = np.where(inside, np.interp(self.damage, self.points, self.rise), np.inf)
        found[self.damage == self.now] = 0.0
        return found


def measured(
    losses: Losses,
    damage: Array,
    weights: Array,
    *,
    entropy: float,
    rounds: int,
    record: Record,
) -> Refined:
    """Choices of lower and lower loss, each within a range where the loss was measured.

    A round moves each site alone to a cheaper and to a dearer option and measures the
    loss. Interpolated over the damage of the options in between, that is a score of
    every option nearby; the annealed and rounded choice of least score within the
    budget is kept if its loss is lower. A round without gain narrows the range.

    Args:
        losses: Of the soft model.
        damage: [options] in the sites' own units.
        weights: [sites] of the damage, for the first choice.
        entropy: Where annealing ends.
        rounds: At most so many.
        record: Takes one step per choice.

    Raises:
        ModelError: The loss of the first choice is not finite.
    """
    relaxation = losses.soft.relaxation
    kept, first = first_choice(losses, damage, weights, entropy)
    best, ratio = first, FIRST_RATIO
    path, passed = [kept.chosen], [first]
    progress = progress_bar("refining ranks", rounds, enabled=relaxation.problem.progress)
    with suppress(DeadlineExceeded), progress as advance:  # there is a choice
        for _ in range(rounds):
            curves = _curves(losses, kept.chosen, damage, ratio)
            improved = False
            for reach in REACHES:
                found = _choice(relaxation, curves, reach, entropy)
                if found.chosen == kept.chosen:
                    continue
                loss, soft_loss = losses(certain(relaxation, found.chosen)), losses(found.spread)
                lower = loss < best  # false for NaN too
                if lower:
                    best, kept, improved = loss, found, True
                    path.append(found.chosen)
                    passed.append(loss)
                record.add(
                    relaxation, found.spread, found.prices,
                    soft_loss=soft_loss, loss=loss, best=best,
                )  # fmt: skip
                if improved and not lower:
                    break
            advance()
            if not improved:
                ratio = ratio**0.5
                if ratio < LAST_RATIO:
                    break
    return Refined(path, passed, closed(losses, kept, best, record), first)


def _curves(losses: Losses, chosen: list[int], damage: Array, ratio: float) -> list[_Curve]:
    relaxation = losses.soft.relaxation
    base = losses.some(certain(relaxation, chosen))
    curves = []
    for site, (start, size) in enumerate(zip(relaxation.starts, relaxation.sizes, strict=True)):
        own, now = damage[start : start + size], chosen[site] - int(start)
        points, rise = [own[now]], [0.0]
        for place in _neighbours(own, now, ratio):
            moved = [*chosen]
            moved[site] = int(start) + place
            risen = losses.some(certain(relaxation, moved)) - base
            if np.isfinite(risen):
                points.append(own[place])
                rise.append(risen)
        order = np.argsort(points)
        curves.append(
            _Curve(int(start), own, float(own[now]), np.array(points)[order], np.array(rise)[order])
        )
    return curves


def _neighbours(damage: Array, now: int, ratio: float) -> list[int]:
    """The next options by cost whose damage is about a ratio away, on either side."""
    logs = np.log(np.maximum(damage, LEAST_DAMAGE))
    found = []
    if now + 1 < len(damage):
        found.append(max(now + 1, int(np.argmin(np.abs(logs - logs[now] + np.log(ratio))))))
    if now > 0:
        found.append(min(now - 1, int(np.argmin(np.abs(logs - logs[now] - np.log(ratio))))))
    return found


def _choice(relaxation: Relaxation, curves: list[_Curve], reach: float, entropy: float) -> Choice:
    """The choice of least score within reach."""
    scores = np.concatenate([curve.scores(reach) for curve in curves])
    scores -= np.minimum.reduceat(scores, relaxation.starts)[relaxation.owner]
    open_ = np.isfinite(scores)
    # Far enough above all that is open to be chosen never, near enough to compute with.
    scores[~open_] = 1e3 * max(float(scores[open_].max()), 1e-12)
    return settled(relaxation, scores, entropy)

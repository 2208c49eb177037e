"""Annealing: distributions over options that sharpen while the budget holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from rankopt.strategy.relaxation import Relaxation

__all__ = ["COOLING", "LEVELS", "Record", "anneal", "at_entropy", "finite"]

Array = npt.NDArray[np.float64]
# Each level of the annealing is this share of the one before.
COOLING: Final = 0.6
LEVELS: Final = 60
TEMPERATURE_TOLERANCE: Final = 0.05
# Steps of the record that are kept in a plan, whatever their number.
KEPT_STEPS: Final = 24


@dataclass
class Record:
    """What happened at each step, in numbers that fit into a plan.

    Args:
        sites: Names, in the order of every per-site list.
        steps: One mapping per step.
        listen: Called with each step as it is added, such as to log it.
        begin: Called once, with the steps of a run that is gone on with.
    """

    sites: list[str]
    steps: list[dict[str, Any]] = field(default_factory=list)
    listen: Callable[[dict[str, Any]], None] | None = None
    begin: Callable[[list[dict[str, Any]]], None] | None = None

    def add(
        self, relaxation: Relaxation, probabilities: Array, prices: Array, **facts: float
    ) -> None:
        """Note the distribution and whatever else is known of a step."""
        entropy = relaxation.entropy(probabilities)
        cost = relaxation.expected(relaxation.shares, probabilities)
        spent = cost.sum(axis=0) + 1.0 - relaxation.room
        dense = np.array([menu.shares[-1] for menu in relaxation.menus])
        noted = {
            "entropy": _rounded(entropy.mean()),
            "cost": {a: _rounded(s) for a, s in zip(relaxation.axes, spent, strict=True)},
            "prices": [_rounded(price) for price in prices],
            **{key: _rounded(value) for key, value in facts.items()},
            # How much of each site is left, and how sure that is.
            "kept": [_rounded(v, 3) for v in (cost / dense).mean(axis=1)],
            "surest": [
                _rounded(v, 3) for v in np.maximum.reduceat(probabilities, relaxation.starts)
            ],
        }
        self.step(noted)

    def step(self, facts: dict[str, Any]) -> None:
        """Note a step in the words of its search."""
        step = {"step": len(self.steps), **facts}
        self.steps.append(step)
        if self.listen is not None:
            self.listen(step)

    def restore(self, steps: list[dict[str, Any]]) -> None:
        """Go on after these steps; they are not listened to again."""
        self.steps = list(steps)
        if self.begin is not None:
            self.begin(self.steps)

    def summary(self) -> dict[str, Any]:
        """At most `KEPT_STEPS` steps, first and last included."""
        wanted = np.linspace(0, len(self.steps) - 1, min(len(self.steps), KEPT_STEPS))
        return {"sites": self.sites, "steps": [self.steps[round(i)] for i in wanted]}


def anneal(
    relaxation: Relaxation, scores: Array, entropy: float, record: Record | None
) -> tuple[Array, Array, float]:
    """Distributions of least expected score within the budget, down to an entropy.

    At every temperature the minimiser is known in closed form (`Relaxation.priced`),
    since the expected score is linear in the probabilities: no step size, no
    dependence on a start.

    Args:
        relaxation: The options.
        scores: [options] the loss of each.
        entropy: Mean entropy of the sites, in shares of the uniform one's, at which to stop.
        record: Takes one step per level, if given.

    Returns:
        Log-probabilities [options], prices [axes] and the final temperature.
    """
    temperature = float(np.ptp(scores)) or 1.0
    for _ in range(LEVELS):
        relaxation.problem.check_deadline()
        probabilities, prices = relaxation.priced(scores, temperature)
        if record is not None:
            loss = float(relaxation.expected(scores, probabilities).sum())
            record.add(relaxation, probabilities, prices, temperature=temperature, loss=loss)
        if float(relaxation.entropy(probabilities).mean()) <= entropy:
            break
        temperature *= COOLING
    logits = -(scores + relaxation.shares @ prices) / temperature
    peaks = np.maximum.reduceat(logits, relaxation.starts)
    logits = logits - peaks[relaxation.owner]
    totals = np.add.reduceat(np.exp(logits), relaxation.starts)
    return logits - np.log(totals)[relaxation.owner], prices, temperature


def at_entropy(relaxation: Relaxation, scores: Array, entropy: float) -> tuple[Array, Array, float]:
    """The distributions of least expected score at a mean entropy, prices and temperature."""
    high = low = float(np.ptp(scores)) or 1.0
    found = relaxation.priced(scores, low)
    for _ in range(LEVELS):
        if float(relaxation.entropy(found[0]).mean()) <= entropy:
            break
        high, low = low, low * COOLING
        found = relaxation.priced(scores, low)
    while high > (1 + TEMPERATURE_TOLERANCE) * low:
        middle = (low * high) ** 0.5
        tried = relaxation.priced(scores, middle)
        if float(relaxation.entropy(tried[0]).mean()) <= entropy:
            low, found = middle, tried
        else:
            high = middle
    return *found, low


def finite(value: Any) -> float | None:
    """A number for a plan file, whose JSON has no word for infinity or NaN."""
    return float(value) if np.isfinite(value) else None


def _rounded(value: Any, digits: int = 6) -> float | None:
    return finite(float(f"{float(value):.{digits}g}"))

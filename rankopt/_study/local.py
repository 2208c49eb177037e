"""A sampler that climbs: small steps from the points of the front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from rankopt._study.space import SIZE, SIZE_INDEX

__all__ = ["LocalSampler"]

# Standard deviation of a step, as a share of a parameter's range.
STEP: Final = 0.15
# How many parameters a step changes on average, beside one that it always changes.
MOVED: Final = 2.0
# How often the other parameters are those of another point of the front: what is good at
# one size is often good at others.
GRAFTED: Final = 0.3
# How often the size is the one drawn, instead of that of the point begun from.
RESIZED: Final = 0.3


class LocalSampler(optuna.samplers.BaseSampler):
    """Draws a size, takes the best point of the front within it, and moves a few parameters.

    Made for spaces with a parameter per layer around plans that are good already: the
    queued plans are its first front. It keeps nothing between trials, so any number of
    workers may use it on one study.

    Args:
        seed: None draws one.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._draw = np.random.default_rng(seed)
        self._random = optuna.samplers.RandomSampler(seed=seed)

    def reseed_rng(self) -> None:
        """Draw another seed, as Optuna asks of copies in other threads."""
        self._draw = np.random.default_rng()
        self._random.reseed_rng()

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Every real parameter that all trials have."""
        found = optuna.search_space.intersection_search_space(
            study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        )
        return {name: d for name, d in found.items() if isinstance(d, FloatDistribution)}

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        """A step from the front; empty, hence at random, before there is one."""
        if not search_space:
            return {}
        front = _front(study)
        name = SIZE_INDEX if SIZE_INDEX in search_space else SIZE
        size = search_space.get(name)
        if not isinstance(size, FloatDistribution):
            one = front[int(self._draw.integers(len(front)))]
            return self._stepped(dict(one.params), search_space)

        def at(params: Mapping[str, Any]) -> float:
            return float(params[name]) if name == SIZE else float(int(params[name]))

        drawn = float(self._draw.uniform(size.low, size.high))
        within = [point for point in front if at(point.params) <= at({name: drawn})]
        one = max(within or front, key=lambda point: at(point.params))
        other = front[int(self._draw.integers(len(front)))]
        made = dict((other if self._draw.random() < GRAFTED else one).params)
        resized = name == SIZE_INDEX or self._draw.random() < RESIZED or not within
        rest = {key: where for key, where in search_space.items() if key != name}
        moved = self._stepped({key: made[key] for key in rest}, rest) if rest else {}
        return {**moved, name: drawn if resized else one.params[name]}

    def _stepped(
        self, params: Mapping[str, float], space: Mapping[str, BaseDistribution]
    ) -> dict[str, float]:
        names = list(params)
        moves = self._draw.random(len(names)) < MOVED / len(names)
        moves[self._draw.integers(len(names))] = True
        made = dict(params)
        for name, moved in zip(names, moves, strict=True):
            where = space[name]
            assert isinstance(where, FloatDistribution)
            if moved:
                step = float(self._draw.normal(scale=STEP * (where.high - where.low)))
                made[name] = min(max(made[name] + step, where.low), where.high)
        return made

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """At random."""
        return self._random.sample_independent(study, trial, param_name, param_distribution)


def _front(study: optuna.Study) -> Sequence[FrozenTrial]:
    """Completed trials that no other beats, for any number of objectives."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    signs = [1 if d == optuna.study.StudyDirection.MINIMIZE else -1 for d in study.directions]
    values = np.array([trial.values for trial in trials], dtype=float) * signs
    beaten = [
        bool(((values <= row).all(axis=1) & (values < row).any(axis=1)).any()) for row in values
    ]
    return [trial for trial, lost in zip(trials, beaten, strict=True) if not lost]

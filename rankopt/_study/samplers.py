"""Samplers by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from rankopt.errors import MissingDependency, StudyError

if TYPE_CHECKING:
    import optuna

__all__ = ["DEFAULT_SAMPLER", "SAMPLERS", "make_sampler"]

DEFAULT_SAMPLER: Final = "tpe"
# Trials before a model of the results is made; queued plans count.
STARTUP_TRIALS: Final = 10
POPULATION: Final = 12

SAMPLERS: Final[dict[str, Callable[[Any, int | None], Any]]] = {
    "tpe": lambda samplers, seed: samplers.TPESampler(
        n_startup_trials=STARTUP_TRIALS, multivariate=True, seed=seed
    ),
    "tpe_independent": lambda samplers, seed: samplers.TPESampler(
        n_startup_trials=STARTUP_TRIALS, multivariate=False, seed=seed
    ),
    "nsgaii": lambda samplers, seed: samplers.NSGAIISampler(population_size=POPULATION, seed=seed),
    "nsgaiii": lambda samplers, seed: samplers.NSGAIIISampler(
        population_size=POPULATION, seed=seed
    ),
    "gp": lambda samplers, seed: samplers.GPSampler(n_startup_trials=STARTUP_TRIALS, seed=seed),
    "local": lambda samplers, seed: _local(seed),
    "qmc": lambda samplers, seed: samplers.QMCSampler(seed=seed),
    "random": lambda samplers, seed: samplers.RandomSampler(seed=seed),
}


def _local(seed: int | None) -> Any:
    from rankopt._study.local import LocalSampler

    return LocalSampler(seed)


def make_sampler(spec: Any, seed: int | None) -> optuna.samplers.BaseSampler:
    """The sampler called `spec`, or `spec` itself if it is one of Optuna's.

    Raises:
        StudyError: Unknown.
        MissingDependency: It needs a package that is not installed.
    """
    import optuna

    if isinstance(spec, optuna.samplers.BaseSampler):
        return spec
    if not isinstance(spec, str) or spec not in SAMPLERS:
        raise StudyError(
            f"sampler={spec!r}: expected one of {', '.join(SAMPLERS)}, or an Optuna sampler"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            made: optuna.samplers.BaseSampler = SAMPLERS[spec](optuna.samplers, seed)
        except ImportError as error:
            raise MissingDependency(f"sampler {spec!r}: {error}") from error
        return made

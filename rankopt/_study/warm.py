"""What a study begins with: the dense model and the plans of other strategies."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from rankopt._study.choices import FISHER
from rankopt._study.reading import counts
from rankopt._study.records import options_in, rows_of
from rankopt._study.space import Space
from rankopt.budget import Budget
from rankopt.errors import RankoptError, RankoptWarning, StudyError, warn
from rankopt.registry import strategies
from rankopt.strategy import Option, Problem

if TYPE_CHECKING:
    import optuna

__all__ = ["WARM_STARTS", "queue_dense", "queue_warm_starts", "warm_names"]

WARM_STARTS: Final = ("knapsack", "relaxed", "vbmf", "parameter_ratio")
# Shares of the objective's figure at which the first strategy's plans begin the front where
# there is no budget on it, and shares of the budget where there is one.
LADDER: Final = (0.7, 0.5, 0.35)
STEPS_BELOW: Final = (1.0, 0.8, 0.6)
DENSE: Final = "dense"


def warm_names(given: str | Sequence[str]) -> tuple[str, ...]:
    """The strategies to begin with; of the usual ones those that are installed.

    Raises:
        StudyError: One that was asked for is not registered.
    """
    names = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    unknown = [name for name in names if name not in strategies]
    if unknown and names != WARM_STARTS:
        raise StudyError(
            f"warm_starts={given!r}: there is no strategy {unknown[0]!r}; expected some of "
            f"{', '.join(strategies.names())}"
        )
    return tuple(name for name in names if name in strategies)


def queue_warm_starts(
    study: optuna.Study, problem: Problem, space: Space, names: Sequence[str]
) -> None:
    """Queue the plans of other strategies, each of them once.

    Where trials choose how factors are made, the first strategy's plans are queued with
    every such choice taken as well.

    Args:
        study: May hold some of them, from a process that was stopped while it queued.
        problem: The model at hand.
        space: Encodes the plans.
        names: Strategies; those that fail here are left out.
    """
    queued = {trial.user_attrs.get("warm") for trial in study.get_trials(deepcopy=False)}
    axis = space.axis
    top = space.shares.get(axis)
    if space.sizes:
        ladder = tuple(sorted(space.sizes, reverse=True))
    else:
        ladder = LADDER if top is None else tuple(top * step for step in STEPS_BELOW)
    others = ladder[:1] if top is not None or len(ladder) == 1 else ladder[1:2]
    chosen = ", ".join(space.switches)
    wanted = [
        (name, share, on)
        for position, name in enumerate(names)
        for on in ([False, True] if chosen and position == 0 else [False])
        for share in (ladder if position == 0 else others)
    ]
    for name, share, on in wanted:
        label = f"{name} at {share:.0%}" + (f", {chosen}" if on else "")
        if label in queued:
            continue
        given = problem.with_factors(fisher=True) if on and FISHER in space.switches else problem
        limits = Budget.from_dict({**space.shares, axis: share})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RankoptWarning)
                plan = strategies.create(name).search(given.with_budget(limits))
        except RankoptError:  # infeasible there, or not for this model
            continue
        except Exception as error:  # a plugin's fault is not to end the study
            warn(f"warm start {label} is left out: {type(error).__name__}: {error}")
            continue
        options = options_in(given, plan)
        _queue(study, space, label, space.switched_on(options) if on else space.own(options))


def queue_dense(study: optuna.Study, problem: Problem, space: Space) -> None:
    """Queue the dense model, which budgets on the metric are about, if it is not there.

    It is queued again where an evaluation that failed left it without a result. Trials that
    workers lost are not looked at: who finds one queues it again.
    """
    there = [t for t in study.get_trials(deepcopy=False) if t.user_attrs.get("warm") == DENSE]
    if all(trial.state.name == "FAIL" and counts(trial) for trial in there):
        _queue(study, space, DENSE, [problem.keep(site, "dense") for site in problem.sites])


def _queue(study: optuna.Study, space: Space, label: str, options: Sequence[Option]) -> None:
    study.enqueue_trial(space.encode(options), {"warm": label, "plan": rows_of(options)})

"""open_study(): find or make the study of a described problem, queue what other strategies know."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rankopt._search.model_clock import adopt_times, bounds_latency
from rankopt._study.choices import make_space
from rankopt._study.devices import opening_lock
from rankopt._study.reading import DEFAULT_NAME, quiet
from rankopt._study.records import (
    ATTRIBUTE,
    SCHEMA,
    check_request,
    options_of,
    read_request,
    template,
)
from rankopt._study.samplers import DEFAULT_SAMPLER, SAMPLERS, make_sampler
from rankopt._study.storage import HEARTBEAT_SECONDS, open_storage, shown, storage_errors
from rankopt._study.study import Study
from rankopt._study.trial import Runner
from rankopt._study.warm import WARM_STARTS, queue_dense, queue_warm_starts, warm_names
from rankopt._timing.latency import Measured
from rankopt._utils.arguments import is_number
from rankopt._version import __version__
from rankopt.errors import BudgetError, ModelError, StudyError
from rankopt.plan import RankPlan
from rankopt.strategy import LATENCY, Problem

__all__ = ["existing", "open_study"]


def open_study(
    problem: Problem,
    *,
    storage: Any = None,
    where: str = "memory",
    name: str = DEFAULT_NAME,
    objective: str | None = None,
    direction: str | None = None,
    space: str | None = None,
    sizes: Sequence[float] | None = None,
    switched: bool = False,
    asymmetric: bool | str = False,
    sampler: Any = None,
    confidence: float | None = 0.99,
    warm_starts: str | Sequence[str] = WARM_STARTS,
    batches: int | None = None,
    heartbeat: int = HEARTBEAT_SECONDS,
    seed: int | None = 0,
    extra: Mapping[str, Any] | None = None,
    finish: Callable[[RankPlan], RankPlan] | None = None,
) -> Study:
    """A study of a problem that is described already; other arguments as of `study`.

    `problem` has `evaluate`, and its budget is the study's; `where` names the storage in
    messages; `switched` and `asymmetric` are as of `make_space`; `batches` is how many
    `evaluate` goes through, if known; `extra` is kept with the study; `finish` verifies the
    plans that `Study.best` gives.
    """
    import optuna

    if problem.evaluate is None:
        raise ModelError("a study needs evaluate=")
    begins = warm_names(warm_starts)
    opened = open_storage(storage, heartbeat=heartbeat)
    in_memory = isinstance(opened, optuna.storages.InMemoryStorage)
    with contextlib.nullcontext() if in_memory else opening_lock(where, name):
        known = existing(opened, name)
        if LATENCY in problem.totals and known is not None and known.get("times") is not None:
            adopt_times(problem, known["times"])
        axis = _axis(problem, objective, known)
        sense = _sense(direction, known)
        if confidence is not None and not (is_number(confidence) and 0.5 < confidence < 1):
            raise StudyError(f"confidence={confidence!r}: expected a number above 0.5 and below 1")
        _check_budget(problem, sense)
        request: dict[str, Any] = {
            "schema": SCHEMA,
            "version": __version__,
            "model": dict(problem.model),
            "objective": axis,
            "direction": sense,
            "budget": None if problem.budget is None else problem.budget.to_dict(),
            "calibration": problem.calibration,
            "round_to": problem.round_to,
            "rounding": problem.rounding,
            "fisher": "search" if switched else problem.fisher,
            "asymmetric": asymmetric,
        }
        if known is not None:
            asked = {
                "space": space,
                "sizes": sorted({float(size) for size in sizes or ()}),
                "methods": list(problem.methods),
            }
            given = {key: value for key, value in asked.items() if value}
            check_request(known, {**request, **given, "totals": problem.totals}, name)
        spec = None if known is None else known["space"]
        kind = space or (spec or {}).get("kind", "warp")
        made = make_space(
            kind, problem, axis, spec, switched=switched, asymmetric=asymmetric, sizes=sizes
        )
        chosen = sampler or _known_sampler(known)
        with storage_errors(where), quiet():
            inner = optuna.create_study(
                storage=opened,
                study_name=name,
                directions=[sense, "minimize"],  # type: ignore[list-item]
                sampler=make_sampler(chosen, _continued(seed, chosen, opened, name, known)),
                load_if_exists=True,
            )
            if known is None:
                settings = dict(extra or {})
                request |= {
                    "space": made.describe(),
                    "sampler": chosen if isinstance(chosen, str) else type(chosen).__name__,
                    "seed": seed,
                    "plan": template(problem, settings.pop("environment", {})),
                    "times": _times(problem),
                    "methods": list(problem.methods),
                    **settings,
                }
                inner.set_metric_names(["metric", axis])
                inner.set_user_attr(ATTRIBUTE, request)
            queue_dense(inner, problem, made)
            if not inner.user_attrs.get("queued"):
                queue_warm_starts(inner, problem, made, begins)
                inner.set_user_attr("queued", True)
    runner = Runner(
        problem,
        made,
        direction=sense,
        batches=batches,
        confidence=confidence,
        measure=_measure(problem),
    )
    return Study(inner, where=where, heartbeat=heartbeat, runner=runner, finish=finish)


def _axis(problem: Problem, objective: str | None, known: Mapping[str, Any] | None) -> str:
    """The figure to make small: what was asked for, else the study's, else a default."""
    axis = objective or (known or {}).get("objective")
    if axis is None:
        if bounds_latency(problem.budget):
            return LATENCY
        return "macs" if "macs" in problem.totals else "params"
    if not isinstance(axis, str) or axis not in problem.totals:
        raise StudyError(
            f"objective={axis!r}: expected one of {', '.join(problem.totals)}"
            + ("" if "macs" in problem.totals else "; macs and latency need example_inputs")
        )
    return axis


def _known_sampler(known: Mapping[str, Any] | None) -> str:
    """The name of the study's sampler, which a new study has by default."""
    found = (known or {}).get("sampler", DEFAULT_SAMPLER)
    if found not in SAMPLERS:
        raise StudyError(
            f"the study was begun with a sampler of the caller's own ({found}): give sampler= "
            f"again, or a name such as {DEFAULT_SAMPLER!r}"
        )
    return str(found)


def _sense(direction: str | None, known: Mapping[str, Any] | None) -> str:
    """Whether the metric is better when higher."""
    sense = direction or (known or {}).get("direction", "maximize")
    if sense not in ("maximize", "minimize"):
        raise StudyError(f"direction={sense!r}: expected 'maximize' or 'minimize'")
    return str(sense)


def _continued(
    seed: int | None, sampler: Any, storage: Any, name: str, known: Mapping[str, Any] | None
) -> int | None:
    """A seed of its own for a study that goes on: its first draws are not to come again."""
    import numpy as np
    import optuna

    # Quasi-random sequences count their points in the storage, and go on by themselves.
    if seed is None or known is None or sampler == "qmc":
        return seed
    trials = optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)
    begun = sum(trial.state.name != "WAITING" for trial in trials)
    return int(np.random.SeedSequence([seed, begun]).generate_state(1)[0]) if begun else seed


def existing(storage: Any, name: str) -> dict[str, Any] | None:
    """The request of a study that is there already."""
    import optuna

    with storage_errors(shown(storage)), quiet():
        if name not in optuna.get_all_study_names(storage):
            return None
        found = optuna.load_study(study_name=name, storage=storage)
        if not found.user_attrs and not found.get_trials(deepcopy=False):
            return None  # its maker stopped before it wrote down what it is for
        return read_request(found.user_attrs, name)


def _times(problem: Problem) -> dict[str, Any] | None:
    """What every worker prices time by; None where the study knows none."""
    if LATENCY not in problem.totals:
        return None
    assert problem.times is not None
    return {"dense_ms": problem.totals[LATENCY], **problem.times.to_dict(problem.sites)}


def _measure(problem: Problem) -> Callable[[Any], Measured] | None:
    """Times the whole model of a trial's rows; None where the study knows no time."""
    time_model = problem.measure
    if LATENCY not in problem.totals or time_model is None:
        return None
    return lambda rows: time_model(options_of(problem, rows, "on the front"))


def _check_budget(problem: Problem, direction: str) -> None:
    budget = problem.budget
    if budget is None:
        return
    known = {*problem.totals, "metric_drop", *(["latency_ms"] if LATENCY in problem.totals else [])}
    unknown = [axis for axis in budget.axes if axis not in known]
    if unknown:
        raise BudgetError(
            f"a study cannot keep to a budget on {', '.join(unknown)}: it knows "
            f"{', '.join(problem.totals)}"
        )
    if budget.metric_drop is not None and budget.direction != direction:
        raise BudgetError(
            f"the budget's metric is to {budget.direction}, the study's to {direction}: give both "
            "the same direction"
        )

"""study(): describe the model, open or make the study, queue what other strategies know."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from rankopt import measure
from rankopt._latency_budget import ModelClock, adopt_times, bounds_latency, price_time
from rankopt._open import open_problem
from rankopt._study.devices import opening_lock
from rankopt._study.reading import DEFAULT_NAME, load_optuna, quiet
from rankopt._study.records import (
    ATTRIBUTE,
    SCHEMA,
    check_request,
    options_of,
    read_request,
    template,
)
from rankopt._study.samplers import DEFAULT_SAMPLER, make_sampler
from rankopt._study.space import make_space
from rankopt._study.storage import (
    DEFAULT_STORAGE,
    HEARTBEAT_SECONDS,
    open_storage,
    shown,
    storage_errors,
)
from rankopt._study.study import Study
from rankopt._study.trial import Runner
from rankopt._study.warm import WARM_STARTS, queue_dense, queue_warm_starts
from rankopt._verify import environment
from rankopt._version import __version__
from rankopt.budget import Budget
from rankopt.decompositions.base import Decomposition
from rankopt.errors import BudgetError, ModelError, StudyError
from rankopt.inputs import MAX_SAMPLES
from rankopt.latency import Measured
from rankopt.layers import Patterns
from rankopt.plan import RankPlan
from rankopt.profile_table import ProfileTable
from rankopt.strategy import LATENCY, Problem, Strategy

__all__ = ["open_study", "study"]


@measure.outside_inference_mode
def study(
    model: nn.Module,
    budget: str | Budget | None = None,
    *,
    evaluate: Callable[..., Any],
    batches: Sequence[Any] | None = None,
    storage: Any = DEFAULT_STORAGE,
    name: str = DEFAULT_NAME,
    objective: str | None = None,
    direction: Literal["maximize", "minimize"] | None = None,
    space: str | None = None,
    sampler: Any = None,
    confidence: float | None = 0.99,
    warm_starts: Sequence[str] = WARM_STARTS,
    create: bool = True,
    heartbeat: int = HEARTBEAT_SECONDS,
    example_inputs: Any = None,
    calibration: Any = None,
    calibration_samples: int | None = MAX_SAMPLES,
    fisher: bool | Literal["search"] | None = None,
    asymmetric: bool | Literal["search"] | None = None,
    methods: Sequence[str | Decomposition] | None = None,
    only: Patterns | None = None,
    ignore: Patterns | None = None,
    round_to: int | None = None,
    rounding: Literal["down", "nearest", "up"] | None = None,
    profile: ProfileTable | None = None,
    seed: int | None = 0,
    progress: bool | None = None,
) -> Study:
    """Open a study of a model's plans on its real metric, or begin one; then `Study.run`.

    Every trial builds a model, refreshes BatchNorm statistics (with `calibration`) and
    calls `evaluate`. Plans of the strategies in `warm_starts` are queued first, with
    the dense model. What the request leaves at None is taken from the study, if there
    is one; a study made for another model, budget or space is refused.

    Args:
        model: A trained model; not changed.
        budget: Bounds that plans shall keep to; trials over it are not evaluated. None
            searches the whole front. Of latency see `objective`.
        evaluate: ``evaluate(model)`` gives the metric, or yields it batch by batch: a
            number, or a pair of number and weight. With `batches`,
            ``evaluate(model, batch)`` gives it for one. Metrics that come in batches
            let hopeless trials be stopped early.
        batches: A sequence, the same and in the same order for all trials.
        storage: A path (SQLite, the default; ``*.journal`` for a journal file), any URL
            Optuna or SQLAlchemy knows, an Optuna storage, or None for memory.
        name: The study's name in the storage.
        objective: The figure to make small: ``macs`` (default with example inputs),
            ``params``, ``memory`` or ``latency`` (default under a budget on it). Layers
            are timed once, by whoever makes the study; trials predict from that, and the
            models of the front are timed when the trials are done (`Study.measure`).
        direction: Whether the metric is better when higher (``maximize``, the default)
            or lower (``minimize``).
        space: ``warp`` (default): a few multipliers over the layers' sensitivities, and
            the size; ``tilt``: a multiplier per layer, and the size, for ``local``;
            ``stage``: one share per stage; ``layer``: one share per layer.
        sampler: ``tpe`` (default), ``local`` (small steps from the front), ``nsgaii``,
            ``nsgaiii``, ``gp``, ``random``, … or an Optuna sampler.
        confidence: Of stopping a trial early, one-sided; None never does.
        warm_starts: Strategies whose plans are queued first; those that are not
            installed or cannot treat the model are left out.
        create: Whether to make the study if it is not there.
        heartbeat: Seconds between a worker's signs of life; after three without one its
            trial is given to another. The same for all workers.
        example_inputs: As of `rankopt.search`.
        calibration: As of `rankopt.search`; the same for all workers.
        calibration_samples: As of `rankopt.search`.
        fisher: As of `rankopt.search`; ``search`` lets each trial choose, and begins without.
        asymmetric: The same; a trial takes two partial runs of the calibration inputs per layer.
        methods: As of `rankopt.search`; None for svd, tucker2 and spatial_svd.
        only: As of `rankopt.search`.
        ignore: As of `rankopt.search`.
        round_to: As of `rankopt.search`.
        rounding: As of `rankopt.search`.
        profile: As of `rankopt.search`; None takes the study's clock and rounds.
        seed: Of the sampler; None draws one, as workers that join should.
        progress: Whether to show progress bars while preparing.

    Raises:
        StudyError: The storage fails, or the study was made for something else.
        BudgetError: The budget is one a study cannot keep to.
        ModelError: As of `rankopt.search`.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
        >>> x = torch.randn(256, 64)
        >>> y = net(x).argmax(1)
        >>> accuracy = lambda model: float((model(x).argmax(1) == y).float().mean())
        >>> made = rankopt.study(net, evaluate=accuracy, storage=None)
        >>> plan = made.run(n_trials=12).best("params<=60%")
        >>> rankopt.compare(net, rankopt.apply(net, plan)).params.ratio <= 0.6
        True
    """
    if not callable(evaluate):
        raise ModelError(f"evaluate={evaluate!r}: expected a function of a model")
    known: dict[str, Any] | None = None
    where = shown(storage)
    opened_storage = open_storage(storage, heartbeat=heartbeat)
    if not create:
        inner = load_optuna(opened_storage, name, where=where)
        known = read_request(inner.user_attrs, name)
    else:
        known = _existing(opened_storage, name)
    wanted = _own_or_known(budget, known)
    given = {"only": only, "ignore": ignore, "methods": methods}
    chosen = {key: _given(key, value, known) for key, value in given.items()}
    axes = wanted.axes if wanted is not None else ()
    weighing = _choice("fisher", fisher, known, calibration)
    ordering = _choice("asymmetric", asymmetric, known, calibration)
    timed = objective == LATENCY or bounds_latency(wanted) or (known or {}).get("times") is not None
    for axis in ("macs", LATENCY):
        if example_inputs is None and (axis in (*axes, objective) or (timed and axis == LATENCY)):
            raise BudgetError(
                f"{axis}: need example_inputs, a tensor, a tuple or a dict to call with"
            )
    with torch.no_grad(), measure.preserve_rng():
        opened = open_problem(
            model,
            wanted,
            example_inputs=example_inputs,
            calibration=calibration,
            calibration_samples=calibration_samples,
            evaluate=evaluate,
            batches=batches,
            methods=chosen["methods"] or Strategy.methods,
            only=chosen["only"] or (),
            ignore=chosen["ignore"] or (),
            progress=progress,
        )
        problem = opened.problem
        problem.round_to = round_to or (known or {}).get("round_to", 1)
        problem.rounding = rounding or (known or {}).get("rounding", "down")
        problem.fisher = weighing is True
        if timed:
            assert opened.seen is not None
            table = profile or _table(known)
            clock = ModelClock(opened.source, example_inputs, table)
            times = None if known is None else known.get("times")
            price_time(problem, clock, opened.seen, axis=True, known=times)
        return open_study(
            problem,
            storage=opened_storage,
            where=where,
            name=name,
            objective=objective,
            direction=direction,
            space=space,
            switched=weighing == "search",
            asymmetric=ordering,
            sampler=sampler,
            confidence=confidence,
            warm_starts=warm_starts,
            batches=None if batches is None else len(batches),
            heartbeat=heartbeat,
            seed=seed,
            extra={
                "environment": environment(opened.source, example_inputs),
                **({"profile": _settings(table)} if timed else {}),
                **{key: _names(key, value) for key, value in chosen.items()},
            },
            finish=lambda plan: opened.finish(plan, seconds=plan.seconds),
        )


def open_study(
    problem: Problem,
    *,
    storage: Any = None,
    where: str = "memory",
    name: str = DEFAULT_NAME,
    objective: str | None = None,
    direction: str | None = None,
    space: str | None = None,
    switched: bool = False,
    asymmetric: bool | str = False,
    sampler: Any = None,
    confidence: float | None = 0.99,
    warm_starts: Sequence[str] = WARM_STARTS,
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
    opened = open_storage(storage, heartbeat=heartbeat)
    in_memory = isinstance(opened, optuna.storages.InMemoryStorage)
    with contextlib.nullcontext() if in_memory else opening_lock(where, name):
        known = _existing(opened, name)
        if LATENCY in problem.totals and known is not None and known.get("times") is not None:
            adopt_times(problem, known["times"])
        axis = objective or (known or {}).get("objective") or _default_axis(problem)
        if axis not in problem.totals:
            raise StudyError(
                f"objective={axis!r}: expected one of {', '.join(problem.totals)}"
                + ("" if "macs" in problem.totals else "; macs and latency need example_inputs")
            )
        sense = direction or (known or {}).get("direction", "maximize")
        if sense not in ("maximize", "minimize"):
            raise StudyError(f"direction={sense!r}: expected 'maximize' or 'minimize'")
        if confidence is not None and not 0.5 < confidence < 1:
            raise StudyError(f"confidence={confidence!r}: expected a number above 0.5 and below 1")
        _check_budget(problem, sense)
        request = {
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
            asked = {**request, **({"space": space} if space else {})}
            check_request(known, asked, name)
        spec = None if known is None else known["space"]
        kind = space or (spec or {}).get("kind", "warp")
        made = make_space(kind, problem, axis, spec, switched=switched, asymmetric=asymmetric)
        chosen = sampler or (known or {}).get("sampler") or DEFAULT_SAMPLER
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
                    **settings,
                }
                inner.set_metric_names(["metric", axis])
                inner.set_user_attr(ATTRIBUTE, request)
            queue_dense(inner, problem, made)
            if not inner.user_attrs.get("queued"):
                queue_warm_starts(inner, problem, made, warm_starts)
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


def _existing(storage: Any, name: str) -> dict[str, Any] | None:
    """The request of a study that is there already."""
    import optuna

    with storage_errors(shown(storage)), quiet():
        if name not in optuna.get_all_study_names(storage):
            return None
        found = optuna.load_study(study_name=name, storage=storage)
        if not found.user_attrs and not found.get_trials(deepcopy=False):
            return None  # its maker stopped before it wrote down what it is for
        return read_request(found.user_attrs, name)


def _own_or_known(budget: Any, known: Mapping[str, Any] | None) -> Budget | None:
    if budget is None and known is not None and known["budget"] is not None:
        return Budget.from_dict(known["budget"])
    return Budget.parse(budget)


def _given(key: str, value: Any, known: Mapping[str, Any] | None) -> Any:
    """What was asked for, or the names the study keeps."""
    if value is not None or known is None:
        return value
    stored = known.get(key)
    if stored is not None and any(one.startswith("<") for one in stored):
        raise StudyError(f"the study was made with {key}= that is no text: give the same again")
    return stored


def _choice(
    name: str, value: Any, known: Mapping[str, Any] | None, calibration: Any
) -> bool | Literal["search"]:
    """Whether factors are made in some way; ``search`` leaves it to the trials."""
    wanted = (known or {}).get(name, False) if value is None else value
    if wanted not in (True, False, "search"):
        raise StudyError(f"{name}={wanted!r}: expected True, False or 'search'")
    if wanted and calibration is None:
        raise ModelError(f"{name}={wanted!r} needs calibration=: inputs to make factors with")
    return "search" if wanted == "search" else bool(wanted)


def _names(key: str, value: Any) -> list[str] | None:
    """Globs and names as text; functions and instances only as a remark."""
    if value is None:
        return None
    every = [value] if isinstance(value, str) or callable(value) else list(value)
    return [one if isinstance(one, str) else f"<{one!r}>" for one in every]


def _default_axis(problem: Problem) -> str:
    if bounds_latency(problem.budget):
        return LATENCY
    return "macs" if "macs" in problem.totals else "params"


def _table(known: Mapping[str, Any] | None) -> ProfileTable:
    """Timed as the study was begun; the user's own defaults for a new one."""
    settings = (known or {}).get("profile", {})
    if settings.get("clock") == "custom":
        raise StudyError(
            "the study was begun with a clock of the caller's own: give profile= again"
        )
    return ProfileTable(**settings)


def _settings(table: ProfileTable) -> dict[str, Any]:
    return {
        "mode": table.mode,
        "rounds": table.rounds,
        "cuda_graph": table.cuda_graph,
        "compile": table.compile,
        "clock": table.clock_name,
    }


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

"""study(): describe a model, or take up what a study of it knows, and open the study."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from rankopt._decompositions.base import Decomposition
from rankopt._model import measure, surgery
from rankopt._model.inputs import MAX_SAMPLES
from rankopt._model.metric import Evaluate, EvaluateBatch
from rankopt._model.patterns import Patterns
from rankopt._search.describe import as_text
from rankopt._search.model_clock import ModelClock, bounds_latency, price_time
from rankopt._search.opening import open_problem
from rankopt._search.verify import environment
from rankopt._study.opening import existing, open_study
from rankopt._study.reading import DEFAULT_NAME, load_optuna
from rankopt._study.records import (
    read_request,
)
from rankopt._study.storage import (
    DEFAULT_STORAGE,
    HEARTBEAT_SECONDS,
    open_storage,
    shown,
)
from rankopt._study.study import Study
from rankopt._study.warm import WARM_STARTS
from rankopt._timing.profile_table import ProfileTable, check_table
from rankopt._utils.arguments import check_integer, is_number
from rankopt.budget import Budget, check_inputs
from rankopt.errors import ModelError, StudyError
from rankopt.strategy import LATENCY, Strategy
from rankopt.strategy.rank_choices import check_round_to, check_rounding
from rankopt.strategy.settings import Settings

__all__ = ["study"]


@measure.outside_inference_mode
def study(
    model: nn.Module,
    budget: str | Budget | None = None,
    *,
    evaluate: Evaluate | EvaluateBatch,
    batches: Sequence[Any] | None = None,
    storage: Any = DEFAULT_STORAGE,
    name: str = DEFAULT_NAME,
    objective: str | None = None,
    direction: Literal["maximize", "minimize"] | None = None,
    space: str | None = None,
    sizes: Sequence[float] | None = None,
    sampler: Any = None,
    confidence: float | None = 0.99,
    warm_starts: str | Sequence[str] = WARM_STARTS,
    create: bool = True,
    heartbeat: int = HEARTBEAT_SECONDS,
    example_inputs: Any = None,
    calibration: Any = None,
    calibration_samples: int | None = MAX_SAMPLES,
    fisher: bool | Literal["search"] | None = None,
    asymmetric: bool | Literal["search"] | None = None,
    methods: str | Decomposition | Sequence[str | Decomposition] | None = None,
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
        evaluate: The task's metric, see `rankopt.Evaluate`. With `batches`,
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
        sizes: Shares of the objective's figure that plans are wanted at, such as
            ``(0.7, 0.5, 0.35)``: every trial uses up one of them, in the spaces ``warp`` and
            ``tilt``. None leaves the size to the trials.
        sampler: ``tpe`` (default), ``local`` (small steps from the front), ``nsgaii``,
            ``nsgaiii``, ``gp``, ``random``, … or an Optuna sampler.
        confidence: Of stopping a trial early, one-sided; None never does.
        warm_starts: Strategies whose plans are queued first; those that cannot treat the
            model are left out.
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
        StudyError: The storage fails, the study was made for something else, or a setting of
            the study itself, such as `space` or `sampler`, is none it knows.
        BudgetError: The budget is one a study cannot keep to, or needs inputs not given; its
            `BudgetInfeasible` where no plan fits.
        ModelError: As of `rankopt.search`; also `evaluate` is no function.
        LayerError: As of `rankopt.search`.
        CalibrationError: As of `rankopt.search`.
        RegistryError: No decomposition of that name.
        ValueError: `round_to`, `rounding`, `calibration_samples` or `seed` out of range, or
            `profile` is no table.

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
    surgery.check_model(model)
    check_table(profile, "profile")
    if not callable(evaluate):
        raise ModelError(f"evaluate={evaluate!r}: expected a function of a model")
    if not isinstance(name, str) or not name:
        raise StudyError(f"name={name!r}: expected the study's name, a string")
    if seed is not None:
        check_integer("seed", seed, 0)
    if sizes is not None and not (isinstance(sizes, Iterable) and all(map(is_number, sizes))):
        raise StudyError(f"sizes={sizes!r}: expected shares of the original, such as [0.7, 0.5]")
    known: dict[str, Any] | None = None
    where = shown(storage)
    opened_storage = open_storage(storage, heartbeat=heartbeat, create=create)
    if not create:
        inner = load_optuna(opened_storage, name, where=where)
        known = read_request(inner.user_attrs, name)
    else:
        known = existing(opened_storage, name)
    wanted = _own_or_known(budget, known)
    given = {"only": only, "ignore": ignore, "methods": methods}
    chosen = {key: _given(key, value, known) for key, value in given.items()}
    axes = wanted.axes if wanted is not None else ()
    multiple = (known or {}).get("round_to", 1) if round_to is None else round_to
    which = (known or {}).get("rounding", "down") if rounding is None else rounding
    check_round_to(multiple)
    check_rounding(which)
    weighing = _choice("fisher", fisher, known, calibration)
    ordering = _choice("asymmetric", asymmetric, known, calibration)
    timed = objective == LATENCY or bounds_latency(wanted) or (known or {}).get("times") is not None
    figures = (*axes, objective, LATENCY if timed else None)
    check_inputs(figures, example_inputs, asked="a budget or an objective")
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
            settings=Settings(
                fisher=weighing is True, round_to=multiple, rounding=which, progress=progress
            ),
        )
        problem = opened.problem
        if timed:
            assert opened.seen is not None
            table = _table(known) if profile is None else profile
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
            sizes=sizes,
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
                **{key: _names(value) for key, value in chosen.items()},
            },
            finish=lambda plan: opened.finish(plan, seconds=plan.seconds),
        )


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


def _names(value: Any) -> list[str] | None:
    if value is None:
        return None
    single = isinstance(value, (str, Decomposition)) or callable(value)
    return as_text([value] if single else value)


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

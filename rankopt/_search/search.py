"""search(): open the model, let a strategy choose, build the result and check it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final, Literal

import torch
from torch import nn

from rankopt._decompositions.base import Decomposition
from rankopt._model import measure
from rankopt._model.inputs import MAX_SAMPLES
from rankopt._model.metric import Evaluate
from rankopt._model.patterns import Patterns
from rankopt._search.factor_choice import SEARCH, Choice, check_choices, fitted_in_order, nearest
from rankopt._search.latency_budget import solve
from rankopt._search.metric_drop import within_drop
from rankopt._search.model_clock import ModelClock, bounds_latency, price_time
from rankopt._search.opening import check_request, open_problem
from rankopt._timing.profile_table import ProfileTable, check_table
from rankopt.budget import Budget
from rankopt.errors import PlanError
from rankopt.plan import MERGE, RankPlan
from rankopt.registry import strategies
from rankopt.strategy import Problem, Strategy, check_timeout
from rankopt.strategy.rank_choices import check_round_to, check_rounding
from rankopt.strategy.settings import Settings

__all__ = ["DEFAULT_STRATEGY", "search"]

DEFAULT_STRATEGY: Final = "knapsack"


@measure.outside_inference_mode
def search(
    model: nn.Module,
    budget: str | Budget | None,
    *,
    strategy: str | Strategy = DEFAULT_STRATEGY,
    example_inputs: Any = None,
    calibration: Any = None,
    calibration_samples: int | None = MAX_SAMPLES,
    asymmetric: Choice = False,
    fisher: Choice = False,
    evaluate: Evaluate | None = None,
    methods: str | Decomposition | Sequence[str | Decomposition] | None = None,
    only: Patterns = (),
    ignore: Patterns = (),
    round_to: int = 1,
    rounding: Literal["down", "nearest", "up"] = "down",
    profile: ProfileTable | None = None,
    seed: int = 0,
    timeout: float | None = None,
    progress: bool | None = None,
) -> RankPlan:
    """Choose, layer by layer, whether and how to decompose, and at which rank.

    The model is not changed: its weights, buffers, modes, hooks and the global
    random generators are as before. It is run as copies, whose hooks run too, as they may
    change outputs: what a hook of yours writes outside the model, such as to a list, it also
    writes while the search runs. Under `torch.autocast` copies run and are timed as you would
    run the model; factors are computed in the precision of the weights.

    Args:
        model: A trained model.
        budget: Such as ``"macs<=50%"``, ``"params<=0.4, latency<=70%"``,
            ``"latency_ms<=8"`` or a `Budget`; None lets the strategy decide how much.
            Latency is that of the whole model on `example_inputs`, measured on
            this machine: the upper end of the 95% interval is within the budget.
        strategy: A registered name or an instance with settings.
        example_inputs: A tensor, a tuple (positional) or a mapping (keywords)
            to call the model with. Needed for MACs and latency; it also lets rankopt see
            how each layer is used instead of reading the model's source.
        calibration: An iterable of inputs (tensors, tuples, mappings, a
            DataLoader); labels are left out. Factors and errors are then those
            of the layers' outputs, whose mean a bias keeps where there is one (see
            `rankopt.plan.Factors`), and `apply` needs the same inputs.
        calibration_samples: Where to stop reading; None reads to the end.
        asymmetric: Whether `apply` fits each layer to what the layers before it, compressed
            already, pass on, rather than to the inputs of the dense model
            (arXiv 1505.06798, section 3.4). Needs calibration; takes two partial runs of
            the calibration inputs per layer. ``search`` builds the model both ways and
            takes the one whose outputs are nearer to the dense model's.
        fisher: Whether errors and factors weigh the outputs of a layer by what they do to
            those of the model, the Fisher information (arXiv 2505.17974). Needs
            calibration and a model that can be differentiated in eval mode. ``search``
            searches without and with it, and takes the nearer outputs likewise.
        evaluate: The task's metric, see `rankopt.Evaluate`: for strategies that
            measure it (`optuna`) and for budgets on ``metric_drop``. It runs in eval mode
            under saved random generators and must not change the model.
        methods: Decompositions to choose from, names or instances, one or several; None
            for those the strategy names in its `methods`.
        only: Case-sensitive globs on full module names, or functions of a `Layer`
            (its type, kernel, params, …); the rest is kept.
        ignore: The same; what matches is kept.
        round_to: Ranks are multiples of this (or full); hardware likes 8 or 16. An axis with
            fewer channels than this takes any rank.
        rounding: Which multiple the rank of a formula becomes; the budget is held
            with the rounded ranks.
        profile: Where layer times are measured and kept, for budgets on latency and
            strategies that need it; None for inference times in the user's cache.
        seed: For strategies that draw random numbers, at least 0.
        timeout: Seconds after which to give up with `DeadlineExceeded`.
        progress: Whether to show progress bars; None decides by the terminal.

    Returns:
        A plan that covers every layer with a weight, the kept ones with the
        reason, and that meets the budget on the built model.

    Raises:
        BudgetError: The budget cannot be read, or needs inputs not given; or `evaluate` is
            given, and neither the budget (by ``metric_drop``) nor the strategy uses it.
        BudgetInfeasible: It cannot be met; says what can.
        ModelError: `model` is no module, no layer can be decomposed, the model fails on the
            inputs, or the strategy, `asymmetric` or `fisher` needs inputs not given.
        LayerError: A weight holds NaN or infinity.
        EvaluationError: `evaluate` raised, gave no finite number or changed the model.
        CalibrationError: `calibration` is empty or no iterable of inputs, the model fails on
            it, or what its layers take in is not finite.
        RegistryError: No strategy or decomposition of that name.
        DeadlineExceeded: `timeout` passed before there was a plan.
        PlanError: The strategy returned no plan.
        ValueError: `round_to`, `rounding`, `timeout`, `calibration_samples`, `asymmetric`,
            `fisher`, `seed` or `progress` out of range, or `profile` is no table.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
        >>> plan = rankopt.search(model, "params<=50%")
        >>> plan["0"].method, plan["0"].ranks
        ('svd', (15,))
    """
    started = time.perf_counter()
    check_round_to(round_to)
    check_rounding(rounding)
    check_timeout(timeout)
    table = check_table(profile, "profile")
    chosen = strategies.create(strategy)
    allowed = check_request(Budget.parse(budget), chosen, example_inputs, calibration, evaluate)
    drops = allowed is not None and allowed.metric_drop is not None
    check_choices(calibration, drops=drops, asymmetric=asymmetric, fisher=fisher)
    with torch.no_grad(), measure.preserve_rng():
        opened = open_problem(
            model,
            allowed,
            example_inputs=example_inputs,
            calibration=calibration,
            calibration_samples=calibration_samples,
            evaluate=evaluate,
            methods=chosen.methods if methods is None else methods,
            only=only,
            ignore=ignore,
            settings=Settings(
                seed=seed,
                deadline=None if timeout is None else time.monotonic() + timeout,
                fisher=fisher is True,
                asymmetric=asymmetric,
                round_to=round_to,
                rounding=rounding,
                progress=progress,
            ),
        )
        problem = opened.problem
        clock: ModelClock | None = None
        if bounds_latency(allowed) or "latency" in chosen.promises.needs:
            assert opened.seen is not None
            clock = ModelClock(opened.source, example_inputs, table)
            price_time(problem, clock, opened.seen)
            problem.check_deadline()

        def find(one: Problem) -> RankPlan:
            limits = one.budget
            timed = limits is not None and (limits.latency or limits.latency_ms)
            if clock is not None and timed and not chosen.promises.latency:
                plan = solve(one, chosen, clock.measure, clock.dense_ms)
            else:
                plan = _searched(chosen, one)
            return fitted_in_order(plan) if asymmetric is True else plan

        if SEARCH in (asymmetric, fisher):
            judged = "evaluate" in chosen.promises.needs
            plan = nearest(problem, find, asymmetric=asymmetric, fisher=fisher, judged=judged)
        elif "metric_drop" in (allowed.axes if allowed else ()) and not chosen.promises.metric_drop:
            plan = within_drop(chosen, problem, find)
        else:
            plan = find(problem)
        problem.close()
        return opened.finish(plan, seconds=time.perf_counter() - started, asked=allowed)


def _searched(strategy: Strategy, problem: Problem) -> RankPlan:
    plan = strategy.search(problem)
    if not isinstance(plan, RankPlan):
        raise PlanError(
            f"strategy {strategy.name!r} returned a {type(plan).__name__}, not a RankPlan; its "
            "search() has to return problem.plan(self, options)"
        )
    allowed = {method.name for site in problem.sites for method in site.methods} | {MERGE}
    for decision in plan.changes:
        if decision.method not in allowed:
            raise PlanError(
                f"strategy {strategy.name!r} chose {decision.method} for layer "
                f"{decision.targets[0]}; asked for were {', '.join(problem.methods)}"
            )
    return plan

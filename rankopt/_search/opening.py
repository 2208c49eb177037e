"""A model opened for a search: described, calibrated, and ready to check a plan."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final

from torch import nn

from rankopt._build.provenance import plan_of
from rankopt._build.skeletons import build_with_moments
from rankopt._calibration.moments import Moments
from rankopt._calibration.moments_for import collect_for, weigh
from rankopt._decompositions.base import Decomposition
from rankopt._model import measure, surgery
from rankopt._model.inputs import (
    MAX_SAMPLES,
    affordable,
    digest,
    divergence,
    hold,
    main_output,
    run,
)
from rankopt._model.metric import Evaluate, EvaluateBatch
from rankopt._model.patterns import Patterns
from rankopt._model.probe import Probe
from rankopt._plan_json import plain
from rankopt._search.describe import describe, problem_of, selected
from rankopt._search.trial import TrialModel
from rankopt._search.verify import environment, verify
from rankopt.agreement import Agreement
from rankopt.budget import Budget, check_inputs
from rankopt.errors import (
    BudgetError,
    CalibrationError,
    EvaluationError,
    ModelError,
    warn,
)
from rankopt.plan import Decision, RankPlan
from rankopt.strategy import Option, Problem, Strategy, decide
from rankopt.strategy.settings import Settings

__all__ = ["Opened", "check_request", "open_problem", "uses_metric"]

# Samples on which candidate options are run to measure how far outputs move.
DIVERGENCE_SAMPLES: Final = 256
# Samples on which whole plans are compared.
DISTANCE_SAMPLES: Final = 512
# Of outputs that are not finite; a number, as plans hold no other.
FARTHEST: Final = 1e30


@dataclass(frozen=True)
class Opened:
    """A described model: what searches, studies and soft models start from.

    Args:
        problem: For strategies.
        source: The user's model, unwrapped.
        view: The unpacked clone the problem refers to.
        seen: What a run on the example inputs showed.
        inputs: The example inputs.
    """

    problem: Problem
    source: nn.Module
    view: nn.Module
    seen: Probe | None
    inputs: Any

    def finish(self, plan: RankPlan, *, seconds: float, asked: Budget | None = None) -> RankPlan:
        """Hold a strategy's plan to its budget on the built model; add model and machine.

        Args:
            plan: What the strategy returned.
            seconds: That it took.
            asked: The budget to hold it to; None for the one the plan names.

        Raises:
            RankoptError: The plan breaks its budget.
            PlanError: Its settings or extensions cannot be written down.
            ModelError: The compressed model fails.
        """
        strategy = plain(dict(plan.strategy), "strategy")
        extensions = plain(dict(plan.extensions), "extensions")
        skeleton = surgery.clone(self.view, share=self.view.parameters())
        return replace(
            verify(
                plan, skeleton, self.seen, self.inputs, asked=asked, original=self.problem.totals
            ),
            model=self.problem.model,
            strategy=strategy,
            extensions=extensions,
            environment=environment(self.source, self.inputs),
            seconds=round(seconds, 3),
        )


def open_problem(
    model: nn.Module,
    budget: Budget | None,
    *,
    example_inputs: Any = None,
    calibration: Any = None,
    calibration_samples: int | None = MAX_SAMPLES,
    evaluate: Evaluate | EvaluateBatch | None = None,
    batches: Sequence[Any] | None = None,
    methods: str | Decomposition | Sequence[str | Decomposition] = Strategy.methods,
    only: Patterns = (),
    ignore: Patterns = (),
    settings: Settings | None = None,
) -> Opened:
    """Describe a model for strategies; arguments and errors as of `search`."""
    source = surgery.unwrap(model)
    _warn_of_chains(source)
    runs = example_inputs is not None or calibration is not None
    held = None
    if calibration is not None:
        held = hold(source, calibration, max_samples=calibration_samples)
    view, layers, seen = describe(source, example_inputs, runs=runs, held=held or ())
    layers = selected(layers, only, ignore)
    problem = problem_of(view, layers, seen, budget, methods, settings or Settings())
    problem.model = {
        "class": type(source).__name__,
        "structure": measure.structure_digest(source),
        "weights": measure.weights_digest(source),
    }
    problem.copy = (lambda: surgery.clone(view)) if runs else None
    if held is not None:
        _calibrate(problem, view, held)
    if evaluate is not None:
        trial = TrialModel(problem, view, evaluate, batches=batches, held=held)
        problem.evaluate = trial.values
    return Opened(problem, source, view, seen, example_inputs)


def _warn_of_chains(model: nn.Module) -> None:
    """Say what becomes of a model that was compressed before."""
    known = plan_of(model)
    if known is not None and known.changes:
        warn(
            f"this {type(model).__name__} was compressed already: its factors would be decomposed "
            "once more, and the budget is a share of the compressed model; for a further round "
            "make it dense first, rankopt.fold(model, original), or use rankopt.compress(rounds=2)"
        )


def uses_metric(budget: Budget | None, strategy: Strategy) -> bool:
    """Whether a search calls `evaluate`."""
    drops = budget is not None and budget.metric_drop is not None
    return drops or "evaluate" in strategy.promises.needs


def check_request(
    budget: Budget | None, strategy: Strategy, inputs: Any, calibration: Any, evaluate: Any
) -> Budget | None:
    bounded = () if budget is None else (*budget.axes, *filter(None, [budget.minimize]))
    if budget is None and not strategy.promises.unbudgeted:
        raise BudgetError(
            f"strategy {strategy.name!r} needs a budget: it has no natural amount of compression"
        )
    check_inputs(bounded, inputs)
    if "latency" in strategy.promises.needs and inputs is None:
        raise ModelError(
            f"strategy {strategy.name!r} needs example_inputs= to time the layers with: a tensor, "
            "a tuple or a dict to call the model with"
        )
    for name, value in (("calibration", calibration), ("evaluate", evaluate)):
        if name in strategy.promises.needs and value is None:
            raise ModelError(f"strategy {strategy.name!r} needs {name}=")
    drops = budget is not None and budget.metric_drop is not None
    if drops and evaluate is None:
        raise BudgetError(
            "a budget on metric_drop needs evaluate=: a function of a model that gives the metric"
        )
    if evaluate is not None and not uses_metric(budget, strategy):
        raise BudgetError(
            f"strategy {strategy.name!r} uses evaluate= only with a budget on metric_drop, such as "
            "'metric_drop<=0.01, minimize=macs'; leave it out"
        )
    return budget


def _calibrate(problem: Problem, view: nn.Module, held: Sequence[Any]) -> None:
    """Collect what the strategy and the factors need from calibration inputs."""
    groups = [site.layers for site in problem.sites]
    problem.moments = collect_for(
        view, groups, held, progress=problem.progress, check=problem.check_deadline
    )

    @cache
    def weighed() -> dict[str, Moments]:
        return weigh(
            view, problem.moments, groups, held,
            progress=problem.progress, check=problem.check_deadline,
        )  # fmt: skip

    problem.weigh = weighed
    problem.calibration = digest(held)
    problem.inputs = held

    @cache
    def compared() -> list[tuple[Any, Any]]:
        """Inputs and what the dense model makes of them; strategies that never ask keep none."""
        with measure.evaluation(view):
            probes = affordable(view, held, DIVERGENCE_SAMPLES)
            return [(inputs, main_output(run(view, inputs))) for inputs in probes]

    found: dict[str, float] = {}  # a corrected latency budget asks again

    def moved(options: Mapping[int, Option]) -> float:
        every = sorted(options.items())
        key = repr([(i, o.method, dict(o.args), o.factors.fisher) for i, o in every])
        if key not in found:
            found[key] = compute(options)
        return found[key]

    def known(decisions: Sequence[Decision]) -> dict[str, Moments]:
        """What factors are made with, by the name of a site's first layer."""
        sites = {site.name: site for site in problem.sites}
        pairs = {
            d.targets[0]: problem.known(sites[d.targets[0]], d.factors.fisher) for d in decisions
        }
        return {name: moments for name, moments in pairs.items() if moments is not None}

    def compute(options: Mapping[int, Option]) -> float:
        problem.check_deadline()
        decisions = [
            decide(problem.sites[index], option)
            for index, option in options.items()
            if not option.keeps
        ]
        model = build_with_moments(view, decisions, known(decisions)).eval()
        pairs = compared()
        return sum(divergence(before, run(model, x)) for x, before in pairs) / len(pairs)

    problem.divergence = moved

    @cache
    def built() -> TrialModel:
        near = Agreement(view, affordable(view, held, DISTANCE_SAMPLES))

        def nearness(model: nn.Module) -> Iterator[tuple[float, float]]:
            for value, weight in near(model):
                yield (value if math.isfinite(value) else -FARTHEST), weight

        return TrialModel(problem, view, nearness, held=held)

    def distance(decisions: Iterable[Decision]) -> float:
        problem.check_deadline()
        try:
            return -built().metric(decisions)
        except EvaluationError as error:
            if isinstance(error.__cause__, CalibrationError):  # nobody passed an evaluate
                raise error.__cause__ from None
            raise

    problem.distance = distance

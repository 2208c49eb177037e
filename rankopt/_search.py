"""search(): describe the model, let a strategy choose, build the result and check it."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from rankopt import measure, surgery
from rankopt._apply import build_with_moments, collect_for, fill_skeleton, unpacked_clone
from rankopt._latency_budget import ModelClock, bounds_latency, price_time, solve
from rankopt._metric_drop import within_drop
from rankopt._trial import TrialModel
from rankopt._version import __version__
from rankopt.budget import Budget
from rankopt.decompositions.base import Decomposition
from rankopt.errors import BudgetError, ModelError, NotYetSupported, RankoptError
from rankopt.inputs import MAX_SAMPLES, digest, divergence, hold, main_output, run, tensors_in
from rankopt.layers import (
    Layer,
    Patterns,
    canonical_weight,
    check_materialised,
    check_weight,
    find_layers,
    select,
)
from rankopt.plan import MERGE, Factors, RankPlan
from rankopt.probe import Call, Probe, probe, static_reads
from rankopt.profile_table import ProfileTable
from rankopt.registry import decompositions, strategies
from rankopt.strategy import LATENCY, Option, Problem, Site, Strategy, decide

__all__ = [
    "DEFAULT_STRATEGY",
    "Opened",
    "check_request",
    "describe",
    "environment",
    "open_problem",
    "search",
    "verify",
]

DEFAULT_STRATEGY: Final = "knapsack"
# Samples on which candidate options are run to measure how far outputs move.
DIVERGENCE_SAMPLES: Final = 256


def search(
    model: nn.Module,
    budget: str | Budget | None,
    *,
    strategy: str | Strategy = DEFAULT_STRATEGY,
    example_inputs: Any = None,
    calibration: Any = None,
    calibration_samples: int | None = MAX_SAMPLES,
    asymmetric: bool = False,
    evaluate: Any = None,
    methods: Sequence[str | Decomposition] | None = None,
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
    random generators are as before.

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
            of the layers' outputs, and `apply` needs the same inputs.
        calibration_samples: Where to stop reading; None reads to the end.
        asymmetric: Whether `apply` fits each layer to what the layers before it, compressed
            already, pass on, rather than to the inputs of the dense model
            (arXiv 1505.06798, section 3.4). Needs calibration; takes two partial runs of
            the calibration inputs per layer.
        evaluate: The task's metric, ``evaluate(model) -> float``: for strategies that
            measure it (`optuna`) and for budgets on ``metric_drop``. It runs in eval mode
            under saved random generators and must not change the model.
        methods: Decompositions to choose from, names or instances; None for those
            the strategy names in its `methods`.
        only: Case-sensitive globs on full module names, or functions of a `Layer`
            (its type, kernel, params, …); the rest is kept.
        ignore: The same; what matches is kept.
        round_to: Ranks are multiples of this (or full); hardware likes 8 or 16.
        rounding: Which multiple the rank of a formula becomes; the budget is held
            with the rounded ranks.
        profile: Where layer times are measured and kept, for budgets on latency and
            strategies that need it; None for inference times in the user's cache.
        seed: For strategies that draw random numbers.
        timeout: Seconds after which to give up with `DeadlineExceeded`.
        progress: Whether to show progress bars; None decides by the terminal.

    Returns:
        A plan that covers every layer with a weight, the kept ones with the
        reason, and that meets the budget on the built model.

    Raises:
        BudgetError: The budget cannot be read, or needs inputs not given.
        BudgetInfeasible: It cannot be met; says what can.
        ModelError: No layer can be decomposed, or the model fails on the inputs.
        LayerError: A weight holds NaN or infinity.
        EvaluationError: `evaluate` raised, gave no finite number or changed the model.
        NotYetSupported: The budget's machinery is not built yet.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
        >>> plan = rankopt.search(model, "params<=50%")
        >>> plan["0"].method, plan["0"].ranks
        ('svd', (15,))
    """
    started = time.perf_counter()
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"round_to={round_to!r}: expected an integer of at least 1")
    if rounding not in ("down", "nearest", "up"):
        raise ValueError(f"rounding={rounding!r}: expected 'down', 'nearest' or 'up'")
    if asymmetric and calibration is None:
        raise ModelError("asymmetric=True needs calibration=: inputs to fit the layers on")
    deadline = None if timeout is None else time.monotonic() + timeout
    chosen = strategies.create(strategy)
    allowed = check_request(Budget.parse(budget), chosen, example_inputs, calibration, evaluate)
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
        )
        problem = opened.problem
        problem.seed, problem.deadline, problem.progress = seed, deadline, progress
        problem.round_to, problem.rounding = round_to, rounding
        clock: ModelClock | None = None
        if bounds_latency(allowed) or "latency" in chosen.tags.needs:
            assert opened.seen is not None
            clock = ModelClock(opened.source, example_inputs, profile or ProfileTable())
            price_time(problem, clock, opened.seen)
            problem.check_deadline()

        def find(one: Problem) -> RankPlan:
            limits = one.budget
            timed = limits is not None and (limits.latency or limits.latency_ms)
            if clock is not None and timed and not chosen.tags.latency:
                return solve(one, chosen, clock.measure, clock.dense_ms)
            return chosen.search(one)

        if "metric_drop" in (allowed.axes if allowed else ()) and not chosen.tags.metric_drop:
            plan = within_drop(chosen, problem, find)
        else:
            plan = find(problem)
        if asymmetric:
            plan = _asymmetric(plan)
        problem.close()
        return opened.finish(plan, seconds=time.perf_counter() - started)


def _asymmetric(plan: RankPlan) -> RankPlan:
    """The plan with factors fitted in order; the errors it states are those of dense inputs."""
    return replace(
        plan,
        decisions=tuple(
            replace(decision, factors=Factors("asymmetric", decision.factors.digest))
            if decision.factors.kind.startswith("whitened") and decision.method != MERGE
            else decision
            for decision in plan
        ),
    )


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

    def finish(self, plan: RankPlan, *, seconds: float) -> RankPlan:
        """Hold a strategy's plan to its budget on the built model; add model and machine.

        Raises:
            RankoptError: The plan breaks its budget.
            ModelError: The compressed model fails.
        """
        skeleton = surgery.clone(self.view, share=self.view.parameters())
        return replace(
            verify(plan, skeleton, self.seen, self.inputs),
            model=self.problem.model,
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
    evaluate: Any = None,
    batches: Sequence[Any] | None = None,
    methods: Sequence[str | Decomposition] = Strategy.methods,
    only: Patterns = (),
    ignore: Patterns = (),
    progress: bool | None = None,
) -> Opened:
    """Describe a model for strategies; arguments and errors as of `search`."""
    source = surgery.unwrap(model)
    runs = example_inputs is not None or calibration is not None
    view, layers, seen = describe(source, example_inputs, runs=runs)
    layers = _select(layers, only, ignore)
    problem = _problem(view, layers, seen, budget, methods)
    problem.progress = progress
    problem.model = {
        "class": type(source).__name__,
        "structure": measure.structure_digest(source),
        "weights": measure.weights_digest(source),
    }
    problem.copy = (lambda: surgery.clone(view)) if runs else None
    held = None
    if calibration is not None:
        held = hold(view, calibration, max_samples=calibration_samples)
        _calibrate(problem, view, held)
    if evaluate is not None:
        trial = TrialModel(problem, view, evaluate, batches=batches, held=held)
        problem.evaluate = trial.values
    return Opened(problem, source, view, seen, example_inputs)


def check_request(
    budget: Budget | None, strategy: Strategy, inputs: Any, calibration: Any, evaluate: Any
) -> Budget | None:
    bounded = () if budget is None else (*budget.axes, *filter(None, [budget.minimize]))
    if budget is None and not strategy.tags.unbudgeted:
        raise BudgetError(
            f"strategy {strategy.name!r} needs a budget: it has no natural amount of compression"
        )
    for axis, what in (
        ("macs", "MACs depend"),
        ("latency", "time depends"),
        ("latency_ms", "time depends"),
    ):
        if axis in bounded and inputs is None:
            raise BudgetError(
                f"a budget on {axis} needs example_inputs: {what} on the input's size; pass a "
                "tensor, a tuple or a dict to call the model with, or bound params instead"
            )
    if "latency" in strategy.tags.needs and inputs is None:
        raise ModelError(
            f"strategy {strategy.name!r} needs example_inputs= to time the layers with: a tensor, "
            "a tuple or a dict to call the model with"
        )
    for name, value in (("calibration", calibration), ("evaluate", evaluate)):
        if name in strategy.tags.needs and value is None:
            raise ModelError(f"strategy {strategy.name!r} needs {name}=")
    drops = budget is not None and budget.metric_drop is not None
    if drops and evaluate is None:
        raise BudgetError(
            "a budget on metric_drop needs evaluate=: a function of a model that gives the metric"
        )
    if evaluate is not None and not drops and "evaluate" not in strategy.tags.needs:
        raise NotYetSupported(
            f"strategy {strategy.name!r} uses evaluate= only with a budget on metric_drop, such as "
            "'metric_drop<=0.01, minimize=macs'; leave it out"
        )
    return budget


def _calibrate(problem: Problem, view: nn.Module, held: Sequence[Any]) -> None:
    """Collect what the strategy and the factors need from calibration inputs."""
    problem.moments = collect_for(
        view, [site.layers for site in problem.sites], held, progress=problem.progress
    )
    problem.calibration = digest(held)
    problem.inputs = held
    probes = hold(view, held, max_samples=DIVERGENCE_SAMPLES)
    with measure.evaluation(view):
        outputs = [main_output(run(view, inputs)) for inputs in probes]

    known: dict[str, float] = {}  # a corrected latency budget asks again

    def moved(options: Mapping[int, Option]) -> float:
        key = repr([(i, o.method, dict(o.args)) for i, o in sorted(options.items())])
        if key not in known:
            known[key] = compute(options)
        return known[key]

    def compute(options: Mapping[int, Option]) -> float:
        problem.check_deadline()
        decisions = [
            decide(problem.sites[index], option)
            for index, option in options.items()
            if not option.keeps
        ]
        model = build_with_moments(view, decisions, problem.moments).eval()
        pairs = zip(probes, outputs, strict=True)
        return sum(divergence(before, run(model, x)) for x, before in pairs) / len(probes)

    problem.divergence = moved


def describe(
    source: nn.Module, example_inputs: Any, *, runs: bool
) -> tuple[nn.Module, list[Layer], Probe | None]:
    """An unpacked clone, its layers, and what a run on the inputs showed."""
    check_materialised(source)
    view = unpacked_clone(source, runs=runs)
    layers = find_layers(view)
    if example_inputs is None:
        reads = static_reads(view)
        return view, [_refuse_for(layer, reads) for layer in layers], None
    seen = probe(view, layers, example_inputs)
    if seen.crossed:
        # Cross-attention: one packed projection would be run for each input.
        view = unpacked_clone(source, split=seen.crossed, runs=True)
        layers = find_layers(view)
        seen = probe(view, layers, example_inputs)
    return view, seen.annotate(layers), seen


def _refuse_for(layer: Layer, reads: Mapping[str, str]) -> Layer:
    reasons = [reads[name] for name in layer.names if name in reads]
    return layer.refused(reasons[0]) if reasons else layer


def _select(layers: list[Layer], only: Patterns, ignore: Patterns) -> list[Layer]:
    """The user's globs, then narrowness, then ties with kept layers."""
    chosen = []
    for layer in select(layers, only, ignore):
        narrow = None if layer.refusal else layer.too_narrow
        chosen.append(layer.refused(narrow) if narrow else layer)
    kept = {layer.name for layer in chosen if layer.refusal}
    return [
        layer.refused(f"its weight is tied to {shared}, which is kept")
        if (shared := next((name for name in layer.tied_to if name in kept), None))
        else layer
        for layer in chosen
    ]


def _problem(
    view: nn.Module,
    layers: list[Layer],
    seen: Probe | None,
    budget: Budget | None,
    methods: Sequence[str | Decomposition],
) -> Problem:
    available = [decompositions.create(method) for method in methods]
    modules = dict(surgery.named_modules(view))

    def weight(layer: Layer) -> Tensor:
        return canonical_weight(modules[layer.name])

    layers, sites = _sites(
        [_with_values(layer, weight) for layer in layers], available, probed=seen is not None
    )
    if not sites:
        reasons = "; ".join(f"{x.name or 'root'}: {x.refusal}" for x in layers[:5])
        raise ModelError(
            f"{type(view).__name__} has no layer to decompose"
            + (f" ({reasons}{'; …' if len(layers) > 5 else ''})" if layers else " (no weights)")
        )
    totals = {"params": measure.count_params(view), "memory": measure.count_memory(view)}
    if seen is not None:
        totals["macs"] = seen.macs
    return Problem(
        layers=tuple(layers), sites=tuple(sites), budget=budget, totals=totals, weight=weight
    )


def _with_values(layer: Layer, weight: Callable[[Layer], Tensor]) -> Layer:
    """Refuse layers without any signal; `LayerError` for NaN and infinity."""
    if layer.refusal is not None:
        return layer
    values = weight(layer)
    check_weight(layer, values)
    return layer if bool(values.any()) else layer.refused("its weight is all zero")


def _sites(
    layers: list[Layer], available: Sequence[Decomposition], *, probed: bool
) -> tuple[list[Layer], list[Site]]:
    by_name = {layer.name: layer for layer in layers}
    listed: list[Layer] = []
    sites: list[Site] = []
    placed: set[str] = set()
    for layer in layers:
        methods = tuple(method for method in available if method.applies(layer))
        if layer.refusal is None and not methods:
            reasons = "; ".join(str(method.refusal(layer)) for method in available)
            layer = layer.refused(reasons or "no decomposition was allowed")
        listed.append(layer)
        if layer.refusal is not None or layer.name in placed:
            continue
        group = (layer, *(by_name[name] for name in layer.tied_to))
        placed.update(member.name for member in group)
        cost = {"params": layer.params, "memory": layer.params * layer.itemsize}
        if probed:
            cost["macs"] = sum(member.macs or 0 for member in group)
        sites.append(Site(group, methods, cost))
    return listed, sites


def verify(plan: RankPlan, view: nn.Module, seen: Probe | None, inputs: Any) -> RankPlan:
    """Build the result's skeleton inside `view`, run it, and hold it to the budget."""
    built = fill_skeleton(view, plan)
    measured: dict[str, float] = {
        "params": measure.count_params(built),
        "memory": measure.count_memory(built),
    }
    if seen is not None:
        inputs = measure.to_device(inputs, surgery.device_of(view))
        with measure.evaluation(built):
            measured["macs"] = measure.count_macs(built, inputs)
            _run(built, inputs, "in eval mode with gradients")
        if seen.trains:
            built.train()
            _run(built, inputs, "in train mode with gradients")
    timed = plan.totals.get(LATENCY, {}).get("measured")
    if timed is not None:
        measured[LATENCY] = timed
    before = {axis: float(entry["before"] or 0) for axis, entry in plan.totals.items()}
    if plan.budget is not None and not plan.budget.fits(measured, before):
        raise RankoptError(
            f"strategy {plan.strategy.get('name')!r} returned a plan that breaks its budget "
            f"({plan.budget.explain()}): measured {measured} of {before}; the model's MACs depend "
            "on its data, or this is a defect of the strategy or of rankopt"
        )
    totals = {
        axis: {**entry, "measured": measured.get(axis)} for axis, entry in plan.totals.items()
    }
    return replace(plan, totals=totals)


def _run(model: nn.Module, inputs: Any, how: str) -> None:
    try:
        with torch.enable_grad():
            measure.call(model, inputs)
    except Exception as error:
        raise ModelError(
            f"the compressed {type(model).__name__} fails {how}: {type(error).__name__}: {error}; "
            "keep the layers involved with ignore= and report this"
        ) from error


def environment(model: nn.Module, inputs: Any = None) -> dict[str, Any]:
    """Versions, hardware and numeric settings that figures depend on."""
    device = surgery.device_of(model)
    facts: dict[str, Any] = {
        "rankopt": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "dtype": str(next((p.dtype for p in model.parameters()), None)).removeprefix("torch."),
    }
    for first in list(tensors_in(inputs))[:1]:
        facts |= {"input": list(first.shape), "memory_format": Call.of(first).memory_format}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["tf32"] = torch.backends.cuda.matmul.allow_tf32
    else:
        facts["isa"] = torch.backends.cpu.get_cpu_capability()
    return facts

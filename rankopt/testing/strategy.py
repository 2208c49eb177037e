"""The contract of a strategy: budgets, determinism, and the model left alone."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final
from unittest import mock

import numpy as np
import torch
from torch import nn

import rankopt
from rankopt._build.fold import effective_weight
from rankopt._decompositions.base import Decomposition
from rankopt._model import measure
from rankopt._model.layers import canonical_weight, find_layers
from rankopt._model.metric import metric_of
from rankopt._timing.modelled_clock import ModelledClock
from rankopt._timing.profile_table import ProfileTable
from rankopt.agreement import Agreement
from rankopt.errors import BudgetInfeasible, DeadlineExceeded
from rankopt.plan import Decision, RankPlan
from rankopt.registry import strategies
from rankopt.strategy import Problem, Strategy, Tags
from rankopt.strategy.rank_choices import rounded_rank
from rankopt.testing.check import Check
from rankopt.testing.planted import planted_inputs, planted_model

__all__ = ["check_strategy", "squared_error", "strategy_checks"]

# Rounding of Gram-based errors in float64: square roots of 1e-16 relative energies.
FLOAT64_ERROR: Final = 1e-6
# Errors of what is built in float32.
FLOAT32_ERROR: Final = 1e-4
# Share by which a stated error may miss that of the built weight, as estimates by bounds do.
ESTIMATED: Final = 0.01


def check_strategy(strategy: Strategy | str, **search_arguments: Any) -> None:
    """Run every check of the strategy contract; AssertionError names the first to fail.

    Args:
        strategy: An instance, or a registered name.
        search_arguments: Passed on to every `rankopt.search`, such as `calibration=`.
    """
    for check in strategy_checks(strategy, **search_arguments):
        check()


def strategy_checks(strategy: Strategy | str, **search_arguments: Any) -> list[Check]:
    """The checks that apply to a strategy, by its tags."""
    made = strategies.create(strategy)
    suite = _StrategySuite(made, search_arguments)
    checks = [
        suite.has_name_and_tags,
        suite.settings_are_frozen,
        suite.meets_budgets,
        suite.refuses_infeasible_budgets,
        suite.leaves_the_model_alone,
        suite.leaves_generators_alone,
        suite.leaves_torch_alone,
        suite.chooses_feasible_ranks,
        suite.heeds_methods,
        suite.heeds_round_to,
        suite.states_true_figures,
        suite.leaves_ignored_layers,
        suite.plan_round_trips,
        suite.plan_applies,
        suite.stops_at_the_deadline,
        suite.survives_interrupts,
    ]
    if made.promises.deterministic:
        checks.append(suite.is_deterministic)
    if made.promises.monotone:
        checks.append(suite.is_monotone)
    if made.promises.unbudgeted:
        checks.append(suite.answers_without_a_budget)
    if made.promises.metric_drop:
        checks.append(suite.keeps_the_metric)
    return [Check(made.name, check.__name__, check) for check in checks]


class _StrategySuite:
    BUDGETS: Final = ("params<=60%", "macs<=50%", "memory<=70%, macs<=60%")

    def __init__(self, strategy: Strategy, arguments: dict[str, Any]) -> None:
        self.strategy, self.arguments = strategy, arguments
        self.timed = "latency" in strategy.promises.needs
        if self.timed:  # decisions are compared, so times must not vary
            table = ProfileTable(clock=ModelledClock(), rounds=3)
            self.arguments = {"profile": table, **arguments}

    def plan(self, budget: str | None, model: nn.Module | None = None, **more: Any) -> RankPlan:
        return rankopt.search(
            planted_model() if model is None else model,
            budget,
            strategy=self.strategy,
            **{"example_inputs": planted_inputs(), **self.arguments, **more},
        )

    def has_name_and_tags(self) -> None:
        assert isinstance(self.strategy.name, str) and self.strategy.name, "name is no text"
        assert isinstance(type(self.strategy).tags, Tags), "tags is no rankopt.Tags"
        assert isinstance(self.strategy.promises, Tags), "promises is no rankopt.Tags"
        known = {"calibration", "evaluate", "latency"}
        assert self.strategy.promises.needs <= known, f"needs beyond {sorted(known)}"

    def settings_are_frozen(self) -> None:
        assert dataclasses.is_dataclass(self.strategy), "not a dataclass"
        parameters = type(self.strategy).__dataclass_params__
        assert parameters.frozen, "the dataclass is not frozen"

    def meets_budgets(self) -> None:
        for budget in self.BUDGETS:
            plan = self.plan(budget)
            assert plan.budget is not None
            for axis in plan.budget.axes:
                entry = plan.totals[axis]
                assert entry["measured"] == entry["predicted"], f"{axis} misjudged under {budget}"
                share = float(entry["measured"] or 0) / float(entry["before"] or 1)
                assert share <= plan.budget.ratio(axis), f"{budget}: {axis} is {share:.4f}"

    def refuses_infeasible_budgets(self) -> None:
        try:
            self.plan("macs<=0.1%")
        except BudgetInfeasible as error:
            assert 0.001 < error.smallest["macs"] <= 1, f"smallest is {error.smallest}"
        else:
            raise AssertionError("a budget of 0.1% of the MACs was accepted")

    def leaves_the_model_alone(self) -> None:
        model = planted_model()
        model.train()
        model.get_submodule("norm").eval()
        model.get_submodule("head").weight.requires_grad_(False)
        before = _snapshot(model)
        # Without a run the weights are shared.
        for inputs in (planted_inputs(), *(() if self.timed else (None,))):
            self.plan(self.BUDGETS[0], model, example_inputs=inputs)
            assert _snapshot(model) == before, "weights, buffers, modes, hooks or flags changed"

    def leaves_generators_alone(self) -> None:
        model = planted_model()
        before = _generators()
        self.plan(self.BUDGETS[0], model)
        assert _generators() == before, "a global random generator moved"

    def leaves_torch_alone(self) -> None:
        before = _torch_settings()
        self.plan(self.BUDGETS[0])
        after = _torch_settings()
        changed = sorted(name for name in before if before[name] != after[name])
        assert not changed, f"settings of torch changed: {', '.join(changed)}"

    def chooses_feasible_ranks(self) -> None:
        model = planted_model()
        layers = {layer.name: layer for layer in find_layers(model)}
        for decision in self.plan(self.BUDGETS[1], model).changes:
            _method(decision).check_ranks(layers[decision.targets[0]], decision.ranks)

    def heeds_methods(self) -> None:
        plan = self.plan("params<=70%", methods=["svd"])
        assert plan.changes, "nothing was decomposed"
        used = {decision.method for decision in plan.changes}
        assert used <= {"svd"}, f"methods=['svd'] gave {', '.join(sorted(used))}"

    def heeds_round_to(self) -> None:
        model = planted_model()
        layers = {layer.name: layer for layer in find_layers(model)}
        for decision in self.plan(self.BUDGETS[0], model, round_to=4).changes:
            axes = _method(decision).rank_axes(layers[decision.targets[0]])
            for rank, axis in zip(decision.ranks, axes, strict=True):
                rounded = rank == rounded_rank(rank, axis, 4, "down")
                assert rounded, f"round_to=4 gave rank {rank} for {decision.targets[0]}"

    def states_true_figures(self) -> None:
        model = planted_model()
        plan = self.plan(self.BUDGETS[0], model)
        small = rankopt.apply(model, plan, **_sources(self.arguments, plan))
        for axis in ("params", "memory", "macs"):
            costs = [decision.cost[axis] for decision in plan if axis in decision.cost]
            saved = sum(before - after for before, after in costs)
            entry = plan.totals[axis]
            total = float(entry["before"] or 0) - float(entry["predicted"] or 0)
            assert saved == total, f"{axis}: the layers save {saved:g}, the model {total:g}"
        for decision in plan.changes:
            name = decision.targets[0]
            weight = canonical_weight(model.get_submodule(name))
            chain = small.get_submodule(name)
            assert isinstance(chain, nn.Sequential)
            if decision.factors.kind == "weights" and decision.error is not None:
                with torch.no_grad():
                    found = float((effective_weight(chain) - weight).norm() / weight.norm())
                near = abs(found - decision.error) <= FLOAT32_ERROR + ESTIMATED * found
                assert near, f"error of {name}: stated {decision.error:.4g}, is {found:.4g}"

    def leaves_ignored_layers(self) -> None:
        plan = self.plan("params<=90%", ignore=["hid*"])
        assert plan["hidden"].keeps, "an ignored layer was decomposed"

    def plan_round_trips(self) -> None:
        plan = self.plan(self.BUDGETS[0])
        assert RankPlan.from_json(plan.to_json()) == plan, "JSON does not give the plan back"

    def plan_applies(self) -> None:
        model = planted_model()
        plan = self.plan(self.BUDGETS[0], model)
        small = rankopt.apply(model, plan, **_sources(self.arguments, plan))
        assert measure.count_params(small) == plan.totals["params"]["measured"]
        with torch.no_grad():
            assert small(planted_inputs()).isfinite().all(), "outputs are not finite"

    def stops_at_the_deadline(self) -> None:
        try:
            self.plan(self.BUDGETS[0], timeout=0.0)
        except DeadlineExceeded:
            return
        raise AssertionError("it went on after the deadline: call problem.check_deadline()")

    def survives_interrupts(self) -> None:
        model = planted_model()
        with _questions() as asked:
            plan = self.plan(self.BUDGETS[0], model)
        before, drawn = _snapshot(model), _generators()
        try:
            with _questions(interrupt_at=(len(asked) + 1) // 2):
                self.plan(self.BUDGETS[0], model)
        except KeyboardInterrupt:
            assert _snapshot(model) == before, "an interrupt left the model changed"
            assert _generators() == drawn, "an interrupt left a global random generator moved"
        else:
            raise AssertionError("KeyboardInterrupt was swallowed")
        if self.strategy.promises.deterministic:
            again = self.plan(self.BUDGETS[0], model)
            assert again.decisions == plan.decisions, "after an interrupt the answer is another"

    def is_deterministic(self) -> None:
        with measure.preserve_rng():
            plans = []
            for seed in (1, 2):  # who draws from a global generator gets other numbers
                torch.manual_seed(seed)
                np.random.seed(seed)
                random.seed(seed)
                plans.append(self.plan(self.BUDGETS[1]))
        first, second = plans
        assert first.decisions == second.decisions, "the same seed gave other decisions"

    def is_monotone(self) -> None:
        errors = []
        for share in (40, 50, 65, 80):
            model = planted_model()
            plan = self.plan(f"params<={share}%", model)
            errors.append(sum(squared_error(model, decision) for decision in plan.changes))
        pairs = itertools.pairwise(errors)
        assert all(b <= a + FLOAT64_ERROR for a, b in pairs), f"errors by budget: {errors}"

    def answers_without_a_budget(self) -> None:
        plan = self.plan(None)
        assert plan.budget is None
        assert plan.changes, "nothing was decomposed"

    def keeps_the_metric(self) -> None:
        model = planted_model(noise=0.5)
        evaluate = Agreement(model, [planted_inputs(32)])

        def loss(plan: RankPlan) -> float:
            small = rankopt.apply(model, plan, **_sources(self.arguments, plan))
            return -metric_of(evaluate, small)

        judged = {"evaluate": evaluate} if "evaluate" in self.strategy.promises.needs else {}
        allowed = loss(self.plan(self.BUDGETS[1], model, **judged)) / 2
        plan = self.plan(f"metric_drop<={allowed:.9f}, minimize=params", model, evaluate=evaluate)
        found = loss(plan)
        assert found <= allowed + FLOAT32_ERROR, f"the metric drops by {found:.4g} of {allowed:.4g}"


@contextmanager
def _questions(interrupt_at: int | None = None) -> Iterator[list[str]]:
    """What strategies ask of their problems meanwhile; Ctrl-C arrives at one of the questions."""
    asked: list[str] = []

    def watched(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*arguments: Any, **named: Any) -> Any:
            asked.append(name)
            if len(asked) == interrupt_at:
                raise KeyboardInterrupt
            return method(*arguments, **named)

        return ask

    with ExitStack() as stack:
        for name in ("basis", "frontier", "option", "check_deadline"):
            method = getattr(Problem, name)
            stack.enter_context(mock.patch.object(Problem, name, watched(name, method)))
        yield asked


def squared_error(model: nn.Module, decision: Decision) -> float:
    """‖W − Ŵ‖² / ‖W‖² of one decision, whatever the plan says of it."""
    weight = canonical_weight(model.get_submodule(decision.targets[0]))
    return float(_method(decision).prepare(weight).error(decision.ranks)) ** 2


def _method(decision: Decision) -> Decomposition:
    settings = {key: value for key, value in decision.args.items() if key != "ranks"}
    return rankopt.decompositions.create(decision.method, **settings)


def _sources(arguments: dict[str, Any], plan: RankPlan) -> dict[str, Any]:
    needs = any(decision.factors.kind != "weights" for decision in plan)
    return {"calibration": arguments["calibration"]} if needs else {}


def _snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": measure.weights_digest(model),
        "modes": [module.training for module in model.modules()],
        "classes": [type(module) for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [parameter.grad is None for parameter in model.parameters()],
        "identity": [id(parameter) for parameter in model.parameters()],
    }


def _torch_settings() -> dict[str, Any]:
    """What holds for all of torch, with a name for each."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
    }


def _generators() -> tuple[Any, ...]:
    return (
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        np.random.get_state()[1].tobytes(),  # type: ignore[index]
    )

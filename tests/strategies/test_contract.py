"""The contract of strategies: the built-in ones pass it, and offenders do not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import rankopt
from rankopt.errors import PlanError, RankoptError
from rankopt.strategy import Tags
from rankopt.testing import (
    check_strategy,
    planted_model,
    strategy_checks,
)
from rankopt_strategies import VBMF, Energy, ParameterRatio


@pytest.mark.parametrize(
    "check",
    [
        check
        for name in rankopt.strategies.names()
        if "evaluate" not in rankopt.strategies.get(name).tags.needs  # see tests/study
        for check in strategy_checks(name)
    ],
    ids=str,
)
def test_contract(check):
    check()


@pytest.mark.parametrize(
    "strategy", [Energy(0.5), ParameterRatio(3.0, beta=1.0), VBMF(1.0, noise="compress")], ids=repr
)
def test_contract_with_other_settings(strategy):
    check_strategy(strategy)


def test_the_contract_catches_offenders():
    @dataclasses.dataclass(frozen=True)
    class Greedy(Energy):
        name = "greedy"

        def search(self, problem):
            return problem.plan(self, [problem.keep(site, "no") for site in problem.sites])

    with pytest.raises(RankoptError, match="breaks its budget"):
        check_strategy(Greedy())

    @dataclasses.dataclass(frozen=True)
    class Loose(Energy):
        name = "loose"

        def search(self, problem):
            return super().search(problem.with_budget(rankopt.Budget(params=0.9)))

    with pytest.raises(RankoptError, match="breaks its budget .params at most 60%"):
        check_strategy(Loose())

    @dataclasses.dataclass(frozen=True)
    class Vandal(Energy):
        name = "vandal"

        def search(self, problem):
            problem.weight(problem.sites[0].layer).zero_()
            return super().search(problem)

    with pytest.raises(AssertionError, match="vandal: leaves_the_model_alone"):
        next(c for c in strategy_checks(Vandal()) if c.name == "leaves_the_model_alone")()

    @dataclasses.dataclass(frozen=True)
    class Careless(Energy):
        name = "careless"

        def search(self, problem):
            weight = problem.weight(problem.sites[0].layer)
            weight.mul_(2)
            plan = super().search(problem)
            weight.div_(2)
            return plan

    @dataclasses.dataclass(frozen=True)
    class Deaf(Energy):
        name = "deaf"

        def search(self, problem):
            try:
                return super().search(problem)
            except KeyboardInterrupt:
                return super().search(problem)

    suites = [{c.name: c for c in strategy_checks(s)} for s in (Careless(), Deaf())]
    suites[0]["leaves_the_model_alone"]()
    with pytest.raises(AssertionError, match="an interrupt left the model changed"):
        suites[0]["survives_interrupts"]()
    with pytest.raises(AssertionError, match="KeyboardInterrupt was swallowed"):
        suites[1]["survives_interrupts"]()


def test_the_contract_catches_hidden_draws_and_missed_deadlines():
    @dataclasses.dataclass(frozen=True)
    class Drawing(Energy):
        name = "drawing"

        def search(self, problem):
            return Energy(float(np.random.uniform(0.5, 0.9))).search(problem.with_budget(None))

    suite = {check.name: check for check in strategy_checks(Drawing())}
    with pytest.raises(AssertionError, match="the same seed gave other decisions"):
        suite["is_deterministic"]()

    @dataclasses.dataclass(frozen=True)
    class Endless(Energy):
        name = "endless"

        def search(self, problem):
            problem.deadline = None
            return super().search(problem)

    suite = {check.name: check for check in strategy_checks(Endless())}
    with pytest.raises(AssertionError, match=r"call problem.check_deadline\(\)"):
        suite["stops_at_the_deadline"]()


def test_the_contract_catches_plans_that_are_not_what_they_say():
    @dataclasses.dataclass(frozen=True)
    class Made(Energy):
        name = "made"
        fault: str = ""

        def search(self, problem):
            if self.fault == "globals":
                torch.use_deterministic_algorithms(True)
            if self.fault == "step":
                problem = dataclasses.replace(problem, round_to=1)
            plan = super().search(problem)
            changed = []
            for decision in plan:
                if self.fault == "cost" and not decision.keeps:
                    cost = {**decision.cost, "params": (decision.cost["params"][0], 1)}
                    decision = dataclasses.replace(decision, cost=cost)
                if self.fault == "methods" and not decision.keeps:
                    decision = dataclasses.replace(decision, method="tt")
                if self.fault == "error" and not decision.keeps:
                    decision = dataclasses.replace(decision, error=decision.error / 2)
                changed.append(decision)
            return dataclasses.replace(plan, decisions=tuple(changed))

    def check(fault, name):
        next(c for c in strategy_checks(Made(0.5, fault)) if c.name == name)()

    for fault, name, match in [
        ("globals", "leaves_torch_alone", "settings of torch changed: deterministic algorithms"),
        ("step", "heeds_round_to", "round_to=4 gave rank"),
        ("cost", "states_true_figures", "params: the layers save"),
        ("error", "states_true_figures", "error of .* stated"),
    ]:
        check("", name)
        try:
            with pytest.raises(AssertionError, match=match):
                check(fault, name)
        finally:
            torch.use_deterministic_algorithms(False)
    with pytest.raises(PlanError, match="chose tt for layer .*; asked for were svd"):
        check("methods", "heeds_methods")


def test_the_contract_catches_metrics_that_are_lost():
    @dataclasses.dataclass(frozen=True)
    class Bold(Energy):
        name = "bold"
        tags = Tags(metric_drop=True)

        def search(self, problem):
            bold = problem.budget.metric_drop is not None
            budget = rankopt.Budget(params=0.2) if bold else problem.budget
            return super().search(problem.with_budget(budget))

    checks = {check.name: check for check in strategy_checks(Bold())}
    with pytest.raises(AssertionError, match="the metric drops by"):
        checks["keeps_the_metric"]()


def test_the_plan_names_the_budget_that_was_asked_for():
    @dataclasses.dataclass(frozen=True)
    class Strict(Energy):
        name = "strict"

        def search(self, problem):
            plan = super().search(problem.with_budget(rankopt.Budget(params=0.4)))
            totals = {axis: {**entry, "before": 10**9} for axis, entry in plan.totals.items()}
            return dataclasses.replace(plan, totals=totals)

    plan = rankopt.search(planted_model(), "params<=60%", strategy=Strict())
    assert plan.budget == rankopt.Budget(params=0.6)
    with pytest.raises(RankoptError, match="breaks its budget"):
        rankopt.search(planted_model(), "params<=30%", strategy=Strict())


def test_settings_may_be_tuples():
    @dataclasses.dataclass(frozen=True)
    class Layered(Energy):
        name = "layered"
        order: tuple[str, ...] = ("hidden", "head")

    for check in strategy_checks(Layered()):
        if check.name in ("plan_round_trips", "is_deterministic"):
            check()
    plan = rankopt.search(planted_model(), "params<=60%", strategy=Layered())
    assert plan.strategy["settings"]["order"] == ["hidden", "head"]

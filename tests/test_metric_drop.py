from __future__ import annotations

import pytest
import torch

import rankopt
import rankopt_strategies
from rankopt._model import measure
from rankopt.errors import BudgetError, BudgetInfeasible, EvaluationError, RankoptWarning
from rankopt.strategy import Strategy, Tags
from rankopt.testing import ModelledClock, planted_inputs, planted_model

DATA = [planted_inputs(32)]


def closeness(dense):
    """Minus the mean squared distance of the outputs from the dense model's."""
    with torch.no_grad():
        reference = dense(DATA[0])

    def evaluate(model):
        assert not model.training
        torch.rand(3)  # must not disturb anyone else's numbers
        with torch.no_grad():
            return -float((model(DATA[0]) - reference).square().mean())

    return evaluate


@pytest.mark.parametrize("strategy", ["knapsack", "energy", "parameter_ratio", "vbmf"])
def test_smallest_within_the_drop(strategy):
    model = planted_model()
    evaluate = closeness(model)
    state = torch.get_rng_state()
    arguments = {"strategy": strategy, "example_inputs": planted_inputs(), "evaluate": evaluate}
    budget = "metric_drop<=1e-3, minimize=macs"
    with measure.preserve_rng():
        tight = rankopt.search(model, budget, **arguments)
    assert torch.equal(torch.get_rng_state(), state)
    loose = rankopt.search(model, "metric_drop<=2e-2, minimize=macs", **arguments)
    for plan, drop in ((tight, 1e-3), (loose, 2e-2)):
        # The plan as applied loses no more than asked for.
        assert evaluate(rankopt.apply(model, plan)) >= -drop * (1 + 1e-5)
        facts = plan.extensions["metric_drop"]
        assert facts["dense"] == pytest.approx(0, abs=1e-9)
        assert plan.budget == rankopt.Budget.parse(f"metric_drop<={drop}, minimize=macs")
        refused = [one["macs"] for one in facts["tried"] if one["metric"] < -drop]
        share = plan.totals["macs"]["measured"] / plan.totals["macs"]["before"]
        assert all(macs < share for macs in refused)
        assert rankopt.RankPlan.from_json(plan.to_json()) == plan
    macs = [plan.totals["macs"]["measured"] for plan in (loose, tight)]
    assert macs[0] < macs[1] if strategy == "knapsack" else macs[0] <= macs[1]


def test_a_study_takes_the_direction_of_the_budget():
    dense, x = planted_model(), planted_inputs(16)
    wanted = dense(x).detach()
    plan = rankopt.search(
        dense,
        "metric_drop<=0.1, minimize=params, direction=minimize",
        example_inputs=x,
        evaluate=lambda model: float((model(x) - wanted).square().mean()),
        strategy=rankopt_strategies.OptunaSearch(n_trials=6),
    )
    assert plan.changes
    with pytest.raises(BudgetError, match="to maximize, the study's to minimize"):
        rankopt.search(
            dense,
            "metric_drop<=0.1, minimize=params",
            example_inputs=x,
            evaluate=lambda model: 1.0,
            strategy=rankopt_strategies.OptunaSearch(n_trials=6, direction="minimize"),
        )


def test_direction_and_other_shares():
    model = planted_model()
    evaluate = closeness(model)
    budget = rankopt.Budget(metric_drop=1e-2, minimize="params", direction="minimize", macs=0.6)
    arguments = {"example_inputs": planted_inputs(), "evaluate": lambda m: -evaluate(m)}
    plan = rankopt.search(model, budget, **arguments)
    assert plan.totals["macs"]["measured"] <= 0.6 * plan.totals["macs"]["before"]
    assert plan.extensions["metric_drop"]["metric"] <= 1e-2
    with pytest.raises(BudgetInfeasible, match=r"no plan of 'knapsack' keeps the metric \(dense"):
        rankopt.search(
            model, rankopt.Budget(metric_drop=0.0, minimize="params", macs=0.3), **{
                **arguments, "evaluate": lambda m: evaluate(m)
            },
        )  # fmt: skip


def test_nothing_to_gain_keeps_the_model():
    calls = iter(range(100))
    with pytest.warns(RankoptWarning, match="every layer is kept"):
        plan = rankopt.search(
            planted_model(), "metric_drop<=0, minimize=params", strategy="parameter_ratio",
            evaluate=lambda model: -next(calls),
        )  # fmt: skip
    assert not plan.changes


def test_with_calibration_apply_gives_the_metric_of_the_search():
    torch.manual_seed(0)
    model = planted_model()
    data = [torch.randn(64, 3, 12, 12) for _ in range(2)]
    evaluate = closeness(model)
    plan = rankopt.search(
        model, "metric_drop<=5e-3, minimize=macs", example_inputs=planted_inputs(),
        calibration=data, evaluate=evaluate,
    )  # fmt: skip
    small = rankopt.apply(model, plan, calibration=data)
    assert evaluate(small) == pytest.approx(plan.extensions["metric_drop"]["metric"], rel=1e-3)


def raises(model):
    raise OSError("no data today")


def nothing(model):
    yield from ()


def trains(model):
    next(model.parameters()).add_(1.0)
    return 1.0


def norms(model):
    model.train()
    model(DATA[0])
    return 1.0


def hooks(model):
    model.register_forward_hook(lambda *_: None)
    return 1.0


@pytest.mark.parametrize(
    ("evaluate", "match"),
    [
        (raises, "evaluate raised OSError: no data today"),
        (lambda model: float("nan"), "evaluate gave nan"),
        (lambda model: "good", "evaluate gave a str"),
        (lambda model: (0.5, 0), "weight 0"),
        (nothing, "yielded no value"),
        (trains, "evaluate changed the model"),
        (norms, "evaluate changed the model"),
        (hooks, "evaluate changed the model"),
        (3, "evaluate raised TypeError"),
    ],
)
def test_bad_evaluate(evaluate, match):
    model = planted_model()
    before = measure.weights_digest(model)
    with pytest.raises(EvaluationError, match=match):
        rankopt.search(model, "metric_drop<=1, minimize=params", evaluate=evaluate)
    assert measure.weights_digest(model) == before


def test_a_bound_in_milliseconds_holds_too():
    """The metric would admit far slower plans."""
    model, x = planted_model(), planted_inputs()
    table = rankopt.ProfileTable(clock=ModelledClock(), rounds=3)
    loose = {"example_inputs": x, "evaluate": lambda model: 0.0, "profile": table}
    free = rankopt.search(model, "metric_drop<=1, minimize=params", **loose)
    clock = ModelledClock()

    def milliseconds(plan):
        small = rankopt.apply(model, plan)
        return clock(lambda: small(x))

    asked = 0.9 * clock(lambda: model(x))
    assert milliseconds(free) <= asked  # nothing was lost, so the smallest plan was taken
    total = measure.count_params(model)

    def strict(small):
        return 0.0 if measure.count_params(small) >= 0.9 * total else -9.0

    slow = rankopt.search(model, "metric_drop<=1, minimize=params", **{**loose, "evaluate": strict})
    assert milliseconds(slow) > asked
    budget = f"metric_drop<=1, minimize=params, latency_ms<={asked}"
    with pytest.raises(BudgetInfeasible):
        rankopt.search(model, budget, **{**loose, "evaluate": strict})


def test_a_strategy_that_searches_under_a_bound_on_the_metric_can_ask_for_options():
    class Smallest(Strategy):
        name = "smallest"
        promises = Tags(metric_drop=True)

        def search(self, problem):
            assert problem.axes == ("macs",)
            chosen = [(site, site.methods[0]) for site in problem.sites]
            assert all(problem.frontier(site, method) for site, method in chosen)
            options = [
                problem.option(site, method, [1 for _ in method.rank_axes(site.layer)], "small")
                for site, method in chosen
            ]
            return problem.plan(self, options)

    model = planted_model()
    plan = rankopt.search(
        model, "metric_drop<=100, minimize=macs", strategy=Smallest(),
        example_inputs=planted_inputs(), evaluate=lambda model: 0.0,
    )  # fmt: skip
    assert plan.changes

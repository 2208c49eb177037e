from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from relaxed_common import plan_for
from torch import nn

import rankopt
from rankopt.errors import (
    LayerError,
    ModelError,
    RankoptWarning,
)
from rankopt.strategy.relaxation import Relaxation
from rankopt.testing import check_strategy, planted_inputs, planted_model
from rankopt_strategies import Knapsack, Relaxed, RelaxedSettings
from rankopt_strategies.relaxed import paper

SMALL = RelaxedSettings(low=2, high=14, step=4, shrink=4, warmup=2, updates=8, logit_rate=0.1)
BUDGETS = ("params<=50%", "macs<=40%", "memory<=70%, macs<=60%", "params<=90%")
# The gap to which the knapsack itself proves its optimum, and some.
NEAR_OPTIMUM = 0.001


# Reconstruction


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("aware", [False, True])
def test_as_good_as_the_optimum(budget, aware):
    data = {"calibration": [planted_inputs(64)]} if aware else {}
    plan = plan_for(budget, strategy=Relaxed(objective="reconstruction"), **data)
    best = plan_for(budget, strategy=Knapsack("equal"), methods=Relaxed.methods, **data)
    damage = plan.extensions["relaxed"]["damage"]
    assert damage <= best.extensions["knapsack"]["damage"] * (1 + NEAR_OPTIMUM)
    assert plan.extensions["relaxed"]["bound"] <= damage * (1 + 1e-9)
    # It sees more options than the knapsack, whose menus are thinned.
    assert damage >= best.extensions["knapsack"]["bound"] * (1 - 0.05)


@pytest.mark.parametrize("axis", ["params", "macs", "memory"])
def test_fills_the_budget(axis):
    torch.manual_seed(1)
    layers = [nn.Linear(96, 96) for _ in range(6)]
    model = nn.Sequential(*layers)
    plan = rankopt.search(
        model, f"{axis}<=45%", strategy="relaxed", example_inputs=torch.randn(1, 96)
    )
    entry = plan.totals[axis]
    assert 0.99 * 0.45 <= entry["measured"] / entry["before"] <= 0.45


def low_rank(out, inputs, rank, noise=0.0):
    layer = nn.Linear(inputs, out, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.linalg.qr(torch.randn(out, rank))[0]
                           @ torch.linalg.qr(torch.randn(inputs, rank))[0].T)  # fmt: skip
        layer.weight.add_(noise * torch.randn(out, inputs))
    return layer


def test_planted_ranks_are_found_exactly():
    ranks = (3, 9, 5)
    model = nn.Sequential(*(low_rank(48, 48, rank) for rank in ranks))
    for budget in ("params<=90%", "params<=36%"):
        plan = rankopt.search(model, budget, strategy="relaxed")
        assert [plan[str(i)].ranks for i in range(3)] == [(rank,) for rank in ranks]


def test_planted_ranks_under_noise_at_their_cost():
    ranks = (3, 9, 5)
    model = nn.Sequential(*(low_rank(48, 48, rank, noise=0.002) for rank in ranks))
    share = sum(rank * 96 for rank in ranks) / (3 * 48 * 48)
    plan = rankopt.search(model, rankopt.Budget(params=share), strategy="relaxed")
    assert [plan[str(i)].ranks for i in range(3)] == [(rank,) for rank in ranks]


def test_seeds_do_not_matter_without_data():
    plans = [plan_for("macs<=45%", seed=seed) for seed in range(5)]
    assert all(plan.decisions == plans[0].decisions for plan in plans)


def test_the_record_shows_the_annealing():
    facts = plan_for("macs<=45%").extensions["relaxed"]
    entropies = [step["entropy"] for step in facts["steps"]]
    assert entropies[-1] <= Relaxed().entropy < 0.5 < entropies[0]
    assert all(step["cost"]["macs"] <= 1 + 1e-5 for step in facts["steps"])
    # As distributions grow sure their expected loss nears that of the plan.
    assert facts["steps"][-1]["loss"] == pytest.approx(facts["damage"], rel=0.05)
    assert len(facts["steps"][0]["kept"]) == len(facts["sites"])


def test_a_log_is_written_while_it_runs(tmp_path):
    path = tmp_path / "log.jsonl"
    plan = plan_for("macs<=45%", strategy=Relaxed(log=str(path)))
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines[-1] == plan.extensions["relaxed"]["steps"][-1]


# The relaxation


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 3.0), st.floats(0.3, 0.95))
def test_prices_hold_the_budget_at_the_least_free_energy(seed, temperature, share):
    rng = np.random.default_rng(seed)
    problem = _problem(f"params<={share:.3f}")
    relaxation = Relaxation(problem)
    scores = rng.uniform(size=len(relaxation))
    probabilities, prices = relaxation.priced(scores, temperature)
    cost = float(relaxation.shares[:, 0] @ probabilities)
    assert cost <= relaxation.room[0] * (1 + 1e-6)
    assert prices[0] == 0 or cost == pytest.approx(relaxation.room[0], rel=1e-4)

    def free_energy(p):
        return float(scores @ p + temperature * (p * np.log(np.maximum(p, 1e-300))).sum())

    # Any other distribution within the budget has more.
    for _ in range(5):
        other = relaxation.softmax(rng.normal(size=len(relaxation)))
        mixed = 0.9 * probabilities + 0.1 * other
        if float(relaxation.shares[:, 0] @ mixed) <= cost:
            assert free_energy(mixed) >= free_energy(probabilities) - 1e-6


def _problem(budget, **arguments):
    found = []

    class Peek(Relaxed):
        def search(self, problem):
            problem.prepare()
            found.append(problem)
            return super().search(problem)

    plan_for(budget, strategy=Peek(), **arguments)
    return found[0]


def test_rounding_takes_the_most_probable_that_fits():
    relaxation = Relaxation(_problem("params<=60%"))
    logs = np.log(relaxation.softmax(10 * np.random.default_rng(0).normal(size=len(relaxation))))
    chosen = relaxation.round(logs, np.zeros(len(relaxation)), np.ones(1))
    assert (relaxation.owner[chosen] == np.arange(len(relaxation.menus))).all()
    assert relaxation.shares[chosen].sum() <= relaxation.room[0] * (1 + 1e-9)


# The published mode


def test_published_settings():
    assert RelaxedSettings.cifar() == RelaxedSettings(10, 100, 10, 10, 0.4, 0.8, 20, 100)
    assert RelaxedSettings.imagenet() == RelaxedSettings(50, 850, 100, 10, 0.4, 0.8, 20, 100)


def test_paper_mode_without_and_with_a_budget():
    strategy = Relaxed(mode="paper", paper=SMALL)
    plan = plan_for(None, strategy=strategy)
    assert plan.changes
    # One rank for both modes, or a mode's largest.
    assert plan["conv"].ranks[0] == min(plan["conv"].ranks[1], 16)
    held = plan_for("macs<=40%", strategy=strategy)
    assert 0.3 < held.totals["macs"]["measured"] / held.totals["macs"]["before"] <= 0.4
    again = rankopt.strategies.create("relaxed", **plan.strategy["settings"])
    assert plan_for(None, strategy=again).decisions == plan.decisions


@pytest.mark.slow
def test_paper_mode_keeps_the_contract():
    quick = RelaxedSettings(low=2, high=6, step=4, warmup=1, updates=2)
    check_strategy(Relaxed(mode="paper", paper=quick))


def test_paper_mode_penalises_ranks():
    light = Relaxed(mode="paper", paper=SMALL)
    steps = plan_for(None, strategy=light).extensions["relaxed"]["steps"]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert set(steps[0]) >= {"loss", "entropy", "ranks", "surest"}


def test_paper_mode_on_data():
    strategy = Relaxed(mode="paper", objective="distillation", paper=SMALL)
    plan = plan_for("macs<=50%", strategy=strategy, calibration=[planted_inputs(32)])
    assert plan.changes


def test_candidates_outside_every_layer():
    strategy = Relaxed(mode="paper", paper=RelaxedSettings(low=500, high=600))
    with pytest.raises(LayerError, match="outside its feasible ranks, 1 to"):
        plan_for(None, strategy=strategy)


def test_divergence_steps_back_and_says_so(monkeypatch):
    real, calls = paper._loss, []

    def diverging(*arguments):
        calls.append(1)
        loss = real(*arguments)
        return loss * float("nan") if len(calls) == 9 else loss

    monkeypatch.setattr(paper, "_loss", diverging)
    with pytest.warns(RankoptWarning, match="stepping back, with half the learning rate"):
        plan = plan_for(None, strategy=Relaxed(mode="paper", paper=SMALL))
    assert plan.changes
    monkeypatch.setattr(paper, "_loss", lambda *a: real(*a) * float("nan"))
    with (
        pytest.raises(ModelError, match="diverged 6 times"),
        pytest.warns(RankoptWarning, match="stepping back"),
    ):
        plan_for(None, strategy=Relaxed(mode="paper", paper=SMALL))


class TwoHeads(nn.Module):
    """Its second output is compared with nothing."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(24, 48), nn.Linear(48, 24)
        self.aux = nn.Linear(48, 24)

    def forward(self, x):
        features = self.body(x).relu()
        return {"out": self.head(features), "aux": self.aux(features)}


@pytest.mark.parametrize("slopes", ["gradient", "measured"])
def test_a_layer_that_the_loss_does_not_reach(slopes):
    plan = rankopt.search(
        TwoHeads(), "params<=60%", strategy=Relaxed(slopes=slopes, rounds=2),
        example_inputs=torch.randn(2, 24), calibration=[torch.randn(64, 24)],
    )  # fmt: skip
    assert plan.changes


@pytest.mark.parametrize("slopes", ["gradient", "measured"])
def test_batches_of_one_sample(slopes):
    model = nn.Sequential(nn.Linear(24, 48), nn.BatchNorm1d(48), nn.Linear(48, 24)).eval()
    plan = rankopt.search(
        model, "params<=60%", strategy=Relaxed(slopes=slopes, rounds=2),
        calibration=[torch.randn(16, 24), torch.randn(1, 24)],
    )  # fmt: skip
    assert plan.changes


def test_losses_that_are_no_number_can_be_written_down(tmp_path):
    calls = []

    def criterion(output, target):
        calls.append(1)
        loss = F.mse_loss(output, target)
        return loss if len(calls) <= 2 else loss * float("nan")

    data = [(torch.randn(8, 16),) * 2]
    strategy = Relaxed(
        objective="task", data=data, criterion=criterion, rounds=2, log=str(tmp_path / "log"),
        slopes="measured",
    )  # fmt: skip
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    plan = rankopt.search(
        model, "params<=60%", strategy=strategy, example_inputs=torch.randn(1, 16)
    )
    plan.save(tmp_path / "plan.json")
    assert rankopt.RankPlan.load(tmp_path / "plan.json").decisions == plan.decisions


def test_data_that_can_be_read_once_serve_every_search_of_a_budget():
    model = planted_model(noise=0.4)
    y = model(planted_inputs(16)).detach()
    data = (pair for pair in [(planted_inputs(16), y)])
    strategy = Relaxed(
        objective="task", data=data, criterion=F.mse_loss, rounds=1, slopes="gradient"
    )
    plan = rankopt.search(
        model, "metric_drop<=0.5, minimize=macs", strategy=strategy,
        example_inputs=planted_inputs(),
        evaluate=lambda small: -float(F.mse_loss(small(planted_inputs(16)), y)),
    )  # fmt: skip
    assert len(plan.extensions["metric_drop"]["tried"]) > 1

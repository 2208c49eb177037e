from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rankopt
from rankopt.errors import BudgetInfeasible, ModelError
from rankopt.strategy.allocation import GOOD_GAP, allocate, limits, within
from rankopt.testing import planted_inputs, planted_model, squared_error
from rankopt_strategies.knapsack import Knapsack


def brute_force(damages, costs, limits):
    best = None
    for chosen in itertools.product(*(range(len(damage)) for damage in damages)):
        used = sum(cost[i] for cost, i in zip(costs, chosen, strict=True))
        if (used <= limits).all():
            damage = sum(d[i] for d, i in zip(damages, chosen, strict=True))
            best = damage if best is None else min(best, damage)
    return best


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 3), st.floats(0.05, 1.0))
def test_finds_the_optimum(seed, sites, axes, share):
    rng = np.random.default_rng(seed)
    damages, costs = [], []
    for _ in range(sites):
        size = int(rng.integers(1, 7))
        damages.append(rng.uniform(size=size))
        costs.append(rng.integers(0, 20, size=(size, axes)).astype(float))
    whole = np.sum([cost.max(axis=0) for cost in costs], axis=0)
    limits = np.maximum(1.0, np.floor(share * whole))
    best = brute_force(damages, costs, limits)
    found = allocate(damages, costs, limits)
    if best is None:
        assert found is None
        return
    assert found is not None
    assert found.damage == pytest.approx(best, rel=1.1 * GOOD_GAP, abs=1e-9)
    assert found.bound <= best + 1e-9
    used = sum(cost[i] for cost, i in zip(costs, found.chosen, strict=True))
    assert (used <= limits * (1 + 1e-9)).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_relaxation_alone_is_feasible_and_bounded(seed):
    rng = np.random.default_rng(seed)
    damages = [np.sort(rng.uniform(size=8))[::-1] for _ in range(5)]
    costs = [np.sort(rng.uniform(size=8))[:, None] for _ in range(5)]
    limits = np.array([2.0])
    best = brute_force(damages, costs, limits)
    found = allocate(damages, costs, limits, exact=False)
    if best is None:
        assert found is None
        return
    assert found.bound <= best + 1e-9 <= found.damage + 2e-9


def test_beats_uniform_ranks_by_its_own_measure():
    x = planted_inputs()
    damage = {}
    for strategy in ("parameter_ratio", "energy", Knapsack()):
        plan = rankopt.search(
            planted_model(noise=0.4), "macs<=50%", strategy=strategy, example_inputs=x
        )
        model = planted_model(noise=0.4)
        damage[plan.strategy["name"]] = sum(squared_error(model, d) for d in plan.changes)
    assert damage["knapsack"] <= min(damage.values()) + 1e-9


def test_reports_its_gap():
    plan = rankopt.search(
        planted_model(), "macs<=50%, params<=40%", strategy="knapsack",
        example_inputs=planted_inputs(),
    )  # fmt: skip
    facts = plan.extensions["knapsack"]
    assert facts["bound"] <= facts["damage"] + 1e-12
    assert facts["gap"] <= 1e-3
    assert facts["fitted_damage"] == pytest.approx(facts["damage"], abs=1e-7)  # nothing is fitted
    assert rankopt.RankPlan.from_json(plan.to_json()) == plan


def test_chooses_between_decompositions():
    separable = torch.nn.Conv2d(8, 8, 3, padding=1)
    low_rank = torch.nn.Conv2d(32, 32, 3, padding=1)
    with torch.no_grad():
        column, row = torch.randn(8, 8, 3, 1), torch.randn(1, 1, 1, 3)
        separable.weight.copy_(column * row)
        left, core, right = torch.randn(32, 5), torch.randn(5, 5, 3, 3), torch.randn(5, 32)
        low_rank.weight.copy_(torch.einsum("sp,pqij,qc->scij", left, core, right))
    model = torch.nn.Sequential(separable, torch.nn.Conv2d(8, 32, 1), low_rank)
    plan = rankopt.search(
        model, "params<=30%", strategy="knapsack", methods=["svd", "tucker2", "spatial_svd"]
    )
    assert plan["0"].method == "spatial_svd"
    assert plan["2"].method == "tucker2"
    assert plan["2"].ranks == (5, 5)


def test_states_its_damage_after_the_fits_too():
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Conv2d(16, 16, 3) for _ in range(3)))
    plan = rankopt.search(
        model, "params<=40%", strategy="knapsack", methods=["cp", "branched_tucker"]
    )
    facts = plan.extensions["knapsack"]
    found = sum(-np.log(1 - squared_fitted_error(model, d)) for d in plan.changes)
    assert facts["fitted_damage"] == pytest.approx(found, rel=1e-3)
    assert facts["damage"] != pytest.approx(found, rel=1e-3)


def squared_fitted_error(model, decision):
    plan = rankopt.RankPlan(model={}, decisions=(decision,))
    name = decision.targets[0]
    folded = rankopt.fold(rankopt.apply(model, plan), model).get_submodule(name).weight.detach()
    weight = model.get_submodule(name).weight.detach()
    return float((folded - weight).square().sum() / weight.square().sum())


class Sum(torch.nn.Module):
    """Two layers of equal weights and inputs, one of which hardly matters."""

    def __init__(self):
        super().__init__()
        self.loud, self.quiet = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)
        self.quiet.load_state_dict(self.loud.state_dict())

    def forward(self, x):
        return self.loud(x) + 0.4 * self.quiet(x)


def test_measured_sensitivity_spares_what_matters():
    torch.manual_seed(0)
    model, held = Sum(), [torch.randn(64, 32) for _ in range(3)]
    lead = {}
    for sensitivity in ("equal", "auto", "measured"):
        plan = rankopt.search(
            model, "params<=50%", strategy=Knapsack(sensitivity), calibration=held
        )
        lead[sensitivity] = plan["loud"].ranks[0] - plan["quiet"].ranks[0]
    assert abs(lead["equal"]) <= 1
    assert 1 < lead["auto"] < lead["measured"]
    with pytest.raises(ModelError, match="needs calibration="):
        rankopt.search(model, "params<=50%", strategy=Knapsack("measured"))
    alike = rankopt.search(model, "params<=50%", strategy=Knapsack())
    assert abs(alike["loud"].ranks[0] - alike["quiet"].ranks[0]) <= 1


def test_infeasible_names_the_smallest():
    with pytest.raises(BudgetInfeasible, match="smallest reachable is params"):
        rankopt.search(planted_model(), "params<=1%", strategy="knapsack")


@pytest.mark.parametrize("bad", [{"sensitivity": "high"}, {"threshold": 2}])
def test_settings_are_validated(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Knapsack(**bad)


def test_one_unit_above_a_large_limit_is_too_much():
    # Two layers of rank 16 cost one MAC more than the limit, 1.6e9.
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    count = 400_000
    limit = (2 * 128 * 16 * count - 0.5) / (2 * 64 * 64 * count)
    x = torch.zeros(1, 64).expand(count, 64)
    plan = rankopt.search(model, rankopt.Budget(macs=limit), strategy="knapsack", example_inputs=x)
    assert sum(d.ranks[0] for d in plan) == 31


def test_limits_of_counts_are_whole_numbers_and_those_of_times_are_not():
    found = limits({"params": 0.5, "latency": 0.5, "macs": 1e-9}, dict.fromkeys(
        ("params", "latency", "macs"), 9))  # fmt: skip
    assert found.tolist() == [4, 4.5, 1]
    assert within(np.array([1.0, 1 + 1e-14])).all()
    assert within(np.array([[4.0, 4.5], [5.0, 4.5]]), found[:2]).tolist() == [True, False]
    assert not within(np.array([10**12 + 1]), np.array([10**12]))

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import rankopt
from rankopt.errors import BudgetError, ModelError, RankoptWarning
from rankopt.testing import (
    ModelledClock,
    Operations,
    check_strategy,
    planted_inputs,
    planted_model,
)
from rankopt_strategies import VBMF, ParameterRatio, Profiled


def table(**settings):
    return rankopt.ProfileTable(clock=ModelledClock(**settings), rounds=3)


def linear(clock, strategy=None, budget=None, size=512, **more):
    return rankopt.search(
        nn.Sequential(nn.Linear(size, size, bias=False)),
        budget,
        strategy=strategy or Profiled(),
        example_inputs=torch.zeros(8, size),
        profile=clock,
        **more,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", [Profiled(base="vbmf"), Profiled(mode="paper")], ids=["vbmf", "paper"]
)
def test_contract_with_other_settings(strategy):
    check_strategy(strategy)


@pytest.mark.parametrize("mode", ["robust", "paper"])
def test_the_fast_side_of_a_cliff_is_chosen(mode):
    """Ranks are padded to 48; from ratio 2 (128) to 3 (85) the only cliff lies at 96."""
    plan = linear(table(multiple=48, overhead_ms=0.001), Profiled(mode=mode))
    assert plan["0"].ranks == (96,)
    assert "base rank 128" in plan["0"].reason


def test_a_cliff_off_the_beaten_ranks_is_found_by_its_neighbours():
    """Padded to 95: 95 is no multiple of 8, but it is timed once 88 and 96 differ."""
    plan = linear(table(multiple=95, overhead_ms=0.001))
    assert plan["0"].ranks == (95,)


def test_without_cliffs_the_base_rank_stays():
    plan = linear(table(multiple=1, overhead_ms=0.001))
    assert plan["0"].ranks == (128,)


def test_dense_is_kept_where_it_wins_with_the_reason():
    plan = linear(table(overhead_ms=10.0))
    assert not plan.changes
    assert plan["0"].reason.startswith("keep: slower than dense: at best 1.")
    paper = linear(table(overhead_ms=10.0), Profiled(mode="paper"))
    assert not paper.changes


def test_all_ranks_and_few_give_the_same():
    for multiple, power in ((32, 128), (96, 85)):
        few, every, powers = (
            linear(table(multiple=multiple, overhead_ms=0.001), Profiled(candidates=candidates))
            for candidates in ("aligned", "every", "powers")
        )
        assert few["0"].ranks == every["0"].ranks
        runs = [plan.extensions["profiled"]["runs"] for plan in (few, every)]
        assert runs[0] < runs[1] / 2
        assert powers["0"].ranks == (power,)


def test_a_whole_model_that_does_not_gain_is_left_dense():
    class Whole(ModelledClock):
        """Chains pay alone, but in a model every operation beyond the fifth costs 1 ms."""

        def __call__(self, function):
            with Operations() as seen, torch.no_grad():
                function()
            return super().__call__(function) + max(0, len(seen.found) - 6)

    clock = rankopt.ProfileTable(clock=Whole(), rounds=3)
    plan = rankopt.search(
        planted_model(), None, strategy="profiled", example_inputs=planted_inputs(), profile=clock
    )
    assert not plan.changes
    assert any("the whole model took" in decision.reason for decision in plan)
    assert plan.extensions["profiled"]["ratio"] == 1


def test_a_budget_holds_though_slow_layers_are_kept():
    model, x = planted_model(), planted_inputs()
    base = rankopt.search(model, "macs<=50%", strategy="energy", example_inputs=x)
    plan = rankopt.search(
        model, "macs<=50%", strategy=Profiled(base="energy"), example_inputs=x, profile=table()
    )
    assert plan.totals["macs"]["measured"] <= 0.5 * plan.totals["macs"]["before"]
    clock = ModelledClock()
    models = [rankopt.apply(model, p) for p in (plan, base)]
    times = [clock(lambda m=m: m(x)) for m in models]
    assert times[0] < times[1]
    slow = [d for d in plan if d.reason.startswith("keep: slower than dense")]
    assert slow
    assert all(not base[d.targets[0]].keeps for d in slow)


def test_slow_ranks_are_taken_only_where_the_budget_needs_them():
    plan = linear(table(overhead_ms=10.0), budget="macs<=40%")
    assert plan["0"].method == "svd"
    assert "needed for the budget" in plan["0"].reason
    assert plan.extensions["profiled"]["ratio"] > 1


def test_bases_are_names_instances_or_what_a_plan_says():
    clock = table(overhead_ms=0.001)
    instance = linear(clock, Profiled(base=ParameterRatio(3.0)))
    settings = instance.strategy["settings"]
    assert settings["base"] == {"name": "parameter_ratio", "settings": {
        "ratio": 3.0, "beta": None, "overrides": {}}}  # fmt: skip
    again = linear(clock, rankopt.strategies.create("profiled", **settings))
    assert again.decisions == instance.decisions
    assert Profiled(base=VBMF(0.7)).describe(0)["settings"]["base"]["settings"]["weakening"] == 0.7
    assert Profiled(base="vbmf").describe(0)["settings"]["base"] == "vbmf"


def test_ranks_are_rounded_before_they_are_timed():
    clock = table(multiple=48, overhead_ms=0.001)
    plan = linear(clock, Profiled(candidates="every"), round_to=20)
    assert plan["0"].ranks == (120,)  # of 120, 100 and 80, padded to 144, 144 and 96
    ratio = (0.002 + 2 * 8 * 528 * 144 / 2e6) / (0.001 + 8 * 528 * 528 / 2e6)
    assert f"{ratio:.3g}" in plan["0"].reason


def test_inputs_are_needed():
    with pytest.raises(ModelError, match=r"'profiled' needs example_inputs= to time"):
        rankopt.search(planted_model(), "params<=50%", strategy="profiled")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"base": 3}, "base=3"),
        ({"mode": "fast"}, "mode='fast'"),
        ({"candidates": "odd"}, "candidates='odd'"),
        ({"tolerance": 1}, "tolerance=1"),
        ({"tolerance": "x"}, "tolerance='x'"),
    ],
)
def test_settings_are_validated(settings, match):
    with pytest.raises(ValueError, match=match):
        Profiled(**settings)


def test_a_base_that_needs_a_budget_says_so():
    with pytest.raises(BudgetError, match="base='relaxed' needs a budget"):
        rankopt.search(
            planted_model(), None, strategy=Profiled(base="relaxed"),
            example_inputs=planted_inputs(),
            profile=rankopt.ProfileTable(clock=ModelledClock(), rounds=3),
        )  # fmt: skip


def test_under_a_budget_on_time_ranks_are_those_that_were_timed():
    """Ranks between those of the coarse grid keep the time that the reason states."""
    table = rankopt.ProfileTable(clock=ModelledClock(multiple=24), rounds=3)
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(300, 300) for _ in range(4)])
    plan = rankopt.search(
        model, "latency<=70%", strategy="profiled", example_inputs=torch.randn(64, 300),
        profile=table,
    )  # fmt: skip
    assert plan.changes
    for decision in plan.changes:
        before, after = decision.cost["latency"]
        assert decision.reason.startswith(f"{after / before:.3g} [")


def busy(clock):
    """A clock on a busy machine: each time is off by a factor of its own."""
    noise = np.random.default_rng(0)
    return rankopt.ProfileTable(clock=lambda run: clock(run) * noise.uniform(1, 2), rounds=5)


@pytest.mark.parametrize("budget", [None, "params<=60%"])
def test_decisions_by_noise_are_owned_up_to(budget):
    clock = busy(ModelledClock(multiple=64, overhead_ms=0.001))
    with pytest.warns(RankoptWarning) as warned:
        linear(clock, budget=budget)
    said = " ".join(str(warning.message) for warning in warned)
    assert "the times that 1 of 1 layers were decided by vary too much to decide" in said
    assert "close other programs and search again" in said

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rankopt
from rankopt._model.layers import canonical_weight, find_layers
from rankopt._timing.profile_table import ProfileTable
from rankopt.errors import ModelError, PlanError
from rankopt.strategy import Strategy, Tags
from rankopt.testing import (
    ModelledClock,
    check_strategy,
    planted_inputs,
    planted_model,
    squared_error,
)
from rankopt.vision import import_torchvision
from rankopt_strategies import VBMF, Energy, ParameterRatio
from rankopt_strategies.parameter_ratio import svd_rank, tucker2_ranks


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Energy(1.5), "threshold=1.5"),
        (lambda: Energy(float("nan")), "threshold=nan"),
        (lambda: Energy("a"), "threshold='a'"),
        (lambda: ParameterRatio(1.0), "ratio=1.0: .* above 1"),
        (lambda: ParameterRatio(beta=0), "beta=0"),
        (lambda: ParameterRatio("2"), "ratio='2'"),
        (lambda: ParameterRatio(overrides={"fc": 0.5}), r"overrides\['fc'\]=0.5"),
        (lambda: ParameterRatio(beta="x"), "beta='x'"),
        (lambda: ParameterRatio(overrides=["fc"]), r"overrides=\['fc'\]"),
        (lambda: VBMF(0), r"weakening=0: expected a number in \(0, 1\]"),
        (lambda: VBMF("x"), "weakening='x'"),
        (lambda: VBMF(noise="drop"), "noise='drop'"),
    ],
)
def test_settings_are_validated(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# parameter_ratio


@pytest.mark.parametrize(
    ("inputs", "outputs", "rank"),
    [(2048, 512, 204), (64, 64, 16), (64, 256, 25), (2048, 1000, 335), (2048, 1001, 336)],
)
def test_published_svd_ranks(inputs, outputs, rank):
    assert svd_rank(inputs, outputs, 2.0) == rank


@pytest.mark.parametrize(("channels", "rank"), [(512, 309), (64, 38)])
def test_published_tucker_ranks(channels, rank):
    assert tucker2_ranks(channels, channels, 9, 2.0) == (rank, rank)


@given(st.integers(4, 600), st.integers(4, 600), st.sampled_from([3, 9, 25]), st.floats(1.1, 20))
def test_formula_ranks_meet_their_ratio(inputs, outputs, kernel, ratio):
    dense = inputs * outputs * kernel
    first, second = tucker2_ranks(inputs, outputs, kernel, ratio)
    if min(first, second) > 1:
        assert inputs * first + kernel * first * second + second * outputs <= dense / ratio
    rank = svd_rank(inputs, outputs, ratio)
    if rank > 1:
        assert rank * (inputs + outputs) <= inputs * outputs / ratio


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "params", "macs", "dense"),
    [
        ("resnet50", -50.10, -47.31, 4_089_184_256),
        ("resnet101", -50.14, -48.75, 7_801_405_440),
        ("resnet152", -50.15, -49.26, 11_513_626_624),
    ],
)
@pytest.mark.parametrize("stride_on", ["first", "last"])
def test_published_table(name, params, macs, dense, stride_on):
    """The networks of arXiv 2407.20266, as built; the paper strides the last factor."""
    model = import_torchvision().models.get_model(name)
    plan = rankopt.search(
        model,
        None,
        strategy=ParameterRatio(2.0),
        methods=[rankopt.decompositions.create("svd", stride_on=stride_on), "tucker2"],
        example_inputs=torch.randn(1, 3, 224, 224),
        ignore=["conv1"],
    )
    papers = {"resnet50": -43.55, "resnet101": -46.78, "resnet152": -47.92}
    assert plan.totals["macs"]["before"] == dense
    change = {
        axis: round(100 * (entry["measured"] / entry["before"] - 1), 2)
        for axis, entry in plan.totals.items()
    }
    assert change["params"] == params
    assert change["macs"] == (macs if stride_on == "first" else papers[name])


@pytest.mark.parametrize("method", ["spatial_svd", "cp", "tt", "branched_tucker"])
def test_every_method_has_a_parameter_ratio(method):
    model = nn.Sequential(nn.Conv2d(24, 32, 3, bias=False))
    plan = rankopt.search(model, None, strategy="parameter_ratio", methods=[method])
    (decision,) = plan.changes
    before, after = decision.cost["params"]
    assert 0.4 * before < after <= 0.5 * before


# energy


def test_energy_without_a_budget_retains_its_threshold():
    model = planted_model()
    plan = rankopt.search(model, None, strategy=Energy(0.95))
    assert plan.changes
    for decision in plan.changes:
        assert squared_error(model, decision) <= 0.05
        method = rankopt.decompositions.create(decision.method)
        (name,) = decision.targets
        layer = next(layer for layer in find_layers(model) if layer.name == name)
        ranks = np.meshgrid(*(np.arange(1, a.maximum + 1) for a in method.rank_axes(layer)))
        errors = method.prepare(canonical_weight(model.get_submodule(name))).error(ranks)
        cheaper = method.params(layer, ranks) < decision.cost["params"][1]
        assert cheaper.any()
        assert (errors[cheaper] ** 2 > 0.05).all()


def test_energy_compresses_what_decays():
    flat = nn.Linear(32, 32)
    nn.init.orthogonal_(flat.weight)
    decaying = nn.Linear(32, 32)
    with torch.no_grad():
        decaying.weight.copy_(flat.weight * torch.logspace(0, -4, 32))
    plan = rankopt.search(nn.Sequential(flat, decaying), "params<=60%", strategy="energy")
    assert not plan["1"].keeps
    assert plan["0"].keeps or plan["0"].ranks > plan["1"].ranks


def test_every_strategy_names_itself_in_the_plan():
    table = ProfileTable(clock=ModelledClock(), rounds=3)
    for name in rankopt.strategies.names():
        needs = rankopt.strategies.get(name).tags.needs
        given = {"evaluate": lambda model: 1.0} if "evaluate" in needs else {}
        plan = rankopt.search(
            planted_model(),
            "macs<=60%",
            strategy=name,
            example_inputs=planted_inputs(),
            profile=table,
            **given,
        )
        assert plan.strategy["name"] == name
        assert rankopt.strategies.create(name, **plan.strategy["settings"])


def test_overrides_give_some_layers_their_own_ratio():
    strategy = ParameterRatio(2.0, overrides={"head": 1, "hid*": 4.0})
    plan = rankopt.search(planted_model(), None, strategy=strategy)
    assert plan["head"].reason == "keep: overrides= asks for a ratio of 1"
    assert plan["hidden"].ranks == (svd_rank(48, 64, 4.0),)
    assert plan["point"].ranks == (svd_rank(32, 48, 2.0),)
    held = rankopt.search(planted_model(), "params<=60%", strategy=strategy)
    assert held["hidden"].ranks == plan["hidden"].ranks
    assert rankopt.RankPlan.from_json(held.to_json()) == held


def test_a_strategy_that_returns_no_plan_is_named():
    @dataclasses.dataclass(frozen=True)
    class Forgetful(Energy):
        name = "forgetful"

        def search(self, problem):
            super().search(problem)

    with pytest.raises(PlanError, match="'forgetful' returned a NoneType, not a RankPlan"):
        rankopt.search(planted_model(), "params<=50%", strategy=Forgetful())


def test_overrides_that_match_nothing_are_said():
    with pytest.raises(ModelError, match=r"overrides\['heda'\] matches no layer"):
        rankopt.search(
            planted_model(), "params<=50%", strategy=ParameterRatio(overrides={"heda": 4.0})
        )


def test_overrides_match_every_name_of_a_layer():
    model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(4)))
    model[1].weight, model[3] = model[0].weight, model[2]
    overrides = {"1": 4.0, "3": 8.0}
    plan = rankopt.search(model, None, strategy=ParameterRatio(overrides=overrides))
    assert [d.ranks for d in plan.changes] == [(4,), (2,)]


def test_two_variants_of_a_decomposition_state_their_own_errors():
    from rankopt._decompositions import BranchedTucker

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 32, 3, bias=False))
    variants = [BranchedTucker(branches=2), BranchedTucker(branches=4)]
    found = [
        rankopt.search(model, "params<=25%", methods=methods).changes[0]
        for methods in (variants, variants[::-1])
    ]
    assert found[0].args == found[1].args
    assert found[0].error == pytest.approx(found[1].error)
    assert found[0].error == pytest.approx(true_error(model, found[0]), rel=1e-3)


def true_error(model, decision):
    plan = rankopt.RankPlan(model={}, decisions=(decision,))
    folded = rankopt.fold(rankopt.apply(model, plan), model)
    weight = model[0].weight.detach()
    return float((folded[0].weight.detach() - weight).norm() / weight.norm())


@dataclasses.dataclass(frozen=True)
class Odd(Strategy):
    """Keeps all but the first layer, whose option `choose` makes."""

    choose: object = None
    found: object = None
    name = "odd"

    def describe(self, seed):
        return {"name": self.name, "settings": {"found": self.found}, "seed": seed}

    def search(self, problem):
        options = [problem.keep(site, "") for site in problem.sites]
        if self.choose is not None:
            options[0] = self.choose(problem, problem.sites[0])
        return problem.plan(self, options)


@pytest.mark.parametrize(
    ("found", "match"),
    [
        ({"a": [1, torch.zeros(2)]}, r"strategy\['settings'\]\['found'\]\['a'\]\[1\]: a Tensor is"),
        ({3: 1}, r"\['found'\]: key: expected a str, got 3"),
        (float("nan"), r"\['found'\]: expected a finite number, got nan"),
    ],
)
def test_settings_that_no_file_holds(found, match):
    with pytest.raises(PlanError, match=match):
        rankopt.search(planted_model(), None, strategy=Odd(found=found))


@pytest.mark.parametrize(
    ("choose", "match"),
    [
        (lambda p, s: p.option(s, "svd", [3]), "method='svd': expected a decomposition"),
        (lambda p, s: p.option(s, s.methods[0], 8), "ranks=8: expected an integer for each axis"),
        (lambda p, s: p.option(s, s.methods[0], [1.5, 2]), r"ranks=\[1.5, 2\]: expected"),
    ],
)
def test_options_that_are_none(choose, match):
    with pytest.raises(ValueError, match=match):
        rankopt.search(planted_model(), None, strategy=Odd(choose=choose))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes")
def test_a_check_that_fails_is_named_whatever_it_raises():
    def fail(problem, site):
        raise KeyError("lost")

    with pytest.raises(KeyError) as raised:
        check_strategy(Odd(choose=fail))
    assert raised.value.__notes__ == ["raised in the check odd: meets_budgets"]


def test_needs_are_a_set_of_names():
    assert Tags(needs=["calibration"]).needs == frozenset({"calibration"})
    with pytest.raises(ValueError, match="needs='calibration': expected a set of names"):
        Tags(needs="calibration")

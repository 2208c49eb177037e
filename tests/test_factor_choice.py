"""``asymmetric="search"`` and ``fisher="search"``: the way of making factors is found out."""

from __future__ import annotations

import json
from itertools import product

import optuna
import pytest
import torch

import rankopt
from rankopt._model.metric import metric_of
from rankopt.cli import main
from rankopt.errors import BudgetError, ModelError
from rankopt.testing import planted_model
from rankopt_strategies import OptunaSearch, Relaxed

BUDGET = "params<=30%"


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    return planted_model(noise=0.5), [torch.randn(32, 3, 12, 12) for _ in range(4)]


def test_the_nearest_of_all_ways_is_taken(case):
    model, data = case
    near = rankopt.Agreement(model, data)
    values = {}
    for fisher, asymmetric in product((False, True), repeat=2):
        way = {"fisher": fisher, "asymmetric": asymmetric}
        plan = rankopt.search(model, BUDGET, calibration=data, **way)
        pairs = list(near(rankopt.apply(model, plan, calibration=data)))
        values[fisher, asymmetric] = -sum(v * n for v, n in pairs) / sum(n for _, n in pairs)
    plan = rankopt.search(model, BUDGET, calibration=data, fisher="search", asymmetric="search")
    tried = {(e["fisher"], e["asymmetric"]): e["divergence"] for e in plan.extensions["factors"]}
    assert tried == pytest.approx(values, rel=1e-3)
    assert len({round(value, 6) for value in tried.values()}) == 4
    best = min(tried, key=tried.get)
    assert {(d.factors.fisher, d.factors.asymmetric) for d in plan.changes} == {best}
    assert rankopt.RankPlan.from_json(plan.to_json()) == plan


def test_one_of_the_two_may_be_given(case):
    model, data = case
    plan = rankopt.search(model, BUDGET, calibration=data, fisher=True, asymmetric="search")
    assert [(e["fisher"], e["asymmetric"]) for e in plan.extensions["factors"]] == [
        (True, False),
        (True, True),
    ]
    assert all(d.factors.fisher for d in plan.changes)


def test_a_relaxed_search_keeps_the_state_of_both_and_goes_on(case, tmp_path):
    model, data = case
    settings = {"calibration": data, "fisher": "search", "asymmetric": "search"}
    relaxed = Relaxed(rounds=2, folder=str(tmp_path))
    first = rankopt.search(model, BUDGET, strategy=relaxed, **settings)
    assert len(list(tmp_path.glob("relaxed-*.pt"))) == 2
    again = rankopt.search(model, BUDGET, strategy=relaxed, **settings)
    assert again.decisions == first.decisions


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"fisher": "both"}, ValueError, "fisher='both': expected True, False or 'search'"),
        ({"asymmetric": 1.5}, ValueError, "asymmetric=1.5"),
        ({"fisher": "search"}, ModelError, "fisher='search' needs calibration="),
    ],
)
def test_what_cannot_be_chosen(case, settings, error, words):
    with pytest.raises(error, match=words):
        rankopt.search(case[0], BUDGET, **settings)


def test_a_budget_on_the_metric_has_no_size_to_compare_at(case):
    model, data = case
    with pytest.raises(BudgetError, match="pass asymmetric=True or False"):
        rankopt.search(
            model, "metric_drop<=0.1, minimize=params", calibration=data,
            evaluate=rankopt.Agreement(model, data), asymmetric="search",
        )  # fmt: skip


def test_in_the_shell(tmp_path, capsys):
    (tmp_path / "made.py").write_text(
        "import torch\nfrom rankopt.testing import planted_model\n"
        "def build():\n    torch.manual_seed(0)\n    return planted_model(noise=0.5)\n"
        "def data():\n    return [torch.ones(32, 3, 12, 12), torch.rand(32, 3, 12, 12)]\n"
    )
    spec = f"{tmp_path / 'made.py'}:build"
    data = spec.replace(":build", ":data")
    options = ["--budget", BUDGET, "--calibration", data, "--search-factors", "--json"]
    assert main(["search", spec, *options]) == 0
    assert len(json.loads(capsys.readouterr().out)["extensions"]["factors"]) == 4


def test_plans_judged_by_the_metric_are_judged_with_the_factors_they_get(case, tmp_path):
    model, data = case
    near = rankopt.Agreement(model, data)
    searched = OptunaSearch(n_trials=5, storage=f"sqlite:///{tmp_path}/trials.db")
    settings = {"calibration": data, "evaluate": near, "strategy": searched}
    plan = rankopt.search(model, BUDGET, **settings, asymmetric="search", fisher="search")
    small = rankopt.apply(model, plan, calibration=data)
    assert plan.extensions["study"]["metric"] == pytest.approx(metric_of(near, small), rel=1e-3)
    kinds = {(entry["fisher"], entry["asymmetric"]) for entry in plan.extensions["factors"]}
    assert len(kinds) == 4
    names = optuna.get_all_study_names(searched.storage)
    assert sorted(names) == [
        "rankopt", "rankopt, asymmetric", "rankopt, fisher", "rankopt, fisher, asymmetric",
    ]  # fmt: skip
    again = rankopt.search(model, BUDGET, **settings, asymmetric="search", fisher="search")
    assert again.decisions == plan.decisions

from __future__ import annotations

import pytest
import torch
from study_common import closeness
from torch import nn
from weighing import Blind

import rankopt
import rankopt_strategies
from rankopt._model.inputs import divergence
from rankopt._search.opening import open_problem
from rankopt.errors import ModelError, StudyError
from rankopt.testing import planted_inputs, planted_model


def study_of(model, data, storage, **settings):
    x = torch.cat(data)
    dense = model(x).detach()

    def agreement(candidate):
        return -divergence(dense, candidate(x))

    return rankopt.study(
        model, evaluate=agreement, calibration=data, storage=storage, objective="params",
        warm_starts=("parameter_ratio",), sampler="random", **settings,
    )  # fmt: skip


@pytest.mark.parametrize("fisher", [False, True])
def test_a_study_finds_out_whether_to_fit_in_order(fisher):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(24, 24), nn.ReLU()) for _ in range(4)), nn.Linear(24, 8)
    )
    data = [torch.randn(128, 24) for _ in range(2)]
    made = study_of(model.eval(), data, None, fisher=fisher, asymmetric="search")
    made.run(n_trials=14, progress=False)
    kinds = {d.factors.asymmetric for point in made.points for d in point.plan.changes}
    assert kinds == {False, True}
    assert {d.factors.fisher for p in made.points for d in p.plan.changes} == {fisher}
    x = torch.cat(data)
    for point in made.points:  # the model of a trial is the one its plan gives
        small = rankopt.apply(model, point.plan, calibration=data)
        found = -divergence(model(x).detach(), small(x).detach())
        assert found == pytest.approx(point.metric, rel=1e-3, abs=1e-6)


def test_a_plan_in_order_can_come_again():
    model, data = Blind().eval(), [torch.randn(128, 32)]
    plans = [
        rankopt.search(model, "params<=60%", calibration=data, asymmetric=ordered)
        for ordered in (True, False)
    ]
    problem = open_problem(
        model, None, calibration=data, evaluate=lambda m: float(m(data[0]).square().mean())
    ).problem
    values = [list(problem.evaluate(plans[index])) for index in (0, 1, 0, 0)]
    assert values[0] == values[2] == values[3]


def test_a_study_in_order_throughout(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24)).eval()
    data, path = [torch.randn(128, 24)], tmp_path / "s.db"
    made = study_of(model, data, path, asymmetric=True)
    made.run(n_trials=5, progress=False)
    assert {d.factors.kind for p in made.points for d in p.plan.changes} == {"asymmetric"}
    with pytest.raises(StudyError, match="has asymmetric True, the request 'search'"):
        study_of(model, data, path, asymmetric="search")


def test_a_study_finds_out_whether_to_weigh(tmp_path):
    model, data = Blind().eval(), [torch.randn(128, 32) for _ in range(2)]
    path = tmp_path / "study.db"
    made = study_of(model, data, path, fisher="search", only=["first"])
    made.run(n_trials=10, progress=False)
    again = study_of(model, data, path)  # goes on with what the study keeps
    again.run(n_trials=20, progress=False)
    assert len(again.points) >= 10
    kinds = {d.factors.fisher for point in again.points for d in point.plan.changes}
    assert kinds == {False, True}
    best = again.best("params<=60%")
    assert {d.factors.fisher for d in best.changes} == {True}
    small = rankopt.apply(model, best, calibration=data)
    point = max(
        (p for p in again.front if p.plan.decisions == best.decisions), key=lambda p: p.metric
    )
    x = torch.cat(data)
    assert -divergence(model(x), small(x)) == pytest.approx(point.metric, rel=1e-3, abs=1e-6)
    with pytest.raises(StudyError, match="has fisher 'search', the request False"):
        study_of(model, data, path, fisher=False)


def test_a_study_says_what_it_expects():
    model, data = Blind().eval(), [torch.randn(64, 32)]
    with pytest.raises(StudyError, match="fisher='maybe': expected"):
        study_of(model, data, None, fisher="maybe")
    numbered = study_of(model, data, None, fisher=1)
    assert numbered.request["fisher"] is True
    with pytest.raises(ModelError, match="needs calibration="):
        rankopt.study(model, evaluate=lambda m: 0.0, storage=None, fisher=True)


def test_plans_known_beforehand_are_queued_with_every_choice_taken():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24)).eval()
    data = [torch.randn(128, 24)]
    made = study_of(
        model, data, None, fisher="search", asymmetric="search", sizes=(0.7, 0.5), space="warp"
    )
    made.run(n_trials=6, progress=False)
    kinds = {
        point.warm: {decision.factors.kind for decision in point.plan.changes}
        for point in made.points
        if point.warm
    }
    for share in ("70%", "50%"):
        assert kinds[f"parameter_ratio at {share}, fisher, asymmetric"] == {"asymmetric+fisher"}
        assert kinds[f"parameter_ratio at {share}"] == {"whitened"}


def search_with(storage, **settings):
    strategy = rankopt_strategies.OptunaSearch(n_trials=6, storage=storage)
    data = [planted_inputs(32)]
    more = {"example_inputs": planted_inputs(), "evaluate": closeness, "calibration": data}
    return rankopt.search(planted_model(), "macs<=60%", strategy=strategy, **more, **settings)


def test_a_search_for_factors_keeps_a_study_of_each_kind(tmp_path):
    storage = f"sqlite:///{tmp_path / 'kept.db'}"
    plan = search_with(storage, fisher="search")
    assert plan.decisions == search_with(None, fisher="search").decisions
    assert plan.decisions == search_with(storage, fisher="search").decisions  # resumed


def test_a_search_goes_on_with_the_same_methods_only(tmp_path):
    storage = f"sqlite:///{tmp_path / 'kept.db'}"
    search_with(storage)
    search_with(storage)
    with pytest.raises(StudyError, match="has methods .*, the request svd, cp"):
        search_with(storage, methods=("svd", "cp"))


@pytest.mark.parametrize("space", ["warp", "tilt"])
def test_gaussian_processes_in_a_search(space):
    strategy = rankopt_strategies.OptunaSearch(n_trials=14, sampler="gp", space=space)
    more = {"example_inputs": planted_inputs(), "evaluate": closeness}
    assert rankopt.search(planted_model(), "macs<=60%", strategy=strategy, **more).changes


@pytest.mark.parametrize("fisher", [False, True])
def test_a_search_goes_on_with_a_study_of_layers_that_take_few_methods(fisher, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)), torch.randn(16, 32)
    want = model.eval()(x).detach()
    storage = f"sqlite:///{tmp_path / 'kept.db'}"
    more = {"example_inputs": x, "calibration": [x], "fisher": fisher}
    more["evaluate"] = lambda other: -float((other(x) - want).detach().square().mean())
    study = rankopt.study(model, "macs<=60%", storage=storage, objective="macs", **more)
    study.run(2)
    strategy = rankopt_strategies.OptunaSearch(n_trials=1, storage=storage)
    rankopt.search(model, "macs<=60%", strategy=strategy, **more)
    assert len(study.optuna.trials) >= 3
    with pytest.raises(StudyError, match="has methods svd, tucker2, spatial_svd, the request svd"):
        rankopt.search(model, "macs<=60%", strategy=strategy, methods="svd", **more)

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest
import torch
from study_common import INPUTS, WANT, closeness, open_study

import rankopt
from rankopt._model import measure
from rankopt.errors import (
    BudgetInfeasible,
    MissingDependency,
    ModelError,
    RankoptWarning,
    StudyError,
)
from rankopt.testing import check_strategy, planted_inputs, planted_model
from rankopt_strategies.optuna_search import OptunaSearch


def test_front_and_best():
    model = planted_model()
    digest, state = measure.weights_digest(model), torch.get_rng_state()
    study = open_study().run(n_trials=14)
    assert torch.equal(torch.get_rng_state(), state)
    assert measure.weights_digest(model) == digest
    front = study.front
    sizes = [point.figures["macs"] for point in front]
    metrics = [point.metric for point in front]
    assert sizes == sorted(sizes)
    assert metrics == sorted(metrics)
    assert study.dense_metric == 1
    points = study.points
    for point in front:  # nobody dominates a point of the front
        assert not any(
            other.metric >= point.metric and other.figures["macs"] < point.figures["macs"]
            for other in points
        )
    plan = study.best("macs<=50%")
    share = plan.totals["macs"]["measured"] / plan.totals["macs"]["before"]
    assert share <= 0.5
    small = rankopt.apply(model, plan)
    found = plan.extensions["study"]
    # What was applied is what the trial measured.
    assert closeness(small) == pytest.approx(found["metric"], abs=1e-5)
    warm = [
        p.metric for p in points if p.warm and p.figures["macs"] <= 0.5 * front[-1].figures["macs"]
    ]
    assert found["metric"] >= max(warm)
    assert rankopt.RankPlan.from_json(plan.to_json()) == plan
    tight = study.best("metric_drop<=0.01, minimize=macs")
    assert tight.extensions["study"]["metric"] >= 0.99
    with pytest.raises(BudgetInfeasible, match=r"none of \d+ trials meets it \(smallest: macs"):
        study.best("macs<=1%")
    with pytest.raises(StudyError, match="knows params, memory, macs of its plans, not latency"):
        study.best("latency<=50%")


def test_warm_starts_come_first_and_are_the_strategies_plans():
    study = open_study(budget="macs<=50%").run(n_trials=5)
    warm = [point.warm for point in study.points]
    assert warm[:3] == ["dense", "knapsack at 50%", "knapsack at 40%"]
    plan = rankopt.search(
        planted_model(), "macs<=50%", example_inputs=planted_inputs(),
        methods=rankopt.Strategy.methods,
    )  # fmt: skip
    ours = study.points[1].plan
    assert [d.args for d in ours] == [d.args for d in plan]
    assert [d.cost for d in ours] == [d.cost for d in plan]
    assert ours.totals["macs"]["predicted"] == plan.totals["macs"]["predicted"]
    one = open_study(budget="macs<=50%", warm_starts="knapsack").optuna.trials
    assert [trial.user_attrs["warm"] for trial in one][:2] == warm[:2]


def test_calibration_refreshes_norms_as_apply_does():
    data = [torch.randn(64, 3, 12, 12) for _ in range(2)]
    study = open_study(calibration=data, budget="macs<=50%").run(n_trials=8)
    plan = study.best()
    assert {decision.factors.kind for decision in plan.changes} != {"weights"}
    small = rankopt.apply(planted_model(), plan, calibration=data)
    assert closeness(small) == pytest.approx(plan.extensions["study"]["metric"], abs=1e-4)


def test_resumes_and_answers_duplicates(tmp_path):
    path = tmp_path / "s.db"
    first = open_study(path).run(n_trials=6)
    again = open_study(path)
    assert len(again.points) == 6
    again.run(n_trials=6)  # there are six already
    assert len(again.points) == 6
    calls = []

    def counted(model):
        calls.append(1)
        return closeness(model)

    more = open_study(path, evaluate=counted)
    known = first.points[1]
    attributes = first.optuna.trials[1].user_attrs
    more.optuna.enqueue_trial(
        dict(first.optuna.trials[1].params), {"plan": attributes["plan"], "warm": "again"}
    )
    more.run(n_trials=7)
    assert not calls  # the same configuration, answered from the study
    assert more.points[-1].metric == known.metric
    assert more.status()["duplicates"] == 1
    read = rankopt.Study.load(path)
    assert [p.metric for p in read.front] == [p.metric for p in more.front]
    assert read.best("macs<=60%").decisions == more.best("macs<=60%").decisions
    with pytest.raises(StudyError, match="opened to be read"):
        read.run(8)


SIZE = 4
BATCHES = list(enumerate(torch.split(INPUTS, SIZE)))


def by_batch(model, batch):
    index, inputs = batch
    with torch.no_grad():
        want = WANT[index * SIZE : (index + 1) * SIZE]
        return -float((model(inputs) - want).square().mean())


def test_racing_stops_hopeless_trials_and_no_others():
    arguments = {"evaluate": by_batch, "batches": BATCHES, "budget": "macs<=60%"}
    raced = open_study(sampler="random", **arguments).run(n_trials=20)
    full = open_study(sampler="random", confidence=None, **arguments).run(n_trials=20)
    stopped = [t for t in raced.optuna.trials if t.state.name == "PRUNED"]
    looked = [t for t in stopped if "duplicate" not in t.user_attrs["rankopt"]]
    assert looked
    for trial in looked:
        record = trial.user_attrs["rankopt"]
        assert 3 <= len(record["batches"]) < len(BATCHES)
        assert "dominated" in record["stopped"]
        # What was stopped would not have been on the front.
        whole = full.optuna.trials[trial.number]
        assert whole.user_attrs["rankopt"]["key"] == record["key"]
        assert trial.number not in {point.trial for point in full.front}
    assert {p.trial for p in raced.front} == {p.trial for p in full.front}


def test_a_generator_yields_batches():
    def evaluate(model):
        yield by_batch(model, BATCHES[0]), 1
        yield by_batch(model, BATCHES[1]), 3

    study = open_study(evaluate=evaluate).run(n_trials=2)
    point = study.points[1]
    small = rankopt.apply(planted_model(), point.plan)
    parts = [by_batch(small, batch) for batch in BATCHES[:2]]
    assert point.metric == pytest.approx((parts[0] + 3 * parts[1]) / 4, rel=1e-3)


def test_over_the_budget_is_not_evaluated():
    calls = []

    def counted(model):
        calls.append(1)
        return closeness(model)

    study = open_study(evaluate=counted, budget="macs<=40%", space="layer", sampler="random").run(
        n_trials=20
    )
    over = [t for t in study.optuna.trials if t.state.name == "PRUNED"]
    assert over
    assert all("over the budget: macs" in t.user_attrs["rankopt"]["stopped"] for t in over)
    assert all(t.constraints["macs"] > 0 for t in over)
    assert len(calls) == len(study.points) - study.status()["duplicates"]
    plan = study.best()
    assert plan.totals["macs"]["measured"] <= 0.4 * plan.totals["macs"]["before"]


def test_grpc_proxy():
    """Served from this process, as `optuna.storages.run_grpc_proxy_server` does it."""
    pytest.importorskip("grpc")
    from optuna.storages._grpc.server import make_server

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"grpc://127.0.0.1:{port}"
    with ThreadPoolExecutor(4) as threads:
        server = make_server(optuna.storages.InMemoryStorage(), "127.0.0.1", port, threads)
        server.start()
        try:
            study = open_study(url, heartbeat=1).run(n_trials=5)
            assert len(rankopt.Study.load(url).points) == 5
            assert all("lease" in trial.user_attrs for trial in study.optuna.trials[:5])
        finally:
            server.stop(None)


def test_strategy_contract():
    check_strategy(OptunaSearch(n_trials=6), evaluate=closeness)


def test_strategy():
    plan = rankopt.search(
        planted_model(), "macs<=50%, params<=60%", strategy=OptunaSearch(n_trials=12),
        example_inputs=planted_inputs(), evaluate=closeness,
    )  # fmt: skip
    assert plan.strategy["settings"]["n_trials"] == 12
    drop = rankopt.search(
        planted_model(), "metric_drop<=0.02, minimize=macs", strategy=OptunaSearch(n_trials=12),
        example_inputs=planted_inputs(), evaluate=closeness,
    )  # fmt: skip
    assert closeness(rankopt.apply(planted_model(), drop)) >= 0.98 - 1e-5
    assert drop.totals["macs"]["measured"] < drop.totals["macs"]["before"]
    with pytest.raises(ModelError, match="'optuna' needs evaluate="):
        rankopt.search(
            planted_model(), "macs<=50%", strategy="optuna", example_inputs=planted_inputs()
        )
    for bad in ({"n_trials": 0}, {"n_trials": "x"}, {"confidence": 1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            OptunaSearch(**bad)


def test_figures_and_export(tmp_path):
    pytest.importorskip("plotly")
    study = open_study().run(n_trials=12)
    files = study.export(tmp_path / "out", figures=True)
    names = {path.name for path in files}
    assert {"status.json", "pareto.html", "history.html", "importances.html"} <= names
    assert "Plotly" in (tmp_path / "out" / "pareto.html").read_text()[:20000]
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    for point in status["front"]:
        plan = rankopt.RankPlan.load(tmp_path / "out" / f"plan-{point['trial']}.json")
        rankopt.apply(planted_model(), plan)
    with pytest.raises(StudyError, match="no figures yet"):
        open_study().figures()


def test_missing_plotly(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "plotly", None)
    with pytest.raises(MissingDependency, match=r"pip install 'rankopt\[report\]'"):
        open_study().figures()


@pytest.mark.parametrize("sampler", ["random", "nsgaii"])
def test_a_study_that_goes_on_draws_other_points(tmp_path, sampler):
    path = tmp_path / "s.db"
    first = open_study(path, sampler=sampler).run(n_trials=10)
    again = open_study(path, sampler=sampler).run(n_trials=14)
    drawn = [tuple(t.params.values()) for t in again.optuna.trials]
    queued = sum("warm" in t.user_attrs for t in first.optuna.trials)
    assert len(drawn) == 14
    assert len(set(drawn[queued:])) == len(drawn[queued:])


def test_a_warm_start_with_a_fault_of_its_own_is_left_out(monkeypatch):
    from rankopt_strategies import ParameterRatio

    def broken(self, problem):
        raise ZeroDivisionError("a plugin's fault")

    monkeypatch.setattr(ParameterRatio, "search", broken)
    with pytest.warns(RankoptWarning, match="warm start parameter_ratio at 50% is left out: Zero"):
        study = open_study()
    assert "knapsack at 50%" in [t.user_attrs["warm"] for t in study.optuna.trials]

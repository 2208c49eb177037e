"""Studies over time: predicted from layers during the trials, the front measured at the end."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from study_common import closeness, open_study

import rankopt
from rankopt._timing.modelled_clock import Operations
from rankopt._timing.profile_table import ProfileTable
from rankopt.errors import BudgetError, BudgetInfeasible, RankoptWarning, StudyError
from rankopt.testing import ModelledClock, planted_inputs, planted_model
from rankopt_strategies.optuna_search import OptunaSearch

LAYERS = 4  # no chain alone has more operations


class CountedClock(ModelledClock):
    """Counts what is timed, and adds time between the operations of whole models."""

    def __init__(self, *, between_ms=0.0, **settings):
        super().__init__(**settings)
        self.between_ms, self.calls = between_ms, 0

    def __call__(self, function):
        self.calls += 1
        with Operations() as seen, torch.no_grad():
            function()
        return super().__call__(function) + self.between_ms * max(0, len(seen.found) - LAYERS)


def table(clock=None):
    return ProfileTable(clock=clock or ModelledClock(macs_per_ms=1e5), rounds=3)


def test_trials_time_nothing_and_the_front_is_measured():
    clock = CountedClock(macs_per_ms=1e5, between_ms=0.3)
    study = open_study(objective="latency", profile=table(clock))
    assert study.objective == "latency"
    after_opening = clock.calls
    study.run(n_trials=13)
    assert study.status()["timed"] >= 3
    trials = study.optuna.trials
    predicted = {t.number: t.values[1] for t in trials if t.values}
    measured = clock.calls
    assert measured > after_opening
    for point in study.front:
        totals = point.plan.totals["latency"]
        assert totals["predicted"] == pytest.approx(predicted[point.trial], abs=1e-3)
        assert totals["measured"] == pytest.approx(point.figures["latency"], abs=1e-3)
        if point.plan.changes:
            small = rankopt.apply(planted_model(), point.plan)
            took = clock(partial(small, planted_inputs()))
            assert totals["measured"] == pytest.approx(took, rel=1e-3)
            assert totals["measured"] > totals["predicted"] + 1e-3
    # More trials that fit no new point on the front time no model twice.
    before = clock.calls
    study.measure()
    assert clock.calls == before


def test_only_the_end_of_a_run_is_timed(monkeypatch):
    clock = CountedClock(macs_per_ms=1e5)
    study = open_study(objective="latency", profile=table(clock))
    before = clock.calls
    monkeypatch.setattr(rankopt.Study, "measure", lambda self, **_: self)
    study.run(n_trials=12)
    assert len(study.points) >= 8
    assert clock.calls == before
    assert study.status()["timed"] == 0
    assert all(point.plan.totals["latency"]["measured"] is None for point in study.front)


def test_dominated_once_measured_is_dropped(tmp_path):
    """A plan that turns out slower than a better one is not on the front any more."""
    path = tmp_path / "s.db"
    arguments = {"objective": "latency", "profile": table()}
    study = open_study(path, **arguments).run(n_trials=12)
    front = study.front
    assert len(front) >= 3
    victim, better = front[0], front[-2]
    slow = study.optuna.user_attrs[f"rankopt.timed:{better.trial}"]
    study.optuna.set_user_attr(
        f"rankopt.timed:{victim.trial}", {**slow, "ratio": [1.5 * x for x in slow["ratio"]]}
    )
    left = [point.trial for point in study.front]
    assert victim.trial not in left
    assert better.trial in left
    read = rankopt.Study.load(path)
    assert [point.trial for point in read.front] == left
    with pytest.raises(StudyError, match="nothing to time"):
        read.measure()


def test_workers_price_time_alike(tmp_path):
    """Who joins takes the times of who began, on however different a machine."""
    path = tmp_path / "s.db"
    first = open_study(path, objective="latency", profile=table())
    clock = CountedClock(macs_per_ms=10.0, overhead_ms=5.0)
    with pytest.raises(StudyError, match="a clock of the caller's own: give profile= again"):
        open_study(path)
    second = open_study(path, create=False, profile=table(clock), warm_starts=())
    assert not clock.calls
    first.run(n_trials=3)
    point = first.points[1]
    rows = first.optuna.trials[1].user_attrs["plan"]
    second.optuna.enqueue_trial(dict(first.optuna.trials[1].params), {"plan": rows, "warm": "x"})
    again = second.run(n_trials=len(second.optuna.trials)).points[-1]
    assert again.plan.totals["latency"]["predicted"] == pytest.approx(
        point.plan.totals["latency"]["predicted"]
    )


def test_budgets_on_time_hold_as_measured():
    clock = CountedClock(macs_per_ms=1e5, between_ms=0.1)
    model = planted_model()
    with torch.no_grad():
        dense = clock(lambda: model(planted_inputs()))
    for budget in ("latency<=80%", f"latency_ms<={0.8 * dense}"):
        study = open_study(budget=budget, profile=table(clock)).run(n_trials=12)
        assert study.objective == "latency"
        plan = study.best()
        with torch.no_grad():
            took = clock(partial(rankopt.apply(model, plan), planted_inputs()))
        assert took <= 0.8 * dense
        assert took < dense
        over = [t for t in study.optuna.trials if t.state.name == "PRUNED"]
        assert all("latency" in t.user_attrs["rankopt"].get("stopped", "latency") for t in over)


def test_the_dense_model_takes_its_own_time():
    """Not more, as it would where its time were rounded up."""
    clock = ModelledClock(macs_per_ms=1e5, extra_ms=0.00006)
    study = open_study(objective="latency", profile=table(clock), warm_starts=())
    study.run(n_trials=1)
    dense = study._front().dense["latency"]
    assert round(dense, 4) > dense
    assert not study.best("latency<=100%").changes


def test_strategy_under_a_budget_on_time(tmp_path):
    clock = ModelledClock(macs_per_ms=1e5)
    strategy = OptunaSearch(n_trials=9, storage=str(tmp_path / "s.db"))
    for budget in ("latency<=80%", "metric_drop<=0.05, minimize=latency"):
        named = OptunaSearch(n_trials=9, storage=strategy.storage, study=budget[:4])
        plan = rankopt.search(
            planted_model(), budget, strategy=named, example_inputs=planted_inputs(),
            evaluate=closeness, profile=table(clock),
        )  # fmt: skip
        total = plan.totals["latency"]
        assert total["measured"] < total["before"]
    assert plan.extensions["study"]["metric"] >= 0.95
    # The same study again answers without a trial.
    again = rankopt.search(
        planted_model(), budget, strategy=named, example_inputs=planted_inputs(),
        evaluate=closeness, profile=table(clock),
    )  # fmt: skip
    assert again.decisions == plan.decisions


@pytest.mark.parametrize("budget", [None, "latency<=100%"])
def test_no_layer_gets_faster(budget):
    """A budget nobody gave, or that the dense model meets, is not what cannot be met."""
    slow = table(ModelledClock(macs_per_ms=1e9, overhead_ms=5))
    with pytest.raises(BudgetInfeasible, match="^no decomposition makes .* latency smaller, "):
        open_study(budget=budget, objective="latency", profile=slow)


def test_time_needs_inputs():
    for more in ({"objective": "latency"}, {"budget": "latency<=50%"}):
        with pytest.raises(BudgetError, match="objective on latency needs example_inputs: time"):
            open_study(example_inputs=None, **more)


def test_figures_show_measured_times():
    pytest.importorskip("plotly")
    clock = CountedClock(macs_per_ms=1e5, between_ms=0.1)
    study = open_study(objective="latency", profile=table(clock)).run(n_trials=10)
    drawn = json.loads(study.figures()["pareto"].to_json())
    text = json.dumps(drawn["data"])
    slowest = max(p.figures["latency"] for p in study.front if p.plan.changes)
    assert f"{slowest:.6f}"[:6] in text


def test_noisy_times_are_owned_up_to_and_taken_anew():
    clock, noise = CountedClock(macs_per_ms=1e5), np.random.default_rng(0)
    settled = table(clock)
    study = open_study(objective="latency", profile=settled)
    settled.clock = lambda run: clock(run) * noise.uniform(0.5, 1.5)
    with pytest.warns(RankoptWarning, match=r"times of \d of the \d models .* vary too much"):
        study.run(n_trials=12)
    settled.clock = clock
    before = clock.calls
    study.best()  # reads; which plan is best does not change by asking
    assert clock.calls == before
    study.measure()
    assert clock.calls > before
    for point in study.front:
        facts = point.plan.extensions["latency"]
        assert facts["low"] == pytest.approx(facts["high"])

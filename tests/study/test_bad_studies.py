"""What users get wrong, and candidates that fail: said clearly, the study goes on."""

from __future__ import annotations

import contextlib
import gc
import re
import sqlite3
from pathlib import Path

import optuna
import pytest
import sqlalchemy
import torch
from optuna.storages.journal._file import get_lock_file
from study_common import closeness, open_study
from torch import nn

import rankopt
from rankopt._study.storage import close_storage, open_storage
from rankopt._study.trial import Runner
from rankopt._study.views import status_view
from rankopt.errors import (
    BudgetError,
    BudgetInfeasible,
    CalibrationError,
    EvaluationError,
    LayerError,
    MissingDependency,
    ModelError,
    RankoptWarning,
    StudyError,
)
from rankopt.testing import planted_inputs, planted_model
from rankopt_strategies.optuna_search import OptunaSearch


def raising(model):
    if raising.calls % 3 == 2:
        raising.calls += 1
        raise RuntimeError("the GPU is on fire")
    raising.calls += 1
    return closeness(model)


def test_failed_trials_are_recorded_and_the_study_goes_on():
    raising.calls = 0
    study = open_study(evaluate=raising).run(n_trials=9)
    status = study.status()
    assert status["trials"] == {"complete": 6, "fail": 3}
    assert status["errors"] == ["evaluate raised RuntimeError: the GPU is on fire"]
    assert status["counted"] == 9
    assert study.front
    assert str(study).startswith("<Study 'rankopt', in memory: 9 trials, front ")


@pytest.mark.parametrize(
    ("evaluate", "match"),
    [
        (lambda model: float("nan"), "3 failed, the last with: evaluate gave nan"),
        (lambda model: next(model.parameters()).zero_().sum(), "evaluate changed the model"),
    ],
)
def test_nothing_but_failures(evaluate, match):
    study = open_study(evaluate=evaluate)
    with pytest.warns(RankoptWarning, match="3 of 3 trials failed, the last with: evaluate "):
        study.run(n_trials=3)
    with pytest.raises(StudyError, match=match):
        _ = study.front
    assert "3 trials, no result yet" in repr(study)


def test_a_changed_model_does_not_spoil_the_next_trial():
    calls = []

    def vandal(model):
        calls.append(1)
        found = closeness(model)
        if len(calls) == 2:
            for parameter in model.parameters():
                parameter.zero_()
        return found

    study = open_study(evaluate=vandal).run(n_trials=6)
    clean = open_study().run(n_trials=6)
    assert study.status()["trials"]["fail"] == 1
    assert [p.metric for p in study.points[1:3]] == [p.metric for p in clean.points[2:4]]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The storage of a study that no test changes."""
    path = tmp_path_factory.mktemp("begun") / "s.db"
    open_study(path).close()
    return path


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"budget": "macs<=70%"}, "has budget None, the request"),
        ({"objective": "params"}, "has objective 'macs', the request 'params'"),
        ({"direction": "minimize"}, "has direction 'maximize', the request 'minimize'"),
        ({"space": "layer"}, "searches the space 'warp', the request 'layer'"),
        ({"round_to": 4}, "has round_to 1, the request 4"),
        ({"ignore": ["hidden"]}, "searches other layers"),
        ({"methods": "svd"}, "has methods svd, tucker2, spatial_svd, the request svd: give"),
        ({"calibration": [torch.zeros(8, 3, 12, 12)]}, "has calibration None"),
        (
            {"example_inputs": planted_inputs()[:1]},
            r"other example_inputs: .*macs [\d,]+ there",
        ),
    ],
)
def test_another_request_is_refused(begun, more, match):
    before = len(rankopt.Study.load(begun).optuna.trials)
    with pytest.raises(StudyError, match=match):
        open_study(begun, **more)
    assert len(rankopt.Study.load(begun).optuna.trials) == before


def test_inputs_that_come_or_go_are_refused():
    """Trials with and without MACs in one study could not be read any more."""
    for first, then in ((planted_inputs(), None), (None, planted_inputs())):
        storage = optuna.storages.InMemoryStorage()
        open_study(storage, objective="params", warm_starts=(), example_inputs=first)
        with pytest.raises(StudyError, match="other example_inputs: the dense model has macs "):
            open_study(storage, warm_starts=(), example_inputs=then)


def test_another_model_or_version_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "s.db"
    open_study(path).run(n_trials=2)
    arguments = {"evaluate": closeness, "storage": path, "example_inputs": planted_inputs()}
    with pytest.raises(StudyError, match="was made for other weights"):
        rankopt.study(planted_model(seed=1), **arguments)
    with pytest.raises(StudyError, match="model of another class"):
        rankopt.study(nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3)), **arguments)
    monkeypatch.setattr("rankopt._study.records.__version__", "9.9")
    with pytest.raises(StudyError, match=r"begun with rankopt 0\.\S+, this is 9.9"):
        open_study(path)
    assert rankopt.Study.load(path).front  # reading is for every version
    foreign = optuna.storages.InMemoryStorage()
    optuna.create_study(storage=foreign, study_name="rankopt").add_trial(
        optuna.create_trial(value=1.0)
    )
    with pytest.raises(StudyError, match="was not made by rankopt"):
        open_study(foreign)


@pytest.mark.parametrize(
    ("more", "error", "match"),
    [
        ({"storage": "/no/such/folder/s.db"}, StudyError, "its folder does not exist"),
        ({"storage": "/no/such/folder/s.journal"}, StudyError, "its folder does not exist"),
        ({"storage": 3}, StudyError, "storage=3: expected a path"),
        ({"storage": "grpc://here"}, StudyError, "expected grpc://HOST:PORT"),
        ({"storage": "mysql://u:pw@h/d"}, MissingDependency, r"mysql://u:\*\*\*@h/d: .*install"),
        ({"evaluate": 3}, ModelError, "evaluate=3: expected a function"),
        ({"objective": "speed"}, StudyError, "objective='speed': expected one of params"),
        ({"direction": "up"}, StudyError, "direction='up'"),
        ({"sampler": "magic"}, StudyError, "sampler='magic': expected one of tpe"),
        ({"space": "magic"}, StudyError, "space='magic'"),
        ({"heartbeat": 0}, StudyError, "heartbeat=0: expected whole seconds, at least 1"),
        ({"confidence": 2}, StudyError, "confidence=2"),
        ({"round_to": 0}, ValueError, "round_to=0: expected an integer of at least 1"),
        ({"rounding": "sideways"}, ValueError, "rounding='sideways': expected one of down"),
        (
            {"warm_starts": "knapsak"},
            StudyError,
            "warm_starts='knapsak': .*expected .*vbmf",
        ),
        (
            {"example_inputs": None, "budget": "macs<=50%"},
            BudgetError,
            "objective on macs needs example_inputs: MACs",
        ),
        ({"budget": "latency<=0.01%"}, BudgetInfeasible, "smallest reachable is latency"),
        ({"budget": "macs<=1%"}, BudgetInfeasible, "smallest reachable is macs"),
        ({"create": False}, StudyError, "no study 'rankopt'; it has none; make one with"),
        (
            {"budget": rankopt.Budget(metric_drop=1, minimize="macs", direction="minimize")},
            BudgetError,
            "give both the same direction",
        ),
    ],
)
def test_bad_requests(more, error, match):
    with pytest.raises(error, match=match):
        open_study(**more)


def test_reading_makes_no_file(tmp_path):
    for path in ("s.db", "s.journal"):
        for storage in (tmp_path / path, f"{'sqlite' if 'db' in path else 'journal'}:///{path}"):
            with pytest.raises(StudyError, match=r"there is no study at .*make one with"):
                open_study(storage, create=False)
            with pytest.raises(StudyError, match="there is no study at"):
                rankopt.Study.load(storage)
    assert not list(tmp_path.iterdir())


def test_queued_plans_are_no_trials_yet():
    text = str(status_view(open_study().status())[2])
    assert re.fullmatch(r"\d+ plans queued, none run yet", text)


def test_bad_runs(tmp_path):
    study = open_study()
    with pytest.raises(StudyError, match="give at least one"):
        study.run()
    with pytest.raises(StudyError, match="n_trials=0"):
        study.run(0)
    for timeout in (float("nan"), -1, "60"):
        with pytest.raises(ValueError, match=f"timeout={timeout!r}: expected seconds"):
            study.run(1, timeout=timeout)
        with pytest.raises(ValueError, match=f"timeout={timeout!r}: expected seconds"):
            rankopt.search(planted_model(), "params<=50%", timeout=timeout)
    with pytest.raises(StudyError, match="has no completed trial; run some"):
        study.best("macs<=50%")
    path = tmp_path / "other.db"
    path.write_text("not a database, but long enough to look at" * 40)
    with pytest.raises(StudyError, match="file is not a database"):
        open_study(path)


def test_unreachable_server():
    pytest.importorskip("psycopg")
    url = "postgresql+psycopg://me:secret@127.0.0.1:9/none"
    with pytest.raises(StudyError, match=r"me:\*\*\*@127.0.0.1:9/none fails: ") as found:
        open_study(url)
    assert "secret" not in str(found.value)


@pytest.mark.parametrize("error", [LayerError, RuntimeError, ValueError])
def test_errors_of_the_machinery_are_raised_and_the_plan_is_kept(tmp_path, monkeypatch, error):
    """Not swallowed for ever, as those of `evaluate` are recorded."""
    study = open_study(tmp_path / "s.db")
    run = Runner.run

    def broken(self, inner, trial):
        if trial.user_attrs.get("warm") == "knapsack at 70%":
            raise error("no such chain")
        return run(self, inner, trial)

    monkeypatch.setattr(Runner, "run", broken)
    with pytest.raises(error, match="no such chain"):
        study.run(n_trials=6)
    monkeypatch.undo()
    again = open_study(tmp_path / "s.db").run(n_trials=8)
    assert [p.warm for p in again.points].count("knapsack at 70%") == 1


def test_a_candidate_that_fails_on_the_calibration_inputs_is_recorded(monkeypatch):
    study = open_study()
    decisions, calls = study._runner.problem.decisions, []

    def sometimes_broken(options):
        calls.append(1)
        if len(calls) == 3:
            raise CalibrationError("the model fails on calibration inputs: out of memory")
        return decisions(options)

    monkeypatch.setattr(study._runner.problem, "decisions", sometimes_broken)
    status = study.run(n_trials=6).status()
    assert status["counted"] == 6
    assert "out of memory" in str(status["errors"])


def test_the_dense_model_is_evaluated_again_after_a_failure(tmp_path):
    def broken(model):
        raise RuntimeError("no data today")

    with pytest.warns(RankoptWarning, match="2 of 2 trials failed"):
        open_study(tmp_path / "s.db", evaluate=broken).run(n_trials=2)
    again = open_study(tmp_path / "s.db").run(n_trials=12)
    assert again.dense_metric == pytest.approx(1)
    assert again.best("metric_drop<=0.5, minimize=macs").changes


def test_a_budget_of_the_other_direction():
    study = open_study(direction="minimize").run(n_trials=4)
    with pytest.raises(StudyError, match="add direction=minimize to the budget"):
        study.best("metric_drop<=0.05, minimize=macs")
    assert study.best("metric_drop<=0.05, minimize=macs, direction=minimize")


def test_a_relative_journal_has_a_lock_that_leads_somewhere(tmp_path, monkeypatch):
    """Optuna waits for ever, at full speed, on a lock left behind that it cannot `stat`."""
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    storage = open_storage("runs/s.journal")._backend
    with get_lock_file(storage._lock):
        locks = list(Path("runs").glob("*.lock"))
        assert len(locks) == 1
        assert locks[0].stat()


def test_evaluation_error_reaches_search():
    def broken(model):
        raise ValueError("no data")

    with pytest.raises((StudyError, EvaluationError), match="no data"):
        rankopt.search(
            planted_model(), "params<=50%", strategy=OptunaSearch(n_trials=3), evaluate=broken
        )


def test_evaluate_that_is_sometimes_no_number():
    calls = []

    def sometimes(model):
        calls.append(1)
        found = closeness(model)
        return (found, float("nan"), float("inf"), "high", None)[min(len(calls) - 1, 4)]

    study = open_study(evaluate=sometimes).run(n_trials=5)
    assert study.status()["counted"] == 5
    assert study.status()["errors"] == [
        "evaluate gave a NoneType; expected a number, or (number, weight)",
        "evaluate gave a str; expected a number, or (number, weight)",
        "evaluate gave inf; expected a finite number",
        "evaluate gave nan; expected a finite number",
    ]
    assert len(study.front) == 1


def test_a_study_is_found_by_a_url_with_options(begun):
    with rankopt.Study.load(f"sqlite:///{begun}?timeout=60") as study:
        assert study.optuna.trials


def test_a_file_is_called_what_it_is_called(begun, tmp_path):
    path = tmp_path / "a%20b?{c}#d.db"
    path.write_bytes(begun.read_bytes())
    if sqlalchemy.__version__.startswith("2.0"):
        with pytest.raises(StudyError, match="misreads the name of this file"):
            rankopt.Study.load(path)
        path = path.rename(tmp_path / "a%20b{c}#d.db")
        with rankopt.Study.load(path) as study:
            assert study.optuna.trials
        return
    with rankopt.Study.load(path) as study:
        assert study.optuna.trials
    close_storage(open_storage(tmp_path / "e?f.db"))
    assert {file.name for file in tmp_path.iterdir()} >= {path.name, "e?f.db"}
    assert not (tmp_path / "e").exists()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="lists open files as Linux does")
def test_files_are_closed_after_errors_and_with_the_last_study(begun):
    def opened():
        return [file for file in Path("/proc/self/fd").iterdir() if file.resolve() == begun]

    with pytest.raises(StudyError, match="searches the space"):
        open_study(begun, space="layer")
    with pytest.raises(StudyError, match="there is no study 'another'"):
        rankopt.Study.load(begun, name="another")
    gc.collect()
    assert not opened()
    inner = rankopt.Study.load(begun).optuna
    assert inner.trials
    assert opened()
    del inner
    gc.collect()
    assert not opened()


def test_other_files_are_not_changed_by_reading(tmp_path):
    path = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE people (name)")
    before = path.read_bytes()
    with pytest.raises(StudyError, match="no study at .*whose tables are others; make one with"):
        rankopt.Study.load(path)
    assert path.read_bytes() == before
    path.write_text("not a database, but long enough to look at" * 40)
    with pytest.raises(StudyError, match="file is not a database"):
        rankopt.Study.load(path)


def test_a_study_that_cannot_be_written_is_read(begun, tmp_path, monkeypatch):
    path = tmp_path / "s?.db"
    path.write_bytes(begun.read_bytes())
    monkeypatch.setattr("rankopt._study.storage.writable", lambda path: False)
    before = path.read_bytes()
    with rankopt.Study.load(path) as study:
        assert study.status()["trials"]["waiting"] == len(study.optuna.trials)
    with pytest.raises(StudyError, match="attempt to write a readonly database"):
        open_study(path).run(n_trials=1)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("count", [1.5, 0, True, "2"])
def test_numbers_of_trials(count):
    study = open_study()
    with pytest.raises(StudyError, match=f"n_trials={count!r}: expected an integer of at least 1"):
        study.run(n_trials=count)

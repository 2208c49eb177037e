"""Studies that are stopped, killed or run out of disk: nothing is lost."""

from __future__ import annotations

import optuna
import pytest
from study_common import closeness, open_study

import rankopt
from rankopt._study.storage import MAX_RETRIES
from rankopt.errors import (
    StudyError,
)


def test_disk_full(tmp_path):
    """A real SQLITE_FULL, from a file that must not grow."""
    from sqlalchemy import event

    study = open_study(tmp_path / "s.db").run(n_trials=2)
    engine = study.optuna._storage._backend.engine

    def small(connection, record):
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={pages}")

    event.listen(engine, "connect", small)
    engine.dispose()
    with pytest.raises(StudyError, match="database or disk is full; trials that finished are kept"):
        study.run(n_trials=30)
    again = open_study(tmp_path / "s.db", heartbeat=1)
    done = len(again.points)
    assert done >= 2
    again.run(n_trials=done + 2)
    assert len(again.points) == done + 2


def test_interrupt_is_resumable(tmp_path):
    calls = []

    def interrupted(model):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return closeness(model)

    study = open_study(tmp_path / "s.db", evaluate=interrupted)
    with pytest.raises(KeyboardInterrupt):
        study.run(n_trials=8)
    status = study.status()
    assert status["trials"]["complete"] == 2
    assert status["trials"]["lost"] == 1
    again = open_study(tmp_path / "s.db").run(n_trials=8)
    plain = open_study().run(n_trials=8)
    assert again.status()["counted"] == 8
    # The interrupted plan was run after all: every queued plan is there once.
    names = sorted(p.warm for p in again.points if p.warm)
    assert names == sorted(p.warm for p in plain.points if p.warm)


def test_interrupted_any_number_of_times(tmp_path):
    """A plan that is stopped by hand again and again is not taken for one that kills workers."""

    def interrupted(model):
        raise KeyboardInterrupt

    for _ in range(MAX_RETRIES + 2):
        with pytest.raises(KeyboardInterrupt):
            open_study(tmp_path / "s.db", evaluate=interrupted).run(n_trials=8)
    again = open_study(tmp_path / "s.db").run(n_trials=8)
    assert sorted(p.warm for p in again.points if p.warm) == sorted(
        p.warm for p in open_study().run(n_trials=8).points if p.warm
    )


def test_interrupted_runs_keep_to_the_number_of_trials(tmp_path):
    calls = []

    def first_interrupted(model):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return closeness(model)

    study = open_study(tmp_path / "s.db", evaluate=first_interrupted)
    with pytest.raises(KeyboardInterrupt):
        study.run(n_trials=2)
    assert study.run(n_trials=2).status()["counted"] == 2


def test_disk_full_on_a_journal(tmp_path):
    """A real short write: the file may not grow past a limit set for this process."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "s.journal"
    done = len(open_study(path).run(n_trials=3).points)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    study = open_study(path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 700, before[1]))
        with pytest.raises(StudyError, match="File too large; trials that finished are kept"):
            study.run(n_trials=30)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    again = open_study(path, heartbeat=1)
    assert len(again.points) >= done
    again.run(n_trials=done + 2)
    assert again.status()["counted"] == done + 2


def test_stopped_while_it_queued(tmp_path, monkeypatch):
    """Ctrl-C between the queued plans: the next opening queues the rest, and none twice."""
    path = tmp_path / "s.db"
    enqueue, calls = optuna.Study.enqueue_trial, []

    def interrupted(self, *arguments, **more):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return enqueue(self, *arguments, **more)

    monkeypatch.setattr(optuna.Study, "enqueue_trial", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_study(path)
    monkeypatch.undo()
    queued = [trial.user_attrs["warm"] for trial in open_study(path).optuna.trials]
    whole = [trial.user_attrs["warm"] for trial in open_study().optuna.trials]
    assert queued == whole
    assert len(set(queued)) == len(queued)


def test_a_line_cut_short_by_a_kill(tmp_path):
    path = tmp_path / "s.journal"
    done = len(open_study(path).run(n_trials=3).points)
    with path.open("ab") as file:
        file.write(b'{"op_code":5,"worker_id":"x' + b"y" * 5000)
    again = open_study(path)
    assert len(again.points) == done
    again.run(n_trials=done + 1)
    assert len(rankopt.Study.load(path).points) == done + 1

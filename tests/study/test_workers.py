"""Several processes on one study: none of its trials is lost or counted twice."""

from __future__ import annotations

import faulthandler
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, nullcontext
from pathlib import Path

import optuna
import pytest

import rankopt
from rankopt._study.storage import LEASE, WORKER, Leases, close_storage, open_storage
from rankopt.cli import main
from rankopt.errors import RankoptWarning, StudyError

TASK = """
import os, pathlib, time
import torch
from torch import nn

torch.set_num_threads(1)
LOG = pathlib.Path(__file__).with_name("evaluated")
HANG = pathlib.Path(__file__).with_name("hang")

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(),
                         nn.Linear(32, 8))

def accuracy(model):
    with LOG.open("a") as log:
        log.write(f"{os.getpid()}\\n")
    if HANG.exists():
        time.sleep(600)
    time.sleep(0.05)
    x = torch.randn(128, 32, generator=torch.Generator().manual_seed(1))
    return -float((model(x) - build()(x)).square().mean())

def broken(model):
    raise RuntimeError("no data today")

def calibration():
    return [torch.randn(32, 32, generator=torch.Generator().manual_seed(2))]
"""
HEARTBEAT = 1


@pytest.fixture
def opened():
    """Opens the Optuna study of a storage, as a worker does."""
    with ExitStack() as stack:

        def load(storage):
            found = open_storage(storage, heartbeat=HEARTBEAT)
            stack.callback(close_storage, found)
            return optuna.load_study(study_name="rankopt", storage=found)

        yield load


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "task.py"
    path.write_text(TASK)
    return path


def arguments(task, storage, *more):
    return [
        f"{task}:build", "--input", "4,32", "--storage", str(storage), "--evaluate",
        f"{task}:accuracy", "--heartbeat", str(HEARTBEAT), *more,
    ]  # fmt: skip


def create(task, storage, capsys, *more):
    assert main(["study", "create", *arguments(task, storage, *more), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def work(argv, stacks):
    """Run the command; where it has not ended long after it should have, say where it is."""
    with Path(stacks).open("w") as file:
        faulthandler.dump_traceback_later(100, file=file)
        try:
            code = main(argv)
        finally:
            faulthandler.cancel_dump_traceback_later()
    sys.exit(code)


NUMBERS = itertools.count()
# A process that has imported torch once and forks every worker: seconds less for each.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "optuna", "rankopt.cli", "torch.utils.flop_counter"])


def start(task, storage, trials):
    argv = ["study", "worker", *arguments(task, storage, "--n-trials", str(trials), "--json")]
    stacks = task.parent / f"stacks-{next(NUMBERS)}.txt"
    process = PROCESSES.Process(target=work, args=(argv, stacks))
    process.stacks = stacks
    process.start()
    return process


def finish(process, code=0):
    process.join(timeout=120)
    found = process.stacks.read_text() if process.stacks.exists() else "not begun"
    assert process.exitcode == code, f"a worker is at\n{found}"


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    finish(process, -signal.SIGKILL)


def wait_for(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("nothing happened for a minute")


def check_nothing_lost_or_doubled(storage, trials, workers):
    """Counted once each, every queued plan finished once, no trial still open."""
    with rankopt.Study.load(storage) as study:
        status = study.status()
        warm = Counter(point.warm for point in study.points if point.warm)
    # Workers that look at the same time each begin a trial where one was missing: at the end,
    # and for a plan of the beginning whose worker died.
    at_once = 1 + status["trials"].get("lost", 0)
    assert trials <= status["counted"] <= trials + (workers - 1) * at_once
    assert set(status["trials"]) <= {"complete", "pruned", "lost"}, status
    assert set(warm.values()) == {1}, warm
    assert {"dense", "knapsack at 70%", "knapsack at 50%", "knapsack at 35%"} <= set(warm)
    return status


STORAGES = ("study.db", "study.journal")


def run_with_a_death(task, storage, capsys, *, workers, trials):
    """One worker is killed in the middle of its first trial; the others do all there is."""
    folder = task.parent
    create(task, storage, capsys)
    (folder / "hang").touch()
    victim = start(task, storage, trials)
    wait_for((folder / "evaluated").exists)
    kill(victim)
    with rankopt.Study.load(storage) as study:
        assert study.status()["trials"]["running"] == 1
    (folder / "hang").unlink()
    survivors = [start(task, storage, trials) for _ in range(workers)]
    for survivor in survivors:
        finish(survivor)
    status = check_nothing_lost_or_doubled(storage, trials, workers)
    assert status["trials"]["lost"] >= 1
    evaluated = Counter((folder / "evaluated").read_text().split())
    assert evaluated.pop(str(victim.pid)) == 1
    # A survivor that came late may have found nothing left to do.
    assert set(evaluated) <= {str(survivor.pid) for survivor in survivors}
    # Every trial was evaluated in one process only, or answered from the study.
    assert evaluated.total() <= status["counted"] + status["trials"]["lost"]


@pytest.mark.slow
@pytest.mark.parametrize(("storage", "workers"), [("study.db", 4), ("study.journal", 2)])
def test_killed_in_the_middle_of_a_trial(task, tmp_path, capsys, storage, workers):
    run_with_a_death(task, tmp_path / storage, capsys, workers=workers, trials=4 + 2 * workers)


@pytest.mark.slow
def test_terminated_worker_hands_its_trial_back(task, tmp_path, capsys):
    storage = tmp_path / "study.db"
    create(task, storage, capsys)
    (tmp_path / "hang").touch()
    worker = start(task, storage, 10)
    wait_for((tmp_path / "evaluated").exists)
    worker.terminate()
    finish(worker, 130)
    with rankopt.Study.load(storage) as study:
        status = study.status()
    assert status["trials"]["lost"] == 1
    assert "running" not in status["trials"]


@pytest.fixture
def postgresql(tmp_path):
    """A server of the test's own, on a Unix socket in a folder of its own."""
    pytest.importorskip("psycopg")
    found = shutil.which("postgres") or next(
        iter(sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))), None
    )
    if found is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    tools = Path(found).resolve().parent
    home = Path("/tmp") / f"rankopt-pg-{os.getpid()}"  # sockets allow 107 characters
    home.mkdir()
    as_user = []
    if os.getuid() == 0:  # the server refuses to run as root
        if shutil.which("setpriv") is None:
            pytest.skip("running as root without setpriv to start PostgreSQL as another user")
        shutil.chown(home, "nobody")
        as_user = ["setpriv", "--reuid=nobody", "--clear-groups"]
    try:
        subprocess.run(
            [*as_user, tools / "initdb", "-D", home / "data", "-A", "trust", "-U", "rankopt"],
            check=True, capture_output=True, cwd="/tmp",
        )  # fmt: skip
        options = f"-k {home} -c listen_addresses= -c fsync=off"
        subprocess.run(
            [*as_user, tools / "pg_ctl", "-D", home / "data", "-o", options, "-w",
             "-l", home / "log", "start"], check=True, capture_output=True, cwd="/tmp",
        )  # fmt: skip
        try:
            yield f"postgresql+psycopg://rankopt@/postgres?host={home}"
        finally:
            subprocess.run(
                [*as_user, tools / "pg_ctl", "-D", home / "data", "-m", "immediate", "stop"],
                check=True, capture_output=True, cwd="/tmp",
            )  # fmt: skip
    finally:
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.slow
def test_workers_on_postgresql(task, tmp_path, capsys, postgresql):
    run_with_a_death(task, postgresql, capsys, workers=2, trials=8)


@pytest.mark.parametrize("storage", STORAGES)
def test_two_claim_and_two_give_up(task, tmp_path, capsys, opened, storage):
    """Two openers of one storage: a waiting trial goes to one, a lost one is queued once."""
    storage = tmp_path / storage
    create(task, storage, capsys)
    studies = [opened(storage) for _ in range(2)]
    with pytest.warns(UserWarning, match="Heartbeat") if storage.suffix == ".db" else nullcontext():
        claimed = [study.ask().number for study in studies]
    assert len(set(claimed)) == 2
    time.sleep(3.5 * HEARTBEAT)  # no sign of life from either, beyond the grace
    given_up = [Leases(study, HEARTBEAT).reap() for study in studies]
    assert given_up == [2, 0]
    states = Counter(trial.state.name for trial in studies[0].trials)
    assert states["FAIL"] == 2
    retried = [t.user_attrs["lost"] for t in studies[0].trials if "lost" in t.user_attrs]
    assert sorted(retried) == sorted([number] for number in claimed)


@pytest.mark.parametrize("storage", STORAGES)
def test_killed_before_its_first_sign_of_life(task, tmp_path, capsys, opened, storage):
    """Dead between claiming a trial and its first heartbeat: given up like any other."""
    storage = tmp_path / storage
    create(task, storage, capsys)
    study = opened(storage)
    with pytest.warns(UserWarning, match="Heartbeat") if storage.suffix == ".db" else nullcontext():
        trial = study.ask()
    leases = Leases(study, HEARTBEAT)
    with leases.held(trial, "a worker whose heartbeat thread never came to run"):
        assert leases.reap() == 0
    time.sleep(4.5 * HEARTBEAT)  # SQLite counts whole seconds
    leases.reap()
    assert study.trials[trial.number].state.name == "FAIL"
    assert [t.user_attrs["lost"] for t in study.trials if "lost" in t.user_attrs] == [[0]]


@pytest.mark.parametrize("skew", [-15, 1000])
def test_a_worker_on_a_host_with_another_clock(task, tmp_path, capsys, opened, monkeypatch, skew):
    """Its trial is given up once its lease stays the same, not by what its clock says."""
    storage = tmp_path / "study.journal"
    create(task, storage, capsys)
    study = opened(storage)
    trial = study.ask()
    trial.set_user_attr(WORKER, "elsewhere:1:abcdef")
    now = [0.0]
    monkeypatch.setattr("rankopt._study.storage.time.monotonic", lambda: now[0])
    leases = Leases(study, HEARTBEAT)
    for _ in range(5):  # renewed in time, by the other clock
        now[0] += 2 * HEARTBEAT
        trial.set_user_attr(LEASE, time.time() + skew + now[0])
        assert leases.reap() == 0
    now[0] += 4 * HEARTBEAT
    assert leases.reap() == 1


def test_a_lost_plan_is_run_though_the_number_is_reached(task, tmp_path, capsys):
    """Another worker may make up the number between giving a trial up and queueing it again."""
    from rankopt._study.storage import retry

    storage = tmp_path / "study.journal"
    queued = create(task, storage, capsys)["trials"]["waiting"]
    worker = ["study", "worker", *arguments(task, storage), "--n-trials", str(queued)]
    assert main(worker) == 0
    with rankopt.Study.load(storage) as study:
        assert study.status()["counted"] == queued
        retry(study.optuna, study.optuna.trials[0])
        assert study.status()["trials"]["waiting"] == 1
    assert main(worker) == 0
    with rankopt.Study.load(storage) as study:
        status = study.status()
    assert status["counted"] == queued + 1
    assert "waiting" not in status["trials"]


def test_commands(task, tmp_path, capsys):
    storage = tmp_path / "study.db"
    calibration = ("--calibration", f"{task}:calibration")
    made = create(task, storage, capsys, "--budget", "macs<=60%", *calibration)
    assert made["trials"]["waiting"] >= 4
    own = ("--device", "cpu", "--threads", "1")
    worker = ["study", "worker", *arguments(task, storage, *calibration, *own), "--n-trials", "7"]
    assert main(worker) == 0
    assert "dense" in capsys.readouterr().out
    read = ("--storage", str(storage))
    assert main(["study", "status", *read, "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["counted"] == 7
    plan = tmp_path / "plan.json"
    assert main(["study", "best", *read, "-o", str(plan)]) == 0
    assert f"plan written to {plan}" in capsys.readouterr().out
    assert rankopt.RankPlan.load(plan).budget == rankopt.Budget(macs=0.6)
    assert main(["study", "best", *read, "--budget", "macs<=0.1%"]) == 3
    capsys.readouterr()
    assert main(["study", "export", *read, "-o", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / f"plan-{status['front'][0]['trial']}.json").exists()
    capsys.readouterr()
    # A worker whose model or data is another one is sent away.
    assert main(["study", "worker", *arguments(task, storage), "--n-trials", "8"]) == 1
    assert "has calibration '" in capsys.readouterr().err
    for bad, message in (
        (["study", "status", "--storage", str(tmp_path / "none.db")], "there is no study at"),
        (["study", "status", *read, "--name", "x"], "no study 'x'; it has rankopt"),
        (
            ["study", "worker", *arguments(task, tmp_path / "n.db"), "--n-trials", "1"],
            "study create`",
        ),
        (worker[:-2], "give at least one of them"),
        (["study", "create", *arguments(task, storage, "--device", "cuda:9")], "device 'cuda:9'"),
        (["study", "create", *arguments(task, storage, "--threads", "0")], "threads=0"),
        (["study", "create", *arguments(task, storage, "--heartbeat", "0")], "heartbeat=0"),
    ):
        assert main(bad) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "n.db").exists()


# A real clock, on whatever machine runs the tests.
@pytest.mark.filterwarnings("ignore:.*too much to decide:rankopt.errors.RankoptWarning")
def test_time_from_the_shell(task, tmp_path, capsys):
    storage = tmp_path / "study.db"
    # Layers so small that no chain is faster: there is nothing to search for.
    assert main(["study", "create", *arguments(task, storage, "--objective", "latency")]) != 0
    assert "no decomposition makes this model's latency smaller" in capsys.readouterr().err
    task.write_text(TASK.replace("32", "768").replace("48", "768"))
    wide = [text.replace("4,32", "32,768") for text in arguments(task, storage)]
    command = ["study", "create", *wide, "--objective", "latency", "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["objective"] == "latency"
    assert main(["study", "worker", *wide, "--n-trials", "7", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["timed"] >= len(status["front"]) >= 1
    plan = tmp_path / "plan.json"
    read = ("--storage", str(storage))
    assert main(["study", "best", *read, "--budget", "latency<=100%", "-o", str(plan)]) == 0
    assert rankopt.RankPlan.load(plan).totals["latency"]["measured"] > 0


def test_evaluate_that_always_fails(task, tmp_path, capsys):
    storage = tmp_path / "study.db"
    create(task, storage, capsys)
    command = arguments(task, storage, "--n-trials", "3")
    command[command.index(f"{task}:accuracy")] = f"{task}:broken"
    with pytest.warns(RankoptWarning, match="3 of 3 trials failed"):
        assert main(["study", "worker", *command]) == 0
    assert "failed: evaluate raised RuntimeError: no data today" in capsys.readouterr().out
    with pytest.raises(StudyError, match="no completed trial; 3 failed"):
        _ = rankopt.Study.load(storage).front

"""What a relaxed search leaves behind: checkpoints to go on from, TensorBoard events, figures."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rankopt
from rankopt._report.ranks import write_ranks
from rankopt.cli import main
from rankopt.errors import CheckpointError, MissingDependency, PlanError, RankoptError
from rankopt.testing import planted_inputs, planted_model
from rankopt_strategies import Relaxed, RelaxedSettings

PAPER = {
    "low": 2,
    "high": 14,
    "step": 4,
    "shrink": 4,
    "warmup": 2,
    "updates": 25,
    "logit_rate": 0.1,
}
MODES = {
    "measured": {"rounds": 2},
    "gradient": {"rounds": 4, "slopes": "gradient"},
    "paper": {"mode": "paper", "objective": "distillation", "paper": PAPER},
}


def searched(folder=None, mode="measured", budget="macs<=40%", **settings):
    settings = {**MODES[mode], "folder": None if folder is None else str(folder), **settings}
    return rankopt.search(
        planted_model(noise=0.4),
        budget,
        strategy=Relaxed(**settings),
        example_inputs=planted_inputs(),
        calibration=[planted_inputs(32)],
    )


# A process that searches and is killed as it writes its `count`th checkpoint.
KILLED = """
import os, signal, sys, torch
torch.set_num_threads({threads})
sys.path.insert(0, {tests!r})
from test_relaxed_records import searched
from rankopt_strategies.relaxed import resuming
real, calls = resuming.save_state, []
def kill(*arguments):
    calls.append(1)
    if len(calls) > {count}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*arguments)
resuming.save_state = kill
searched({folder!r}, {mode!r}, log={log!r})
"""


@pytest.mark.parametrize("mode", list(MODES))
def test_goes_on_after_kill_9_to_the_same_result(tmp_path, mode):
    log = str(tmp_path / "log.jsonl")
    code = KILLED.format(
        tests=str(Path(__file__).parent),
        folder=str(tmp_path),
        mode=mode,
        log=log,
        count=2,
        threads=torch.get_num_threads(),
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (kept,) = tmp_path.glob("relaxed-*.pt")
    before = torch.load(kept, weights_only=True)
    resumed = searched(tmp_path, mode, log=log)
    through = searched(tmp_path / "through", mode)
    assert resumed.decisions == through.decisions
    found, wanted = (plan.extensions["relaxed"] for plan in (resumed, through))
    assert found.get("steps") == wanted.get("steps")
    # The killed process may have had other threads, and so other roundings.
    assert ("loss" in found) == ("loss" in wanted) == (mode != "paper")
    if mode != "paper":
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    assert _work(torch.load(kept, weights_only=True)) > _work(before) > 0
    lines = [json.loads(line) for line in Path(log).read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    assert lines[-1] == through.extensions["relaxed"]["steps"][-1]


def _work(state):
    return len(state["losses"]) if "losses" in state else len(state["steps"])


def test_what_was_done_is_not_done_again(tmp_path, monkeypatch):
    first = searched(tmp_path)
    from rankopt_strategies.relaxed.objective import Objective

    calls = []
    real = Objective.__call__
    monkeypatch.setattr(
        Objective, "__call__", lambda self, *a: (calls.append(1), real(self, *a))[1]
    )
    assert searched(tmp_path).decisions == first.decisions
    assert len(calls) == 1  # the check of the dense model


def test_another_search_in_the_same_folder(tmp_path):
    searched(tmp_path, rounds=1)
    with pytest.raises(CheckpointError, match="made with settings"):
        searched(tmp_path, rounds=2)
    searched(tmp_path, budget="macs<=50%", rounds=1)  # a file of its own
    assert len(list(tmp_path.glob("relaxed-*.pt"))) == 2
    for file in tmp_path.glob("relaxed-*.pt"):
        file.write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="is damaged"):
        searched(tmp_path, rounds=1)


def test_tensorboard_gets_every_step(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plan = searched(mode="measured", tensorboard=str(tmp_path))
    events = EventAccumulator(str(tmp_path)).Reload()
    steps = plan.extensions["relaxed"]["steps"]
    found = {event.step: event.value for event in events.Scalars("loss")}
    assert found == pytest.approx({step["step"]: step["loss"] for step in steps}, rel=1e-5)
    names = set(events.Tags()["scalars"])
    assert {"soft_loss", "entropy", "cost/macs", "kept/conv", "surest/conv"} <= names


def test_paper_mode_logs_ranks(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plan = searched(mode="paper", tensorboard=str(tmp_path), objective="reconstruction")
    ranks = EventAccumulator(str(tmp_path)).Reload().Scalars("ranks/conv")
    steps = plan.extensions["relaxed"]["steps"]
    assert [int(event.value) for event in ranks] == [step["ranks"][0] for step in steps]


def test_logs_that_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(RankoptError, match="cannot write log="):
        searched(log=str(tmp_path / "missing" / "log.jsonl"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingDependency, match=r"pip install 'rankopt\[tensorboard\]'"):
        searched(tensorboard=str(tmp_path))


def test_a_plot_of_how_ranks_moved(tmp_path, capsys):
    plan = searched(mode="paper", objective="reconstruction")
    write_ranks(plan, tmp_path / "paper.html")
    assert "rank" in (tmp_path / "paper.html").read_text(encoding="utf-8")
    plan = searched()
    plan.save(tmp_path / "plan.json")
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "plan.json"), "--plot", str(page)]) == 0
    assert f"plot written to {page}" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert "cost left" in text
    assert "soft_loss" in text
    assert main(["report", str(tmp_path / "plan.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["strategy"]["name"] == "relaxed"


def test_plots_that_cannot_be(tmp_path, monkeypatch):
    plan = rankopt.search(planted_model(), "params<=50%")
    with pytest.raises(RankoptError, match="'knapsack' holds no record of steps"):
        write_ranks(plan, tmp_path / "p.html")
    for step in ({"step": 0}, {"step": 0, "kept": [1.0, 0.5]}, {"kept": [1.0]}, 3):
        damaged = {"relaxed": {"sites": ["a"], "steps": [step]}}
        with pytest.raises(PlanError, match="the record of 'relaxed' is damaged"):
            write_ranks(replace(plan, strategy={"name": "relaxed"}, extensions=damaged), "p.html")
    with pytest.raises(RankoptError, match="plots are HTML pages"):
        write_ranks(plan, tmp_path / "p.png")
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(MissingDependency, match="pip install plotly"):
        write_ranks(searched(rounds=1), tmp_path / "p.html")


def test_settings_stand_in_the_plan(tmp_path):
    settings = searched(tmp_path, rounds=1).strategy["settings"]
    assert settings["folder"] == str(tmp_path)
    assert Relaxed(**settings).paper == RelaxedSettings()


def test_another_criterion_does_not_go_on_with_the_losses_of_the_first(tmp_path):
    data = [(planted_inputs(16), planted_model(noise=0.4)(planted_inputs(16)).detach())]

    def searched_by(criterion):
        strategy = Relaxed(
            objective="task", data=data, criterion=criterion, rounds=1, folder=str(tmp_path),
            slopes="gradient",
        )  # fmt: skip
        return rankopt.search(
            planted_model(noise=0.4), "macs<=40%", strategy=strategy,
            example_inputs=planted_inputs(),
        )  # fmt: skip

    searched_by(lambda output, target: (output - target + 1).square().mean())
    with pytest.raises(CheckpointError, match="another criterion or model"):
        searched_by(lambda output, target: (output - target + 2).abs().mean())

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finetuning import equal, in_batches, problem, snapshot
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rankopt
from rankopt.errors import CheckpointError, TrainingError
from rankopt.training import Distillation, Sequential
from rankopt.training.batches import groups
from rankopt.training.recipe import rate

pytest.importorskip("accelerate")


def accuracy_on(x, y):
    return lambda model: 100 * (model(x).argmax(dim=1) == y).float().mean().item()


def _keep(seen, model):
    """A metric that is best after the first epoch."""
    seen.append(snapshot(model))
    return float(len(seen) == 2)


@pytest.mark.parametrize("freezing", ["none", "fixed", "sequential", Sequential(parity=1)])
def test_accuracy_comes_back(freezing):
    teacher, small, x, y = problem()
    modes = [module.training for module in small.modules()]
    evaluate = accuracy_on(x, y)
    before, theirs = evaluate(small), snapshot(teacher)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    done = rankopt.finetune(
        small, in_batches(x, y), freezing=freezing, epochs=6, final_epochs=1, learning_rate=3e-3
    )
    assert torch.equal(state, torch.get_rng_state())
    assert evaluate(small) > before + 10
    assert [module.training for module in small.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in small.parameters())
    assert equal(theirs, snapshot(teacher))
    frozen = [epoch["frozen"] for epoch in done.history]
    assert all(frozen[:5]) == (freezing != "none")
    assert frozen[5] == 0
    assert done.history[-1]["loss"] < done.history[0]["loss"]
    assert done.history[-1]["step"] == 6 * 6
    assert "training accuracy" in str(done)


def test_without_labels():
    teacher, small, x, y = problem()
    loader = DataLoader(TensorDataset(x), batch_size=32, shuffle=True)
    done = rankopt.finetune(
        small,
        loader,
        teacher=teacher,
        distillation=Distillation(labels=0, logits=1),
        evaluate=accuracy_on(x, y),
        epochs=4,
    )
    first, last = done.history[0], done.history[-1]
    assert last["accuracy"] is None
    assert last["terms"]["logits"] < first["terms"]["logits"]
    assert last["terms"]["outputs"] < first["terms"]["outputs"]
    assert set(last["terms"]) == {"weights", "outputs", "logits"}


def test_the_best_epoch_is_kept_and_patience_ends():
    _, small, x, y = problem()
    values, states = iter([0.5, 1.0, 3.0, 2.0, 2.5, 9.0]), []

    def evaluate(model):
        assert not model.training
        states.append(snapshot(model))
        return next(values)

    done = rankopt.finetune(small, in_batches(x, y), epochs=5, evaluate=evaluate, patience=2)
    assert (len(done.history), done.best_epoch, done.metric) == (4, 1, 3.0)
    assert done.stopped == "patience"
    assert "metric 3 after epoch 2 (0.5 before)" in str(done)
    assert "stopped early" in str(done)
    assert equal(states[2], snapshot(small))


def test_a_run_that_only_makes_it_worse_leaves_the_weights_as_they_were():
    _, small, x, y = problem()
    given, values = snapshot(small), iter([4.0, 1.0, 3.0])
    done = rankopt.finetune(
        small, in_batches(x, y), epochs=2, evaluate=lambda model: next(values), ema=0.9
    )
    assert (len(done.history), done.best_epoch, done.before, done.metric) == (2, -1, 4.0, 4.0)
    assert "no epoch was better" in str(done)
    assert equal(given, snapshot(small))


def test_a_metric_of_nan_before_is_no_bar():
    _, small, x, y = problem()
    values = iter([float("nan"), 1.0])
    done = rankopt.finetune(small, in_batches(x, y), epochs=1, evaluate=lambda model: next(values))
    assert (done.best_epoch, done.metric) == (0, 1.0)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_callers_autocast_is_left(precision):
    """Its cache would serve the weights of the first step for ever."""
    states = []
    for enabled in (False, True):
        torch.manual_seed(2)
        model, x, y = nn.Linear(4, 3), torch.randn(32, 4), torch.randint(0, 3, (32,))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            rankopt.finetune(model, in_batches(x, y, 8), epochs=2, precision=precision)
            assert torch.is_autocast_enabled("cpu") == enabled
        states.append(snapshot(model))
    assert equal(*states)


def test_accumulated_batches_are_one_large_batch():
    x, y = torch.randn(64, 4), torch.randint(0, 3, (64,))
    states = []
    for size, accumulate in ((32, 1), (8, 4)):
        torch.manual_seed(1)
        model = nn.Linear(4, 3)
        done = rankopt.finetune(model, in_batches(x, y, size), accumulate=accumulate, epochs=2)
        assert done.history[-1]["step"] == 4
        states.append(snapshot(model))
    assert torch.allclose(states[0]["weight"], states[1]["weight"], atol=1e-6)


def test_the_average_is_evaluated_and_kept():
    states = {}
    for ema in (None, 0.9):
        _, small, x, y = problem()
        seen = []
        keep = functools.partial(_keep, seen)
        rankopt.finetune(small, in_batches(x, y), epochs=2, ema=ema, evaluate=keep)
        assert equal(seen[1], snapshot(small))
        states[ema] = seen[1]
    # The trained weights are the same; only what is made of them differs.
    assert not equal(states[None], states[0.9])
    apart = [(states[None][k].float() - v.float()).norm() for k, v in states[0.9].items()]
    assert 0 < max(apart) < 5


def test_the_average_has_batchnorm_statistics_of_its_own():
    """Those of the weights it is the average of are far off while they move quickly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    x, y = 3 + torch.randn(256, 8), torch.randint(0, 3, (256,))
    scored = []
    rankopt.finetune(
        model, in_batches(x, y), epochs=3, ema=0.9, learning_rate=0.05, schedule="constant",
        evaluate=lambda average: scored.append(snapshot(average)) or len(scored),
    )  # fmt: skip
    with torch.no_grad():
        taken_in = model[0](x)
    assert torch.allclose(model[1].running_mean, taken_in.mean(dim=0), atol=1e-4)
    assert torch.allclose(model[1].running_var, taken_in.var(dim=0, correction=0), rtol=1e-3)
    assert equal(scored[-1], snapshot(model))


@pytest.mark.parametrize("precision", ["bf16"])
def test_autocast(precision):
    teacher, small, x, y = problem()
    done = rankopt.finetune(small, in_batches(x, y), teacher=teacher, precision=precision, epochs=2)
    assert done.history[-1]["loss"] < done.history[0]["loss"]
    assert all(p.dtype == torch.float32 for p in small.parameters())


def test_the_optimisers_learning_rate_over_time():
    seen = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(self.param_groups[0]["lr"])
            return super().step(closure)

    _, small, x, y = problem(count=64)
    rankopt.finetune(
        small, in_batches(x, y, 16), epochs=5, schedule="one-cycle",
        optimizer=lambda p: Watched(p, lr=0.1),
    )  # fmt: skip
    assert len(seen) == 20
    assert max(seen) == pytest.approx(0.1)
    assert seen.index(max(seen)) == 6
    assert seen[0] == pytest.approx(0.1 / 25)
    assert seen[-1] < 0.01
    assert [rate("constant", t, 4, 0.5) for t in range(4)] == [0.5, 1, 1, 1]


@pytest.mark.slow
def test_hugging_face_models():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64, num_labels=3,
    )  # fmt: skip
    dense = BertForSequenceClassification(config).eval()
    ids = torch.randint(0, 50, (32, 6))
    plan = rankopt.search(dense, "params<=90%", example_inputs={"input_ids": ids})
    small = rankopt.apply(dense, plan)
    train = [{"input_ids": ids, "labels": ids[:, 0] % 3}] * 10
    done = rankopt.finetune(small, train, teacher=dense, freezing="sequential", epochs=3)
    assert done.history[-1]["loss"] < done.history[0]["loss"]
    assert done.history[-1]["accuracy"] is not None


# Interruptions


def test_a_record_one_line_per_epoch(tmp_path):
    _, small, x, y = problem(count=64)
    done = rankopt.finetune(small, in_batches(x, y), epochs=2, folder=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/record.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "epoch", "epoch"]
    assert lines[0]["optimizer"] == "AdamW"
    assert lines[2]["loss"] == done.history[1]["loss"]
    assert lines[2]["samples_per_second"] > 0
    # A finished run is not run again, and its weights come back.
    _, again, _, _ = problem(count=64)
    repeated = rankopt.finetune(again, in_batches(x, y), epochs=2, folder=tmp_path / "run")
    assert repeated.history == done.history
    assert equal(snapshot(small), snapshot(again))


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_finetune import interrupted
calls = 0
def unchanged(inputs, generator):
    global calls
    calls += 1
    if calls == 4 * 2 + 3:  # in the middle of the third epoch
        os.kill(os.getpid(), signal.SIGKILL)
    return inputs
interrupted({folder!r}, unchanged)
"""


def unchanged(inputs, generator):
    return inputs


def interrupted(folder, augment):
    teacher, small, x, y = problem(count=128)
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    rankopt.finetune(
        small, loader, teacher=teacher, freezing="sequential", epochs=4, ema=0.9,
        evaluate=accuracy_on(x, y), augment=augment, folder=folder, seed=3,
        optimizer=lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=1e-3),
    )  # fmt: skip
    return snapshot(small)


@pytest.mark.slow
def test_goes_on_after_kill_9_to_the_same_result(tmp_path):
    threads = torch.get_num_threads()
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "killed"))
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    record = (tmp_path / "killed/record.jsonl").read_text().splitlines()
    assert len(record) == 1 + 2
    assert not [p for p in (tmp_path / "killed").iterdir() if p.name.startswith(".")]
    torch.set_num_threads(1)
    try:
        resumed = interrupted(tmp_path / "killed", unchanged)
        through = interrupted(tmp_path / "through", unchanged)
    finally:
        torch.set_num_threads(threads)
    assert equal(resumed, through)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optimizer": "sgd"}, "made with optimizer 'AdamW', this run has 'SGD'"),
        ({"epochs": 5}, "made with epochs 2"),
        ({"freezing": "fixed"}, "made with freezing"),
    ],
)
def test_another_run_in_the_same_folder(tmp_path, changed, message):
    _, small, x, y = problem(count=64)
    settings = {"epochs": 2, "folder": tmp_path}
    rankopt.finetune(small, in_batches(x, y), **settings)
    before = snapshot(small)
    with pytest.raises(CheckpointError, match=message):
        rankopt.finetune(small, in_batches(x, y), **{**settings, **changed})
    assert equal(before, snapshot(small))


def test_another_plan_or_a_damaged_file(tmp_path):
    teacher, small, x, y = problem(count=64)
    rankopt.finetune(small, in_batches(x, y), epochs=1, folder=tmp_path)
    other = rankopt.apply(teacher, rankopt.search(teacher, "params<=50%"))
    with pytest.raises(CheckpointError, match="made with plan"):
        rankopt.finetune(other, in_batches(x, y), epochs=1, folder=tmp_path)
    (tmp_path / "training.pt").write_bytes(b"half of it")
    with pytest.raises(CheckpointError, match="is damaged"):
        rankopt.finetune(small, in_batches(x, y), epochs=1, folder=tmp_path)


def test_nan_stops_at_its_step_and_keeps_the_last_good_weights(tmp_path):
    _, small, x, y = problem(count=128)
    calls = 0

    def poison(inputs, generator):
        nonlocal calls
        calls += 1
        return inputs * float("nan") if calls == 4 * 2 + 2 else inputs

    with pytest.raises(TrainingError, match=r"step 9 \(epoch 3\).*those of epoch 2.*is intact"):
        rankopt.finetune(small, in_batches(x, y), epochs=4, augment=poison, folder=tmp_path)
    stored = torch.load(tmp_path / "training.pt", weights_only=True)
    assert len(stored["history"]) == 2
    assert equal(stored["model"], snapshot(small))
    assert all(value.isfinite().all() for value in small.state_dict().values())
    assert all(p.requires_grad and p.grad is None for p in small.parameters())


def test_accumulated_steps_take_no_batch_too_many():
    found = list(groups(iter(range(100)), 4, 10))
    assert [len(group) for group in found] == [4, 4, 2]
    assert [x for group in found for x in group] == list(range(10))

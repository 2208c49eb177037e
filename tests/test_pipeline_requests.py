"""What `compress` refuses at once, goes on with, and hands to the model."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn

import rankopt
from rankopt._model.spelled import spelled
from rankopt._pipeline import stages
from rankopt.errors import (
    CheckpointError,
    EvaluationError,
    MissingDependency,
    ModelError,
)
from rankopt.training import Fixed
from rankopt.training.distillation import Distillation

pytest.importorskip("accelerate")

BUDGET = "params<=60%"


def dense():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def data(count=32):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(count, 16, generator=generator), torch.arange(count) % 4)]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"finetune": {"precision": "bf32"}}, ValueError, "precision='bf32'"),
        ({"finetune": {"patience": 1}}, ValueError, "patience= needs evaluate="),
        ({"finetune": {"augment": "flip"}}, ValueError, "augment='flip'"),
        ({"train": iter(data())}, ModelError, "can be read only once"),
        ({"model": dense().requires_grad_(False)}, ModelError, "finetune has nothing to train"),
        ({"finetune": {"freezing": Fixed().front("3", 0)}}, ModelError, "it has 0, 1, 2"),
        ({"finetune": {"freezing": Fixed().front("1.first", 0)}}, ModelError, r"'1.first'.*it has"),
        ({"recover": {"seconds": -3}}, ValueError, "seconds=-3"),
        ({"recover": {"steps": 0}}, ValueError, "steps=0"),
        ({"recover": {"precision": "fp16"}}, ValueError, "precision='fp16'"),
        ({"search": {"budget": "params<=10%"}}, TypeError, "search=.*multiple values.*budget"),
        ({"evaluate": lambda model: {"accuracy": 1}}, EvaluationError, "evaluate gave a dict"),
    ],
)
def test_bad_requests_stop_it_before_the_search(monkeypatch, settings, error, message):
    monkeypatch.setattr(stages, "search", None)
    settings = {"model": dense(), "train": data(), **settings}
    with pytest.raises(error, match=message):
        rankopt.compress(settings.pop("model"), BUDGET, **settings)


def test_a_front_may_end_with_a_factor():
    tuning = {"freezing": Fixed().front("0.first", 0), "epochs": 1}
    done = rankopt.compress(dense(), BUDGET, train=data(), recover=False, finetune=tuning)
    assert [name for name, _ in done.model[0].named_children()] == ["first", "last"]


def test_without_accelerate_there_is_no_search(monkeypatch):
    monkeypatch.setattr(stages, "search", None)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingDependency, match="finetune needs accelerate"):
        rankopt.compress(dense(), BUDGET, train=data())


def test_recover_has_the_teacher_it_is_given():
    done = rankopt.compress(
        dense(), BUDGET, calibration=[x for x, _ in data()],
        recover={"teacher": dense(), "steps": 4},
    )  # fmt: skip
    assert "recovered" in done.stages[2].note


@pytest.mark.parametrize(
    ("model", "count", "reason"),
    [
        (dense(), 8, "at least 16 calibration samples, got 8"),
        (dense().requires_grad_(False), 32, "nothing to train"),
    ],
)
def test_a_repair_nobody_asked_for_is_left_out_with_a_reason(model, count, reason):
    arguments = {"calibration": [x for x, _ in data(count)]}
    done = rankopt.compress(model, BUDGET, **arguments)
    assert done.stages[2].name == "recover"
    assert done.stages[2].note.startswith("left out: ")
    assert reason in done.stages[2].note
    with pytest.raises(ValueError, match=reason):
        rankopt.compress(model, BUDGET, recover={"steps": 5}, **arguments)


@pytest.mark.parametrize("labelled", [True, False])
def test_labels_of_training_data_are_no_inputs(labelled):
    given = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x, features=None):
            given.append(features is not None)
            return self.fc(x)

    tune = {"distillation": Distillation(labels=0, logits=1), "epochs": 1}
    x, y = torch.randn(32, 16), torch.randn(32, 1)
    batch = (x, y) if labelled else {"x": x, "features": y}  # a pair could be labelled, too
    rankopt.compress(
        Net(), BUDGET, train=[batch], recover=False, finetune=False if labelled else tune
    )
    assert set(given) == {not labelled}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.MultiheadAttention(32, 4, batch_first=True)
        self.fc = nn.Linear(32, 32)

    def forward(self, x):
        return self.fc(self.mix(x, x, x, need_weights=False)[0])


def test_what_later_rounds_cannot_fold_is_refused_before_the_first_trains():
    def train(small, teacher, folder):
        raise AssertionError("trained in vain")

    x = torch.randn(2, 5, 32)
    arguments = {"example_inputs": x, "rounds": 2}
    with pytest.raises(ModelError, match=r"mix.*cannot be folded.*ignore="):
        rankopt.compress(Attention(), "params<=50%", finetune=train, **arguments)
    done = rankopt.compress(Attention(), "params<=90%", search={"ignore": "mix*"}, **arguments)
    assert done.comparison.params.ratio <= 0.9


def test_a_result_that_lost_its_plan():
    def apply(model, plan):
        made = rankopt.apply(model, plan)
        del made.__dict__["rankopt_plan"]
        return made

    assert rankopt.compress(dense(), BUDGET, apply=apply).comparison.params.ratio <= 0.6


def test_repairs_of_so_many_steps_have_no_clock(monkeypatch):
    seen = {}
    monkeypatch.setattr(stages, "recover", lambda small, **settings: seen.update(settings))
    given = {"calibration": [x for x, _ in data()]}
    for recover, seconds in ((None, 60.0), ({"steps": 4}, None), ({"seconds": 9, "steps": 4}, 9)):
        rankopt.compress(dense(), BUDGET, recover=recover, **given)
        assert seen["seconds"] == seconds
    assert seen["steps"] == 4


def test_metrics_in_batches_and_of_models_that_broke():
    values = iter([iter([1.0, 4.0]), float("nan"), iter([(1.0, 1.0), (4.0, 2.0)])])
    done = rankopt.compress(dense(), BUDGET, evaluate=lambda model: next(values))
    assert (done.comparison.metric.before, done.comparison.metric.after) == (2.5, 3.0)


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, xs):
        return self.fc(xs.copy()[0])


def test_inputs_in_lists_stay_in_lists():
    done = rankopt.compress(Listed(), BUDGET, example_inputs=([torch.randn(2, 16)],))
    assert done.stages[-1].note == "read back: outputs identical"


# Going on in a folder


def test_a_stage_that_would_come_before_one_done_is_refused(tmp_path):
    arguments = {"train": data(), "finetune": {"epochs": 1}, "folder": tmp_path}
    rankopt.compress(dense(), BUDGET, recover=False, **arguments)
    with pytest.raises(CheckpointError, match="made with settings"):
        rankopt.compress(dense(), BUDGET, recover={"steps": 2}, **arguments)


def test_a_stage_that_comes_last_may_be_added(tmp_path):
    arguments = {"calibration": [x for x, _ in data()], "recover": False, "folder": tmp_path}
    rankopt.compress(dense(), BUDGET, **arguments)
    done = rankopt.compress(dense(), BUDGET, train=data(), finetune={"epochs": 1}, **arguments)
    assert [stage.name for stage in done.stages][-2:] == ["finetune", "verify"]
    rounds = {**arguments, "folder": tmp_path / "rounds", "rounds": 2}
    rankopt.compress(dense(), BUDGET, **rounds)
    with pytest.raises(CheckpointError, match="made with settings"):  # of round 1 too
        rankopt.compress(dense(), BUDGET, train=data(), finetune={"epochs": 1}, **rounds)


def test_other_example_inputs_are_refused(tmp_path):
    rankopt.compress(dense(), BUDGET, example_inputs=torch.zeros(1, 16), folder=tmp_path)
    with pytest.raises(CheckpointError, match="made with example_inputs"):
        rankopt.compress(dense(), BUDGET, example_inputs=torch.zeros(2, 16), folder=tmp_path)


class Counted(nn.CrossEntropyLoss):
    calls = 0

    def forward(self, output, labels):
        self.calls += 1
        return super().forward(output, labels)


def test_a_loss_that_counts_is_the_same_in_the_next_process(tmp_path):
    for _ in range(2):
        rankopt.finetune(dense(), data(), epochs=1, folder=tmp_path, loss=Counted())


def scale(x, by):
    return x * by


@dataclass
class Own:
    rule: object


def test_settings_are_spelled_alike_in_every_process():
    assert spelled(partial(scale, by=2)) == "partial(scale, by=2)"
    assert spelled(partial(scale, by=2)) != spelled(partial(scale, by=3))
    assert spelled(Own(scale)) == "Own(rule=<function scale>)"
    assert spelled({"x": torch.zeros(1, 3)}) == "{'x': torch.float32[1, 3]}"
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    assert spelled(smooth) == spelled(copy.deepcopy(smooth)) != spelled(nn.CrossEntropyLoss())
    assert spelled({"b", "a"}) == spelled(frozenset("ab")) == "{'a', 'b'}"


def test_modules_are_told_by_what_they_hold():
    one, other = (nn.CrossEntropyLoss(weight=torch.tensor([1.0, w])) for w in (1, 9))
    assert spelled(one) == spelled(copy.deepcopy(one)) != spelled(other)
    inside = [nn.Sequential(nn.CrossEntropyLoss(label_smoothing=by)) for by in (0, 0.1)]
    assert spelled(inside[0]) == spelled(copy.deepcopy(inside[0])) != spelled(inside[1])
    assert spelled(nn.LazyLinear(3)) == spelled(nn.LazyLinear(3))  # without values as yet


def test_other_training_data_are_another_run(tmp_path):
    arguments = {"recover": False, "finetune": {"epochs": 1}, "folder": tmp_path}
    inputs = [x for x, _ in data()]
    rankopt.compress(dense(), BUDGET, train=data(), calibration=inputs, **arguments)
    other = [(x, (y + 1) % 3) for x, y in data()]
    with pytest.raises(CheckpointError, match="made with train"):
        rankopt.compress(dense(), BUDGET, train=other, calibration=inputs, **arguments)

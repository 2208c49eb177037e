"""What went wrong once in recover, finetune and compress, found by review."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from finetuning import equal, in_batches, problem, snapshot
from torch import nn
from torch.utils.data import IterableDataset

import rankopt
from rankopt._model.inputs import hold
from rankopt.errors import CheckpointError, ModelError, RankoptWarning, TrainingError
from rankopt.training import Distillation, Distiller, Fixed, Schedule, Sequential
from rankopt.training import batches as data
from rankopt.training.recipe import Recipe
from rankopt.training.repair import MOST_RISE
from rankopt.training.samples import Samples

pytest.importorskip("accelerate")


class Routed(nn.Module):
    """Two experts; which one runs, and on how many samples, follows from the values."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 16) for _ in range(2))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        gate = x[:, 0] > 0
        out = x.new_zeros(len(x), 16)
        for choice, expert in zip((gate, ~gate), self.experts, strict=True):
            if bool(choice.any()):
                out[choice] = expert(x[choice])
        return self.head(torch.relu(out))


def small_of(model, budget="params<=60%", **settings):
    return rankopt.apply(model, rankopt.search(model, budget, **settings))


def recipe(**changes):
    defaults = {
        "epochs": 10, "learning_rate": 1e-3, "optimizer": "adamw", "weight_decay": 0.0,
        "schedule": "cosine", "warmup": None, "accumulate": 1, "clip": 1.0, "ema": None,
        "patience": None, "precision": "no", "freezing": "sequential", "freezing_steps": None,
        "final_epochs": 0, "seed": 0,
    }  # fmt: skip
    return Recipe(**{**defaults, **changes})


# recover


def test_texts_of_every_length_are_trained_on():
    held = [torch.zeros(32, length) for length in range(20, 37)] + [torch.zeros(70, 5)]
    samples = Samples(held)
    train, _ = samples.split(1 / 16)
    stream = samples.endless(train, 64, torch.Generator().manual_seed(0))
    seen = [next(stream) for _ in range(18)]
    assert {x.shape[1] for x in seen} == {5, *range(20, 37)}
    # But not on the short rest of what fills a batch.
    assert {len(x) for x in seen if x.shape[1] == 5} == {64}


def test_what_samples_share_is_not_indexed():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 12)

        def forward(self, x, mask):
            return self.layer(x) @ mask

    torch.manual_seed(0)
    model, mask = Masked(), torch.eye(12)
    held = [(torch.randn(n, 12), mask) for n in (40, 40, 20)]
    small = small_of(model)
    done = rankopt.recover(small, teacher=model, calibration=held, steps=10, batch_size=16)
    assert done.steps == 10
    assert done.after <= (1 + MOST_RISE) * done.before


def test_experts_that_are_idle_or_get_other_samples():
    torch.manual_seed(0)
    model = Routed().eval()
    held = [torch.randn(64, 8) for _ in range(3)] + [torch.randn(64, 8) + 9]
    small = small_of(model)
    with torch.no_grad():  # routes other samples than its teacher
        small.stem[0].weight += 0.3 * torch.randn_like(small.stem[0].weight)
    assert rankopt.recover(small, teacher=model, calibration=held, steps=5).steps == 5


class Auxiliary(nn.Module):
    """More outputs in train mode, and a branch that is dropped at random there."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 4)
        self.drawn = 0

    def forward(self, x):
        x = torch.relu(self.first(x))
        if self.training:
            self.drawn += 1
            x = nn.functional.dropout(x, 0.5)
            return self.last(x), self.last(x)
        return self.last(x)


def test_recover_trains_the_model_as_it_is_evaluated():
    torch.manual_seed(0)
    model = Auxiliary().train()
    small = small_of(model)
    held = [torch.randn(64, 16) for _ in range(2)]
    before = small.drawn
    assert rankopt.recover(small, teacher=model, calibration=held, steps=3).steps == 3
    assert small.drawn == before
    assert small.training


def test_labels_in_mappings_are_left_out_of_calibration():
    class Named(nn.Module):
        def forward(self, x, labels=None):
            return x

    class Needs(nn.Module):
        def forward(self, x, labels):
            return x

    batch = {"x": torch.zeros(4, 2), "labels": torch.zeros(4)}
    assert set(hold(Named(), [batch])[0]) == {"x"}
    assert set(hold(Needs(), [batch])[0]) == {"x", "labels"}


# finetune


def test_finetune_of_experts_that_are_idle_in_some_batches():
    model = Routed().eval()
    torch.manual_seed(0)
    x = torch.cat([torch.randn(96, 8), torch.randn(64, 8) + 9])
    train = in_batches(x, model(x).argmax(1))
    rankopt.finetune(small_of(model), train, teacher=model, epochs=2)


def test_any_seed_will_do():
    _, model, x, y = problem(64)
    rankopt.finetune(model, in_batches(x, y), epochs=1, seed=20_250_101)


def test_numbers_of_numpy_can_be_gone_on_with(tmp_path):
    teacher, model, x, y = problem(64)
    settings = {
        "teacher": teacher, "learning_rate": np.float64(1e-3), "weight_decay": np.float64(0.01),
        "epochs": 2, "folder": tmp_path,
    }  # fmt: skip
    other = copy.deepcopy(model)
    rankopt.finetune(model, in_batches(x, y), **settings)
    rankopt.finetune(other, in_batches(x, y), **settings)
    assert equal(snapshot(model), snapshot(other))


def test_final_epochs_begin_where_they_should_however_long_a_phase_is():
    roles = frozenset({"first", "last"})
    for steps in (1000, 70, 3):
        schedule = recipe(freezing_steps=steps, final_epochs=1).freezing_schedule(100)
        assert schedule.frozen(899, roles)
        assert not schedule.frozen(900, roles)
        assert schedule.frozen(0, roles) == schedule.frozen(min(steps, 900) - 1, roles)
    assert recipe(freezing_steps=70).freezing_schedule(100).frozen(70, roles) == {"last"}


def test_final_epochs_without_freezing_need_no_plan():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(64, 8)
    done = rankopt.finetune(
        model, in_batches(x, torch.arange(64) % 4), epochs=2, final_epochs=1, freezing="none"
    )
    assert len(done.history) == 2


class Mine(Schedule):
    """No dataclass."""

    def __init__(self, role):
        self.role = role

    def frozen(self, phase, roles):
        return roles & {self.role}


def test_a_schedule_of_ones_own_is_told_by_its_settings(tmp_path):
    assert repr(Mine("core").until(3)) == "Mine(role='core').until(3)"
    assert repr(Sequential().every(2)) == "Sequential(parity=0).every(2)"
    _, model, x, y = problem(64)
    for _ in range(2):
        rankopt.finetune(model, in_batches(x, y), epochs=1, folder=tmp_path, freezing=Mine("first"))
    with pytest.raises(CheckpointError, match="freezing"):
        rankopt.finetune(model, in_batches(x, y), epochs=1, folder=tmp_path, freezing=Mine("last"))


def _nothing(model):
    return 0.0


@pytest.mark.parametrize(
    "change",
    [
        {"weight_decay": 0.1},
        {"clip": None},
        {"optimizer": lambda p: torch.optim.AdamW(p, betas=(0.5, 0.9), weight_decay=1e-4)},
        {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)},
        {"augment": "auto"},
        {"evaluate": lambda model: 0.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_run_is_not_gone_on_with_by_another_recipe(tmp_path, change):
    _, model, x, y = problem(64)
    settings = {"epochs": 1, "folder": tmp_path, "optimizer": "adamw", "evaluate": _nothing}
    rankopt.finetune(model, in_batches(x, y), **settings)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"weight_decay|clip|momentum|loss|augment|evaluate"):
        rankopt.finetune(model, in_batches(x, y), **{**settings, **change})
    assert equal(before, snapshot(model))


def test_other_trainable_parameters_leave_the_model_alone(tmp_path):
    _, model, x, y = problem(64)
    rankopt.finetune(model, in_batches(x, y), epochs=1, folder=tmp_path)
    _, fresh, _, _ = problem(64)
    next(p for p in fresh.parameters() if p.requires_grad).requires_grad_(False)
    before = snapshot(fresh)
    with pytest.raises(CheckpointError, match="trainable parameters"):
        rankopt.finetune(fresh, in_batches(x, y), epochs=1, folder=tmp_path)
    assert equal(before, snapshot(fresh))


def test_a_loader_shorter_than_announced_is_told_of():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from in_batches(*problem(64)[2:])

    _, model, _, _ = problem(64)
    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    with pytest.warns(RankoptWarning, match="train yielded 2 steps in epoch 1 where 100 were"):
        rankopt.finetune(model, loader, epochs=1, batches_per_epoch=100)
    with pytest.raises(ValueError, match="batches_per_epoch=0: expected an integer"):
        rankopt.finetune(model, loader, epochs=1, batches_per_epoch=0)


def test_the_record_that_a_kill_took_is_written_again(tmp_path):
    _, model, x, y = problem(64)
    for _ in range(2):
        done = rankopt.finetune(model, in_batches(x, y), epochs=1, folder=tmp_path)
        record = tmp_path / "record.jsonl"
        assert len(record.read_text().splitlines()) == 2
        record.unlink()
    assert "fine-tuned for 1 epoch (" in str(done)
    again = rankopt.finetune(
        model, in_batches(x, y), epochs=1, folder=tmp_path, evaluate=lambda m: 1.0
    )
    assert "fine-tuned" in str(again)


def test_a_compiled_model_that_ran_before_is_compared_too():
    teacher, model, x, y = problem(64)
    compiled = torch.compile(model, backend="eager")
    compiled(x[:32])
    done = rankopt.finetune(compiled, in_batches(x, y), teacher=teacher, epochs=1)
    assert "outputs" in done.history[0]["terms"]
    torch.compiler.reset()


def test_labels_that_are_left_out_are_not_counted_as_wrong():
    output, labels = torch.eye(4), torch.tensor([0, 1, -100, -100])
    right, counted = data.right(output, labels)
    assert (int(right), int(counted)) == (2, 2)


def test_a_teacher_that_fails_is_named():
    teacher, model, x, y = problem(64)
    with pytest.raises(TrainingError, match=r"step 0: the teacher fails on a batch of \[32, 3\]"):
        rankopt.finetune(model, in_batches(x[:, :, 0, 0], y), teacher=teacher, epochs=1)


# Distillation


class Tupled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.last = nn.Linear(16, 4)

    def forward(self, x):
        return self.last(self.attention(x, x, x)[0])[:, 0]


def test_features_that_are_tuples_are_compared_and_others_refused():
    model, x = Tupled(), torch.randn(8, 3, 16)
    small = small_of(model, "params<=98%", only=["last"])
    with torch.no_grad():
        small.attention.out_proj.weight += 0.1
    terms = {"labels": 0, "weights": 0, "outputs": 1.0}
    with Distiller(small, model, Distillation(**terms, features=("attention",))) as distiller:
        distiller.teach(x)
        _, with_it = distiller.loss(small(x))
    with Distiller(small, model, Distillation(**terms)) as distiller:
        distiller.teach(x)
        _, without = distiller.loss(small(x))
    assert with_it["outputs"] > without["outputs"]
    with pytest.raises(ModelError, match="features: there is no module 'attentoin'"):
        Distiller(small, model, Distillation(features=("attentoin",)))


def test_a_single_column_without_its_axis():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 1), nn.Flatten(0))
    small, x = small_of(model), torch.randn(8, 16)
    with Distiller(small, model, Distillation(labels=0, weights=0, logits=1)) as distiller:
        distiller.teach(x)
        loss, parts = distiller.loss(small(x))
    assert parts["logits"] == pytest.approx(float((small(x) - model(x)).square().mean().detach()))
    assert loss.requires_grad


def test_a_teacher_of_another_architecture_teaches_logits_only():
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(8, 16)
    small, other = small_of(model), nn.ModuleDict({"only": nn.Linear(16, 4)})
    other.forward = other["only"].forward
    with pytest.raises(ModelError, match="the teacher has none of the model's decomposed layers"):
        Distiller(small, other)
    with Distiller(small, other, Distillation(0, 0, 0, logits=1)) as distiller:
        distiller.teach(x)
        assert set(distiller.loss(small(x))[1]) == {"logits"}


# Freezing


def test_a_forward_patched_by_others_stays():
    model = rankopt.apply(*_planned())
    layer = next(m for m in model.modules() if isinstance(m, nn.Conv2d) and m.bias is not None)
    original = layer.forward
    layer.forward = lambda x: original(x)
    patched = layer.forward
    freezer = rankopt.training.Freezer(model, Fixed())
    freezer.step(0)
    freezer.release()
    assert layer.forward is patched


def _planned():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3))
    return model, rankopt.search(model, "params<=60%")


# compress


QUICK = {"recover": False, "finetune": {"epochs": 1, "learning_rate": 1e-3}}


def test_a_folder_is_not_gone_on_with_on_other_inputs(tmp_path):
    teacher, _, x, y = problem(64)
    train = in_batches(x, y)
    rankopt.compress(teacher, "params<=30%", train=train, folder=tmp_path, **QUICK)
    with pytest.raises(CheckpointError, match="calibration"):
        rankopt.compress(
            teacher, "params<=30%", train=train, calibration=[x + 1], folder=tmp_path, **QUICK
        )


def test_a_setting_of_a_stage_to_come_can_be_put_right(tmp_path):
    teacher, _, x, y = problem(64)
    arguments = {"train": in_batches(x, y), "folder": tmp_path, "recover": False}
    with pytest.raises(TypeError, match="finetune=.*epoch"):
        rankopt.compress(teacher, "params<=30%", finetune={"epoch": 1}, **arguments)
    assert not (tmp_path / "work.json").exists()
    broken = {"epochs": 1, "optimizer": lambda parameters: 3}
    with pytest.raises(ValueError, match="optimizer made a int"):
        rankopt.compress(teacher, "params<=30%", finetune=broken, **arguments)
    assert set(json.loads((tmp_path / "work.json").read_text())["stages"]) == {"search", "apply"}
    done = rankopt.compress(teacher, "params<=30%", finetune={"epochs": 1}, **arguments)
    assert [stage.name for stage in done.stages][-2:] == ["finetune", "verify"]
    with pytest.raises(CheckpointError, match="settings"):
        rankopt.compress(teacher, "params<=30%", finetune={"epochs": 2}, **arguments)

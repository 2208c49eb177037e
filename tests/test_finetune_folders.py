"""What belongs to the run in a folder, and what is left there."""

from __future__ import annotations

import multiprocessing
import random
import time
from enum import Enum, IntEnum

import numpy as np
import pytest
import torch
from finetuning import equal, in_batches, problem, snapshot
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import rankopt
from rankopt._utils import locks
from rankopt.errors import CheckpointError, RankoptError, RankoptWarning, TrainingError
from rankopt.training import state

pytest.importorskip("accelerate")


def interrupted_at(epoch):
    """`evaluate` that ends the run once `epoch` epochs are complete, as Ctrl-C would."""
    calls = iter(range(epoch + 1))

    def evaluate(model):
        if next(calls, None) == epoch:
            raise KeyboardInterrupt
        return 0.0

    return evaluate


def test_other_data_or_another_teacher_is_another_run(tmp_path):
    teacher, small, x, y = problem(count=64)
    settings = {"teacher": teacher, "epochs": 1, "folder": tmp_path}
    rankopt.finetune(small, in_batches(x, y), **settings)
    for train in (in_batches(x, (y + 1) % 2), in_batches(x + 1, y), in_batches(x, y) * 2):
        with pytest.raises(CheckpointError, match="made with train"):
            rankopt.finetune(small, train, batches_per_epoch=2, **settings)
    other = problem(count=64)[0]
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(CheckpointError, match="made with teacher"):
        rankopt.finetune(small, in_batches(x, y), **settings | {"teacher": other})


def test_a_finished_run_of_other_weights_says_so(tmp_path):
    _, small, x, y = problem(count=64)
    begun = snapshot(small)
    rankopt.finetune(small, in_batches(x, y), epochs=1, folder=tmp_path)
    ended = snapshot(small)
    small.load_state_dict(begun)
    rankopt.finetune(small, in_batches(x, y), epochs=1, folder=tmp_path)  # the same again
    assert equal(ended, snapshot(small))
    with torch.no_grad():
        next(small.parameters()).add_(1)
    with pytest.warns(RankoptWarning, match="began with other weights"):
        rankopt.finetune(small, in_batches(x, y), epochs=1, folder=tmp_path)


def test_a_run_that_stopped_early_of_other_weights_says_so(tmp_path):
    _, small, x, y = problem(count=64)
    settings = {"epochs": 6, "patience": 2, "folder": tmp_path}
    values = iter([0.5, 0.4, 0.3, 0.2])
    rankopt.finetune(small, in_batches(x, y), evaluate=lambda model: next(values), **settings)
    with torch.no_grad():
        next(small.parameters()).add_(1)
    with pytest.warns(RankoptWarning, match="began with other weights"):
        rankopt.finetune(small, in_batches(x, y), evaluate=lambda model: next(values), **settings)


def check_resumes(loader, folder):
    """An interrupted run ends with the weights of a whole one."""

    def run(name, epochs):
        _, small, x, y = problem(count=64)
        arguments = {"folder": folder / name, "evaluate": interrupted_at(epochs)}
        rankopt.finetune(small, loader(x, y), epochs=3, **arguments)
        return snapshot(small)

    whole = run("whole", 99)
    with pytest.raises(KeyboardInterrupt):
        run("cut", 2)
    assert equal(whole, run("cut", 99))


def test_samplers_with_a_generator_of_their_own_resume(tmp_path):
    def loader(x, y):
        own = torch.Generator().manual_seed(3)
        sampler = WeightedRandomSampler(torch.arange(1.0, 65), 64, generator=own)
        return DataLoader(TensorDataset(x, y), batch_size=16, sampler=sampler)

    check_resumes(loader, tmp_path)


def test_what_a_killed_writer_left_is_removed(tmp_path):
    _, small, x, y = problem(count=64)
    (tmp_path / ".training.pt.ab12cd34").write_bytes(b"half of it")
    (tmp_path / "notes.txt").write_text("mine")
    rankopt.finetune(small, in_batches(x, y), epochs=1, folder=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "notes.txt", "record.jsonl", "training.pt",
    }  # fmt: skip


def test_no_checkpoint_is_named_before_there_is_one(tmp_path):
    _, small, x, y = problem(count=64)
    train = in_batches(x * float("nan"), y)
    with pytest.raises(TrainingError, match="not finite") as error:
        rankopt.finetune(small, train, epochs=1, folder=tmp_path)
    assert "checkpoint" not in str(error.value)


class Fresh(torch.utils.data.Dataset):
    """Samples of a generator of its own, another one in every process."""

    def __init__(self, x, y):
        self.x, self.y, self.drawn = x, y, 0

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        self.drawn += 1
        return self.x[index] + 0.01 * torch.randn(1, generator=self.own()), self.y[index]

    def own(self):
        generator = torch.Generator()
        generator.seed()
        return generator


def test_data_sets_are_told_apart_without_drawing_from_them(tmp_path):
    _, small, x, y = problem(count=64)
    for _ in range(2):  # resumes, though no sample is what it was
        train = DataLoader(Fresh(x, y), batch_size=16)
        rankopt.finetune(small, train, epochs=1, folder=tmp_path)
    assert train.dataset.drawn == 0


class Source(torch.utils.data.Dataset):
    """Samples with noise of a generator of its own, through a transform that holds it."""

    def __init__(self, x, y, kind):
        self.x, self.y = x, y
        self.transforms = [Noise(kind)]

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.x[index] + self.transforms[0](), self.y[index]


class Noise:
    def __init__(self, kind):
        self.draw = {
            "torch": lambda own: 0.1 * torch.randn(1, generator=own),
            "numpy": lambda own: float(own.normal(0, 0.1)),
            "older numpy": lambda own: float(own.normal(0, 0.1)),
            "python": lambda own: own.gauss(0, 0.1),
        }[kind]
        self.own = {
            "torch": torch.Generator().manual_seed(5),
            "numpy": np.random.default_rng(5),
            "older numpy": np.random.RandomState(5),
            "python": random.Random(5),
        }[kind]

    def __call__(self):
        return self.draw(self.own)


class Permuted:
    """A batch sampler with a generator of NumPy's."""

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def __len__(self):
        return 4

    def __iter__(self):
        yield from self.rng.permutation(64).reshape(4, 16).tolist()


@pytest.mark.parametrize("kind", ["torch", "numpy", "older numpy", "python"])
def test_data_sets_and_samplers_with_generators_of_their_own_resume(kind, tmp_path):
    def loader(x, y):
        inner = torch.utils.data.Subset(Source(x, y, kind), range(64))
        return DataLoader(inner, batch_sampler=Permuted())

    check_resumes(loader, tmp_path)


class Counting(torch.nn.Module):
    """Keeps a running mean that no state dict has."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(4), persistent=False)

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.mean(dim=0), 0.1)
        return self.layer(x - self.mean)


def test_buffers_that_no_state_has_resume_and_are_the_best_ones(tmp_path):
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) + 3
    train = in_batches(x, (x[:, 0] > 3).long())

    def run(folder, **settings):
        torch.manual_seed(0)
        model = Counting()
        rankopt.finetune(model, train, epochs=3, folder=folder, **settings)
        return model

    def drifted(calls):
        def evaluate(model):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return float(model.mean.sum())

        return evaluate

    whole = run(tmp_path / "whole", evaluate=drifted(iter(range(99))))
    assert whole.mean.min() > 0
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", evaluate=drifted(iter(range(3))))
    resumed = run(tmp_path / "cut", evaluate=drifted(iter(range(99))))
    assert torch.equal(resumed.mean, whole.mean)
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    kept = run(tmp_path / "first", evaluate=interrupted_at(99))  # no metric is above the first
    assert kept.mean.abs().max() == 0


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(tmp_path):
    _, small, x, y = problem(count=64)
    (tmp_path / "training.pt").mkdir()
    augment = pytest.fail  # called with the first batch
    with pytest.raises(RankoptError, match="it is a folder"):
        rankopt.finetune(small, in_batches(x, y), epochs=1, folder=tmp_path, augment=augment)


def test_a_full_disk_names_the_file_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    _, small, x, y = problem(count=64)
    rankopt.finetune(small, in_batches(x, y), epochs=1, folder=tmp_path / "fine")
    kept = (tmp_path / "fine/training.pt").read_bytes()

    def full(value, path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] unexpected pos")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RankoptError, match=r"cannot write .*training.pt.*is the disk full"):
        state.save_state(tmp_path / "fine", {}, {})
    assert (tmp_path / "fine/training.pt").read_bytes() == kept


def test_streams_without_a_length_train_with_a_folder(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from zip(x, y, strict=True)

    _, small, x, y = problem(count=64)
    train = DataLoader(torch.utils.data.ChainDataset([Stream()]), batch_size=16)
    done = rankopt.finetune(small, train, epochs=1, batches_per_epoch=4, folder=tmp_path)
    assert len(done.history) == 1


def test_a_folder_in_use_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.3)
    _, small, x, y = problem(count=64)
    given = snapshot(small)
    with state.sole(tmp_path), pytest.raises(CheckpointError, match="in use by another run"):
        rankopt.finetune(small, in_batches(x, y), epochs=1, folder=tmp_path)
    assert equal(snapshot(small), given)
    # A worker that was forked meanwhile does not keep it.
    with state.sole(tmp_path):
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        worker.start()
    try:
        rankopt.finetune(small, in_batches(x, y), epochs=1, folder=tmp_path)
    finally:
        worker.kill()
        worker.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["record.jsonl", "training.pt"]


class Kind(Enum):
    A = "a"


class Level(IntEnum):
    LOW = 1


def odd_optimizer(value):
    def make(parameters):
        made = torch.optim.SGD(parameters, lr=0.01)
        made.param_groups[0]["odd"] = value
        return made

    return make


@pytest.mark.parametrize("value", [np.ones(2), Kind.A, np.datetime64("2026-01-01")])
def test_what_cannot_be_read_back_is_refused_before_the_first_epoch(tmp_path, value):
    _, small, x, y = problem(count=64)
    given = snapshot(small)
    settings = {"epochs": 1, "folder": tmp_path, "optimizer": odd_optimizer(value)}
    with pytest.raises(CheckpointError, match="would hold objects .*train without folder="):
        rankopt.finetune(small, in_batches(x, y), **settings)
    assert equal(snapshot(small), given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [Level.LOW, np.float32(2), torch.float16, None])
def test_numbers_of_any_kind_are_read_back(tmp_path, value):
    _, small, x, y = problem(count=64)
    settings = {"epochs": 2, "folder": tmp_path, "optimizer": odd_optimizer(value)}
    with pytest.raises(KeyboardInterrupt):
        rankopt.finetune(small, in_batches(x, y), **settings, evaluate=interrupted_at(2))
    assert len(rankopt.finetune(small, in_batches(x, y), **settings).history) == 2


def test_a_checkpoint_that_cannot_be_read(tmp_path, monkeypatch):
    _, small, x, y = problem(count=64)
    rankopt.finetune(small, in_batches(x, y), epochs=1, folder=tmp_path)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(CheckpointError, match=r"cannot read .*training.pt: Permission denied"):
        rankopt.finetune(small, in_batches(x, y), epochs=1, folder=tmp_path)


class Growing(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x):
        if self.training:
            self.seen = torch.cat([self.seen, torch.ones(1)])
        return self.layer(x)


def test_buffers_that_grow_are_put_back(tmp_path):
    torch.manual_seed(0)
    model = Growing(torch.nn.Linear(8, 2))
    x, y = torch.randn(32, 8), torch.randint(2, (32,))
    values = iter([0.0, 1.0, 0.5])
    data = in_batches(x, y)
    done = rankopt.finetune(model, data, epochs=2, evaluate=lambda _: next(values), folder=tmp_path)
    assert done.best_epoch == 0
    assert len(model.seen) == len(data)

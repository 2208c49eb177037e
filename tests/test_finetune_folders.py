"""What belongs to the run in a folder, and what is left there."""

from __future__ import annotations

import pytest
import torch
from finetuning import equal, in_batches, problem, snapshot
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import rankopt
from rankopt.errors import CheckpointError, RankoptWarning, TrainingError

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


def test_samplers_with_a_generator_of_their_own_resume(tmp_path):
    def run(folder, **settings):
        _, small, x, y = problem(count=64)
        own = torch.Generator().manual_seed(3)
        sampler = WeightedRandomSampler(torch.arange(1.0, 65), 64, generator=own)
        train = DataLoader(TensorDataset(x, y), batch_size=16, sampler=sampler)
        rankopt.finetune(small, train, epochs=3, folder=folder, **settings)
        return snapshot(small)

    whole = run(tmp_path / "whole", evaluate=interrupted_at(99))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", evaluate=interrupted_at(2))
    assert equal(whole, run(tmp_path / "cut", evaluate=interrupted_at(99)))


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

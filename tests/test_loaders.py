"""Loaders of kinds of their own, and workers that outlive an epoch."""

from __future__ import annotations

import copy

import pytest
import torch
from finetuning import equal, problem, snapshot
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

import rankopt

pytest.importorskip("accelerate")


class Doubled(DataLoader):
    """Yields images that its data set does not hold."""

    def __iter__(self):
        for x, y in super().__iter__():
            yield 2 * x, y


class FromOwnIterator(DataLoader):
    """The same one step further down."""

    def _get_iterator(self):
        return iter([(2 * x, y) for x, y in super()._get_iterator()])


@pytest.mark.parametrize("kind", [Doubled, FromOwnIterator])
def test_a_loader_that_iterates_in_a_way_of_its_own(kind):
    _, small, x, y = problem()
    other = copy.deepcopy(small)
    settings = {"epochs": 2, "augment": "none", "progress": False, "learning_rate": 1e-3}
    rankopt.finetune(small, kind(TensorDataset(x, y), batch_size=32), **settings)
    rankopt.finetune(other, DataLoader(TensorDataset(2 * x, y), batch_size=32), **settings)
    assert equal(snapshot(small), snapshot(other))


class Noisy(Dataset):
    """Images that are others each time they are read."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.x[index] + 0.1 * torch.randn(self.x[index].shape), self.y[index]


class Rising:
    """A metric that rises; that of the call `stop` interrupts."""

    def __init__(self, stop=None):
        self.calls, self.stop = 0, stop

    def evaluate(self, model):
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        return float(self.calls)


def test_workers_that_persist_go_on_alike(tmp_path):
    _, small, x, y = problem(96)
    whole, halted = copy.deepcopy(small), copy.deepcopy(small)
    settings = {"epochs": 3, "augment": "none", "progress": False, "learning_rate": 1e-3}

    def loader():
        return DataLoader(
            Noisy(x, y), batch_size=32, shuffle=True, num_workers=1, persistent_workers=True
        )

    rankopt.finetune(whole, loader(), evaluate=Rising().evaluate, **settings)
    # The first call is before training, so the second epoch is lost.
    settings |= {"evaluate": Rising(stop=3).evaluate, "folder": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        rankopt.finetune(halted, loader(), **settings)
    rankopt.finetune(halted, loader(), **settings)
    assert equal(snapshot(whole), snapshot(halted))


class Hard(RandomSampler):
    """Four samples, whatever else there is; it counts the epochs."""

    def __init__(self, source):
        super().__init__(source)
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        return iter([1, 2, 3, 4] * (len(self) // 4))


def test_a_random_sampler_of_a_class_of_its_own():
    _, small, x, y = problem(96)
    other = copy.deepcopy(small)
    data = TensorDataset(x, y)
    settings = {"epochs": 2, "augment": "none", "progress": False, "learning_rate": 1e-3}
    sampler = Hard(data)
    rankopt.finetune(small, DataLoader(data, batch_size=32, sampler=sampler), **settings)
    few = [(x[1:5].repeat(8, 1, 1, 1), y[1:5].repeat(8))] * 3
    rankopt.finetune(other, few, **settings)
    assert equal(snapshot(small), snapshot(other))
    assert sampler.epochs == [0, 1]

"""Batches of other forms than a tensor per argument with a row per sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import rankopt
from rankopt._model.inputs import batches, hold, shared_tensors
from rankopt.errors import CalibrationError
from rankopt.training.samples import Samples

LABELS = torch.randint(4, (32,))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.eval()

    def joined(self, one, other):
        return self.last((self.first(one) + self.second(other)).relu())


class OfDict(Net):
    def forward(self, batch):
        return self.joined(batch["x"], batch["y"])


class OfList(Net):
    def forward(self, pair):
        return self.joined(*pair)


@dataclass(frozen=True)
class Pair:
    x: Tensor
    y: Tensor


class OfDataclass(Net):
    def forward(self, pair):
        return Pair(self.joined(pair.x, pair.y), pair.y)


def rows():
    return torch.randn(32, 16)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(
    ("kind", "make"),
    [
        (OfDict, lambda: {"x": rows(), "y": rows()}),
        (OfList, lambda: [rows(), rows()]),
        (OfDataclass, lambda: Pair(rows(), rows())),
    ],
)
def test_models_of_one_structured_argument(kind, make, labelled):
    model, example = kind(), (make(),)
    data = [(make(), LABELS) if labelled else (make(),) for _ in range(2)]
    plan = rankopt.search(model, "macs<=80%", example_inputs=example, calibration=data)
    small = rankopt.apply(model, plan, calibration=data)
    assert rankopt.recover(small, teacher=model, calibration=data, steps=2).steps == 2
    if labelled and kind is not OfDataclass:
        rankopt.finetune(small, data, teacher=model, epochs=1)
    assert rankopt.compare(model, small, example_inputs=example, rounds=3).output_error > 0


def test_a_dict_without_its_tuple_is_told_how_to_pass_it():
    data = [{"x": rows(), "y": rows()}]
    with pytest.raises(CalibrationError, match=r"or \[\(b,\) for b in loader\] if it is one"):
        rankopt.search(OfDict(), "params<=80%", calibration=data)


def test_pairs_for_arguments_by_keyword_only():
    class ByName(Net):
        def forward(self, *, x):
            return self.joined(x, x)

    with pytest.raises(CalibrationError, match=r"by keyword only: map it, such as \[\{'x': b\[0\]"):
        rankopt.search(ByName(), "params<=80%", calibration=[(rows(), LABELS)])


class Graph(Net):
    def forward(self, x, edges):
        source, target = edges
        return self.joined(x, torch.zeros_like(x).index_add(0, target, x[source]))


class Images(Net):
    """As detectors: a list of images, each of any size."""

    def forward(self, images, targets=None):
        features = torch.stack([x.mean((1, 2)).repeat(16 // len(x)) for x in images])
        return self.joined(features, features)


class OfEight(Net):
    def forward(self, x):
        assert len(x) == 8, "batches of 8 only"
        return self.joined(x, x)


EDGES = torch.tensor([[0, 3, 6], [1, 4, 7]])


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        (Graph, lambda: (torch.randn(8, 16), EDGES)),
        (Images, lambda: ([torch.randn(4, 6, 6), torch.randn(4, 5, 7)],)),
        (OfEight, lambda: torch.randn(8, 16)),
    ],
)
def test_batches_that_cannot_be_taken_apart_stay_whole(kind, make):
    model, data = kind(), [make() for _ in range(4)]
    held = hold(model, data)
    samples = Samples(held, shared_tensors(model, held))
    assert samples.count == 4
    plan = rankopt.search(model, "params<=80%", calibration=data)
    small = rankopt.apply(model, plan, calibration=data)
    assert rankopt.recover(small, teacher=model, calibration=data, steps=2).steps == 2
    rankopt.search(model, "params<=80%", strategy="relaxed", calibration=data)


def test_what_is_equal_in_all_batches_is_not_cut_with_the_samples():
    class Positions(Net):
        def forward(self, x, matrix):  # [samples, 8, 16], [8, 8]
            assert matrix.shape == (8, 8), "the matrix is between all positions"
            return self.joined(x, matrix @ x)

    model, matrix = Positions(), torch.randn(8, 8)
    held = hold(model, [(torch.randn(8, 8, 16), matrix.clone()) for _ in range(3)])
    shared = shared_tensors(model, held)
    assert shared == {id(entries[1]) for entries in held}
    samples = Samples(held, shared)
    assert samples.count == 24
    for x, given in samples.batches(torch.arange(24), 5):
        assert x.shape[1:] == (8, 16)
        assert torch.equal(given, matrix)


def test_masks_of_ones_belong_to_samples():
    class Masked(Net):
        def forward(self, x, mask):
            return self.joined(x * mask[..., None], x)

    model = Masked()
    held = hold(model, [(torch.randn(8, 5, 16), torch.ones(8, 5)) for _ in range(2)])
    assert not shared_tensors(model, held)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Embedding(20, 16), nn.Linear(16, 16)

    def forward(self, input_ids, attention_mask=None):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.fc(self.embed(input_ids)) * mask[..., None]


def test_masks_of_tokens_are_no_labels():
    ids, mask = torch.randint(0, 20, (6, 5)), torch.randint(0, 2, (6, 5))
    ((inputs, _),) = batches(Encoder(), [(ids, mask)], max_samples=None)
    assert inputs[1] is mask


@dataclass
class Record:
    x: Tensor
    scale: Tensor


class Named(NamedTuple):
    x: Tensor
    scale: Tensor


@pytest.mark.parametrize("kind", [Record, Named])
def test_samples_of_records_are_taken_one_by_one(kind):
    rows, scale = torch.arange(24.0)[:, None], torch.ones(3)
    samples = Samples([kind(part, scale) for part in rows.split(8)])
    train, held = samples.split(0.25)
    assert samples.count == 24
    found = [list(samples.batches(index, 4)) for index in (train, held)]
    assert all(type(batch) is kind for part in found for batch in part)
    taken, kept = (torch.cat([batch.x for batch in part]).flatten().tolist() for part in found)
    assert not set(taken) & set(kept)
    assert sorted(taken + kept) == rows.flatten().tolist()
    assert found[0][0].scale is scale

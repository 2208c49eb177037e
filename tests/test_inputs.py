"""Calibration and example inputs as users give them, and as models treat them."""

from __future__ import annotations

import math
from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import rankopt
from rankopt._model import inputs, measure
from rankopt._model.inputs import divergence, divergence_loss
from rankopt.errors import CalibrationError
from rankopt.training.batches import task_loss


class Normalising(nn.Module):
    """Writes into its input, or does not."""

    def __init__(self, *, writes):
        super().__init__()
        self.writes = writes
        self.layers = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, x):
        x = x.sub_(0.5).div_(0.25) if self.writes else (x - 0.5) / 0.25
        return self.layers(x)


@pytest.mark.parametrize("settings", [{"fisher": True}, {"asymmetric": True}], ids=str)
def test_a_forward_that_writes_into_its_input_changes_nothing(settings):
    models = [Normalising(writes=writes).eval() for writes in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    data, example = [torch.rand(64, 32) for _ in range(3)], torch.rand(2, 32)
    given, x = [x.clone() for x in (*data, example)], torch.rand(8, 32)
    outputs = []
    for model in models:
        plan = rankopt.search(
            model, "params<=60%", example_inputs=example, calibration=data, **settings
        )
        small = rankopt.apply(model, plan, calibration=data)
        outputs.append(small(x.clone()))
        nearness = rankopt.Agreement(model, data)
        for _ in range(2):
            found = rankopt.compare(
                model, small, example_inputs=example, evaluate=nearness, rounds=3
            )
            assert found.metric.before == 0
        rankopt.recover(small, teacher=model, calibration=data, steps=1)
        assert all(torch.equal(x, y) for x, y in zip((*data, example), given, strict=True))
    assert torch.equal(*outputs)


class Masked(nn.Sequential):
    """Logits of classes that are left out are -inf."""

    def forward(self, x):
        return super().forward(x).index_fill(-1, torch.tensor([3, 5]), -torch.inf)


def test_masked_classes_count_for_nothing(monkeypatch):
    old, new = torch.randn(40, 8), torch.randn(40, 8, requires_grad=True)
    kept = torch.tensor([0, 1, 2, 4, 6, 7])
    masked = [x.index_fill(-1, torch.tensor([3, 5]), -torch.inf) for x in (old, new)]
    for wrap in (dict, lambda logits: logits[None]):  # class scores, and other outputs
        exact = divergence(wrap(logits=old[:, kept]), wrap(logits=new[:, kept]))
        monkeypatch.setattr(inputs, "PIECE", 7)  # and in pieces
        loss = divergence_loss(*(wrap(logits=x) for x in masked))
        monkeypatch.undo()
        assert loss.item() == pytest.approx(exact, rel=1e-9)
        (slope,) = torch.autograd.grad(loss, new, retain_graph=True)
        assert slope.isfinite().all()
        assert slope.any()
    with pytest.raises(CalibrationError, match="outputs that are not finite"):
        divergence(torch.full((2, 3), torch.nan), torch.zeros(2, 3))


def test_models_with_masked_classes():
    model = Masked(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8)).eval()
    data = [torch.randn(64, 32) for _ in range(2)]
    plan = rankopt.search(model, "params<=70%", calibration=data, fisher=True)
    small = rankopt.apply(model, plan, calibration=data)
    found = rankopt.compare(model, small, example_inputs=data[0], rounds=3)
    assert 0 < found.output_error < 1
    done = rankopt.recover(small, teacher=model, calibration=data, steps=5)
    assert done.steps
    assert math.isfinite(done.after)


class Failing(nn.Linear):
    def forward(self, x):
        raise AssertionError("wrong image height")


def test_failures_of_the_model_are_told_with_the_batch():
    with pytest.raises(CalibrationError, match=r"batch of \[2, 4\].*: wrong image height"):
        inputs.run(Failing(4, 4), torch.ones(2, 4))


@pytest.mark.parametrize("samples", [0, -3])
def test_less_than_one_sample(samples):
    model, data = nn.Linear(4, 4), [torch.ones(8, 4)]
    with pytest.raises(
        ValueError, match=f"^calibration_samples={samples}: expected an integer of at least 1"
    ):
        inputs.hold(model, data, max_samples=samples)


def test_forms_that_batches_may_take():
    point = namedtuple("point", "x y")(torch.ones(2, 3), torch.zeros(2, 0))
    ((held,),) = inputs.hold(nn.Linear(3, 3), [(point, torch.ones(2, 3))], labelled=True)
    assert type(held) is type(point)
    assert inputs.digest([held]) != inputs.digest([point.x + 1])

    def refilled():
        buffer = torch.empty(4, 3)
        for value in range(3):
            yield buffer.fill_(value)

    means = [float(x.mean()) for x in inputs.hold(nn.Linear(3, 3), refilled())]
    assert means == [0, 1, 2]


def test_copies_keep_what_comes_twice_and_the_type_of_mappings():
    class Batch(UserDict):  # as Hugging Face's BatchEncoding
        def __getattr__(self, name):
            return self.data[name]

    x = torch.randn(2, 3)
    one, (two, batch) = measure.copied((x, [x, Batch(ids=x)]))
    assert one is two is batch.ids
    assert one is not x
    assert torch.equal(one, x)


class Graph(nn.Module):
    """A graph network: its adjacency is sparse, and a buffer or an input."""

    def __init__(self, layout=None):
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
        if layout is not None:
            self.register_buffer("adjacency", torch.eye(6).to_sparse(layout=layout))

    def forward(self, x, adjacency=None):
        adjacency = self.adjacency if adjacency is None else adjacency
        return self.b((adjacency @ self.a(x)).relu())


def test_sparse_inputs_are_never_cut():
    model, given = Graph(), (torch.randn(6, 32), torch.eye(6).to_sparse())
    plan = rankopt.search(
        model, "macs<=80%", example_inputs=given, calibration=[given], calibration_samples=4
    )
    assert plan.changes
    assert rankopt.apply(model, plan, calibration=[given])(*given).shape == (6, 32)


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_sparse_buffers(layout):
    model, x = Graph(layout), torch.randn(6, 32)
    plan = rankopt.search(
        model,
        "metric_drop<=100, minimize=macs",
        example_inputs=x,
        evaluate=lambda m: float(m(x).abs().mean()),
    )
    assert plan.changes
    small = rankopt.apply(model, plan)
    assert small(x).shape == (6, 32)
    assert small.adjacency is not model.adjacency


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta")
def test_digests_tell_sparse_tensors_apart():
    values = torch.tensor([[1.0, 0, 2], [0, 0, 3]])
    for layout in (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc):
        one, other = (t.to_sparse(layout=layout) for t in (values, values.flip(1)))
        assert measure.tensor_digest(one) != measure.tensor_digest(other)
        assert inputs.digest([one]) != inputs.digest([other])
        assert inputs.digest([one]) == inputs.digest([one.clone()])


Named = namedtuple("Named", "hidden logits")


@dataclass
class Output:
    hidden: torch.Tensor
    logits: torch.Tensor


@pytest.mark.parametrize("kind", [lambda h, y: {"hidden": h, "logits": y}, Named, Output])
def test_outputs_with_logits_by_name(kind):
    hidden, logits = torch.randn(8, 64), torch.randn(8, 10)
    output = kind(hidden, logits)
    assert inputs.compared(output) is logits
    assert inputs.main_output(output)["logits"] is logits
    labels = torch.zeros(8, dtype=torch.long)
    assert task_loss(output, labels) == nn.functional.cross_entropy(logits, labels)
    sequences = kind(hidden, torch.randn(8, 5, 10))
    assert inputs.scores_classes(sequences)


def test_tuples_and_missing_logits():
    hidden, logits = torch.randn(8, 64), torch.randn(8, 10)
    assert inputs.compared((hidden, logits)) is hidden
    assert inputs.compared(Output(hidden, None)) is hidden
    assert inputs.entry(Output, "hidden") is None

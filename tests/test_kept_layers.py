"""Layers that a model reads, holds or calls in ways that no chain can stand in for."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import rankopt

X = torch.randn(4, 32)


class Reader(nn.Module):
    """Reads a child's weight from outside the child's forward."""

    def __init__(self):
        super().__init__()
        self.read, self.called, self.idle = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.shape = nn.Linear(32, 32)

    def forward(self, x):
        x = torch.nn.functional.linear(x, self.read.weight, self.read.bias)
        return self.called(x) + self.shape(x) / self.shape.out_features


@pytest.mark.parametrize("inputs", [None, torch.randn(2, 32)], ids=["source", "probe"])
def test_weights_read_from_outside_are_kept(inputs):
    plan = rankopt.search(Reader(), "params<=80%", example_inputs=inputs)
    how = "read by Reader" if inputs is None else "read outside its own forward, by Reader.forward"
    assert f"keep: its weight is {how}" in plan["read"].reason
    assert plan["read"].keeps
    assert plan["shape"].keeps
    assert "out_features" in plan["shape"].reason
    assert not plan["called"].keeps
    if inputs is not None:
        assert plan["idle"].reason == "keep: example_inputs never reach it"


class Properties(nn.Module):
    """Reads behind a property, a static method, and a method named like one that sets up."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(32, 32) for _ in "abc")
        self.free = nn.Linear(32, 32)

    @property
    def dtype(self):
        return self.a.weight.dtype

    @staticmethod
    def called(module, x):
        return nn.functional.linear(x, module.b.weight)

    def init_hidden(self, x):
        return x.new_zeros(len(x), self.c.out_features)

    def forward(self, x):
        hidden = self.init_hidden(x)
        return self.free(self.c(Properties.called(self, self.a(x.to(self.dtype)))) + hidden)


@pytest.mark.parametrize("how", [{}, {"example_inputs": X}, {"calibration": [X]}])
def test_reads_that_methods_and_properties_hide(how):
    plan = rankopt.search(Properties(), "params<=95%", **how)
    assert {d.targets[0] for d in plan.changes} == {"free"}


class Around(nn.Module):
    """Calls `listed` and `held` around the module tree and asks for the class of `typed`."""

    def __init__(self):
        super().__init__()
        self.listed, self.bound, self.held, self.typed, self.free = (
            nn.Linear(32, 32) for _ in range(5)
        )
        self.order = [self.listed, {"bound": self.bound.forward}]
        self.object = SimpleNamespace(layer=self.held)

    def forward(self, x):
        x = self.object.layer(self.order[1]["bound"](self.order[0](x)))
        x = self.typed(self.free(x))
        return x.relu() if isinstance(self.typed, nn.Linear) else x


@pytest.mark.parametrize("how", ["example_inputs", "calibration"])
def test_layers_no_chain_can_stand_in_for_are_kept(how):
    inputs = X if how == "example_inputs" else [X]
    plan = rankopt.search(Around(), "params<=95%", **{how: inputs})
    assert {d.targets[0] for d in plan.changes} == {"free"}
    for name in ("listed", "held"):
        assert "called outside the module tree" in plan[name].reason
    assert plan["bound"].keeps
    assert "depend on its class or attributes" in plan["typed"].reason
    by_source = rankopt.search(Around(), "params<=95%")
    assert "Around.order holds it too" in by_source["listed"].reason
    assert "Around.order holds it too" in by_source["bound"].reason


def test_layers_that_a_list_only_records_are_free_where_a_run_tells():
    class Recorded(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 32)
            self.record = [self.one, self.two]

        def forward(self, x):
            return self.two(self.one(x).relu())

    model = Recorded()
    plan = rankopt.search(model, "params<=80%", example_inputs=X)
    assert {d.targets[0] for d in plan.changes} <= {"one", "two"}
    assert rankopt.compare(model, rankopt.apply(model, plan)).params.ratio <= 0.8


@pytest.mark.parametrize(
    "change", [torch.Tensor.to_sparse, lambda x: torch.nested.nested_tensor([*x])]
)
def test_outputs_that_cannot_be_compared_refuse_no_layer(change):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x):
            return change(self.fc(x))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        assert rankopt.search(Odd(), "params<=80%", example_inputs=X).changes


def test_outputs_that_differ_from_run_to_run_refuse_no_layer():
    class Counting(nn.Module):
        count = 0

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x):
            Counting.count += 1
            return self.fc(x) + Counting.count

    assert rankopt.search(Counting(), "params<=80%", example_inputs=X).changes


def test_attention_whose_packed_weight_is_read():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(32, 4, batch_first=True)
            self.fc = nn.Linear(32, 32)

        def forward(self, x):
            x = x.to(self.attn.in_proj_weight.dtype)
            return self.fc(self.attn(x, x, x, need_weights=False)[0])

    model, x = Reads().eval(), torch.randn(2, 5, 32)
    for inputs in (x, None):
        plan = rankopt.search(model, "params<=90%", example_inputs=inputs)
        assert "in_proj_weight" in plan["attn.in_proj"].reason
        assert rankopt.apply(model, plan)(x).shape == x.shape

"""Layers of classes of one's own, and with attributes of their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankopt
from rankopt.errors import ModelError


class Orthogonal(nn.Linear):
    """Only its construction differs."""

    def __init__(self, width):
        super().__init__(width, width)
        nn.init.orthogonal_(self.weight)

    @staticmethod
    def gain():
        return 1.0


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Helpful(nn.Linear):
    def helper(self):
        return self.weight.sum()


class Flagged(nn.Linear):
    scale = 2.0


def test_subclasses_that_only_build_a_layer_are_decomposed(tmp_path):
    model, x = nn.Sequential(Orthogonal(48), nn.ReLU(), Orthogonal(48)).eval(), torch.randn(2, 48)
    plan = rankopt.search(model, "params<=60%", strategy="parameter_ratio")
    assert [decision.method for decision in plan] == ["svd", "svd"]
    small = rankopt.apply(model, plan)
    rankopt.save(small, tmp_path / "s.safetensors")
    assert torch.equal(rankopt.load(model, tmp_path / "s.safetensors")(x), small(x))
    assert type(rankopt.fold(small, model)[0]) is Orthogonal


@pytest.mark.parametrize("cls", [Doubled, Helpful, Flagged])
def test_subclasses_that_do_more_are_kept(cls):
    model = nn.Sequential(cls(32, 32), nn.Linear(32, 32))
    plan = rankopt.search(model, "params<=80%")
    assert plan["0"].reason == f"keep: {cls.__name__} is a subclass of Linear that may do more"


class Scaled(nn.Module):
    def __init__(self, *, reads):
        super().__init__()
        self.a, self.b, self.reads = nn.Linear(32, 32), nn.Linear(32, 32), reads
        self.a.gain = 0.5

    def forward(self, x):
        return self.b(self.a(x) * (self.a.gain if self.reads else 1))


@pytest.mark.parametrize("reads", [False, True])
def test_attributes_set_on_a_layer(reads):
    model, x = Scaled(reads=reads).eval(), torch.randn(4, 32)
    by_source = rankopt.search(model, "params<=90%")
    assert by_source["a"].reason.startswith("keep: its attribute gain may be read")
    shown = rankopt.search(model, "params<=90%", example_inputs=x, strategy="parameter_ratio")
    assert shown["a"].keeps is reads
    for plan in (by_source, shown):
        assert rankopt.apply(model, plan)(x).shape == x.shape


def test_what_is_registered_on_a_layer_is_not_lost():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[0].register_buffer("scale", torch.ones(1))
    plan = rankopt.search(model, "params<=80%")
    assert plan["0"].reason == "keep: it holds scale beside its weight and bias"


class Idle(nn.Module):
    """A head that only training uses, and one for inputs that are large."""

    def __init__(self):
        super().__init__()
        self.body, self.aux, self.rare = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        x = self.rare(x) if x.max() > 50 else x
        return self.body(x)


def test_layers_that_calibration_never_reaches_are_kept():
    model, data = Idle().eval(), [torch.randn(8, 32), 100 * torch.ones(8, 32)]
    plan = rankopt.search(model, "params<=90%", calibration=data, strategy="parameter_ratio")
    assert plan["aux"].reason == "keep: calibration inputs never reach it"
    assert not plan["rare"].keeps
    model.forward = lambda x: x
    with pytest.raises(ModelError, match="no layer to decompose .*calibration inputs never reach"):
        rankopt.search(model, "params<=90%", calibration=data)

"""Models whose attributes lead back to their layers and weights: a copy uses its own."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from torch import nn

import rankopt
from rankopt._model import surgery
from rankopt.errors import ModelError


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


def timed(function):
    @functools.wraps(function)
    def call(*args):
        return function(*args)

    return call


class Counted:
    """A wrapper that is no function."""

    def __init__(self, function):
        self.function, self.calls = timed(function), 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


def wrapped(where, wrap):
    model = nn.Sequential(Block(), Block(), nn.Linear(32, 10)).eval()
    for module in {"child": model[:2], "root": [model]}[where]:
        module.forward = wrap(module.forward)
    return model


@pytest.mark.parametrize(
    "wrap", [timed, Counted, functools.lru_cache, lambda f: functools.partial(timed(f))]
)
@pytest.mark.parametrize("where", ["child", "root"])
def test_a_wrapped_forward_runs_the_layers_of_the_copy(where, wrap, tmp_path):
    model, x = wrapped(where, wrap), torch.randn(4, 32)
    small = rankopt.apply(model, rankopt.search(model, "params<=50%"))
    found = rankopt.compare(model, small, example_inputs=x, rounds=3)
    assert found.macs.ratio < 0.6
    assert found.output_error > 0
    rankopt.save(small, tmp_path / "s.safetensors")
    again = rankopt.load(wrapped(where, wrap), tmp_path / "s.safetensors")
    assert torch.equal(again(x), small(x))


def test_functions_that_share_a_cell_and_call_themselves():
    model = Block()

    def halving(x, times=2):
        return model.up(x) if not times else halving(x / 2, times - 1)

    model.tools = {"halving": halving, "same": [halving]}
    copied = surgery.clone(model)
    assert copied.tools["halving"] is copied.tools["same"][0]
    nn.init.zeros_(copied.up.weight)
    nn.init.zeros_(copied.up.bias)
    x = torch.randn(2, 32)
    assert not copied.tools["halving"](x).any()
    assert model.tools["halving"](x).any()


def test_what_leads_nowhere_stays_the_users_own():
    """A hook that records into a list of the user's goes on doing so."""
    model, seen = Block(), []
    model.up.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    surgery.clone(model)(torch.zeros(3, 32))
    assert seen == [3]


def test_hooks_that_close_over_a_module():
    model = Block()
    model.down.register_forward_hook(lambda module, args, output: model.up(output))
    copied = surgery.clone(model)
    nn.init.zeros_(copied.up.weight)
    nn.init.zeros_(copied.up.bias)
    x = torch.randn(2, 32)
    assert torch.equal(copied.down(copied.up(x)), torch.zeros(2, 64))


def test_a_layer_that_a_function_holds_is_kept():
    model = nn.Sequential(Block())
    layer = model[0].up
    model[0].first = lambda x: layer(x)
    plan = rankopt.search(model, "params<=90%")
    assert plan["0.up"].reason == "keep: Block.first holds it too, outside the module tree"


class Child(nn.Module):
    def __init__(self, parent):
        super().__init__()
        self.parent, self.own = weakref.ref(parent), nn.Linear(32, 32)

    def forward(self, x):
        return self.parent().shared(self.own(x))


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(32, 32)
        self.child = Child(self)

    def forward(self, x):
        return self.child(x)


def test_weak_references_lead_to_the_copy(tmp_path):
    model, x = Parent().eval(), torch.randn(4, 32)
    small = rankopt.apply(model, rankopt.search(model, "params<=80%"))
    assert small.child.parent() is small
    rankopt.save(small, tmp_path / "s.safetensors")
    again = rankopt.load(Parent().eval(), tmp_path / "s.safetensors")
    del model
    gc.collect()
    assert torch.equal(again(x), small(x))


MODEL = Block()


def test_a_function_that_finds_the_model_by_a_global_name(monkeypatch):
    monkeypatch.setattr(MODEL, "first", lambda x: MODEL.up(x), raising=False)
    with pytest.raises(ModelError, match="first is a function that would go on using the original"):
        rankopt.search(MODEL, "params<=50%")


class Listed(nn.Module):
    """Parameters and buffers also held in plain containers, which is how it reaches them."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(32, 32) / 6)
        self.a, self.o = nn.Linear(32, 32), nn.Linear(32, 10)
        self.register_buffer("scale", torch.rand(32))
        self.held = {"w": [self.w], "scale": self.scale}

    def forward(self, x):
        return self.o(self.a((x @ self.held["w"][0] * self.held["scale"]).relu()))


def test_parameters_in_plain_containers_follow(tmp_path):
    model, x = Listed().eval(), torch.randn(64, 32)
    small = rankopt.apply(model, rankopt.search(model, "params<=90%", example_inputs=x))
    assert small.held["w"][0] is small.w is not model.w
    rankopt.recover(small, teacher=model, calibration=[x], steps=2)
    assert model.w.grad is None
    rankopt.save(small, tmp_path / "s.safetensors")
    again = rankopt.load(Listed().eval(), tmp_path / "s.safetensors")
    assert again.held["w"][0] is again.w
    assert torch.equal(again(x), small(x))

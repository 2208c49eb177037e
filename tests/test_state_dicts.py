"""Saving models whose state dicts are not simply their parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rankopt
from rankopt.errors import CheckpointError


@pytest.mark.parametrize("norm", ["spectral_norm", "weight_norm", "orthogonal"])
def test_parametrised_layers_are_kept_and_loaded(norm, tmp_path):
    def make():
        wrap = getattr(nn.utils.parametrizations, norm)
        attention = nn.MultiheadAttention(32, 4)
        wrap(attention.out_proj)
        return nn.ModuleList([nn.Linear(32, 64), wrap(nn.Linear(32, 32)), attention])

    model = make().train()
    before = copy.deepcopy(model.state_dict())
    plan = rankopt.search(model, "params<=90%")
    assert plan["1"].shapes == ((32, 32),)
    small = rankopt.apply(model, plan)
    # In train mode spectral norm moves its estimate on whenever the weight is evaluated.
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    rankopt.save(small, tmp_path / "s.safetensors")
    again = rankopt.load(make(), tmp_path / "s.safetensors").eval()
    assert torch.equal(again[1].weight, small.eval()[1].weight)


class Partial(nn.Module):
    """Its state dict leaves a part out and renames another."""

    def __init__(self, change):
        super().__init__()
        self.frozen, self.h = nn.Linear(32, 32), nn.Linear(32, 32)
        self.register_state_dict_post_hook(change)

    def forward(self, x):
        return self.h(self.frozen(x).relu())


def without_frozen(module, state, prefix, _):
    for key in [key for key in state if key.startswith(f"{prefix}frozen")]:
        del state[key]


def renamed(module, state, prefix, _):
    for key in [key for key in state if key.startswith(f"{prefix}frozen")]:
        state[key.replace("frozen", "base.frozen")] = state.pop(key)


def halved(module, state, prefix, _):
    state[f"{prefix}frozen.bias"] = state[f"{prefix}frozen.bias"] / 2


@pytest.mark.parametrize("change", [without_frozen, renamed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dicts_that_hooks_change(change, dtype, tmp_path):
    model, x = Partial(change).eval(), torch.randn(4, 32, dtype=dtype)
    small = rankopt.apply(model, rankopt.search(model, "params<=80%", ignore="frozen")).to(dtype)
    rankopt.save(small, tmp_path / "s.safetensors")
    assert torch.equal(rankopt.load(model, tmp_path / "s.safetensors")(x), small(x))
    if change is without_frozen:
        with pytest.raises(CheckpointError, match=r"frozen.weight is on the meta device and not"):
            rankopt.load(model.to("meta"), tmp_path / "s.safetensors")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (without_frozen, r"frozen\.\w+\.weight is a factor that the state dict of this Partial"),
        (halved, r"frozen\.bias in the state dict is no parameter or buffer"),
    ],
)
def test_state_dicts_that_cannot_be_saved(change, match, tmp_path):
    model = Partial(change)
    only = "frozen" if change is without_frozen else "h"
    plan = rankopt.search(model, "params<=80%", only=only)
    with pytest.raises(CheckpointError, match=match):
        rankopt.save(rankopt.apply(model, plan), tmp_path / "s.safetensors")

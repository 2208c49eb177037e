"""The `vbmf` strategy and the ranks it rests on."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rankopt
from rankopt.errors import BudgetInfeasible
from rankopt.testing import planted_model
from rankopt_strategies import VBMF
from rankopt_strategies.vbmf import evbmf_rank


@settings(max_examples=30, deadline=None)
@given(st.integers(30, 80), st.integers(30, 120), st.integers(1, 6), st.integers(0, 10**6))
def test_evbmf_finds_planted_ranks(rows, columns, rank, seed):
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.normal(size=(rows, rank)))[0]
    right = np.linalg.qr(rng.normal(size=(columns, rank)))[0]
    # Every component well above the noise's edge, √rows + √columns.
    signal = left * (4 * (np.sqrt(rows) + np.sqrt(columns))) @ right.T
    matrix = signal + rng.normal(size=(rows, columns))
    assert evbmf_rank(matrix) == rank
    assert evbmf_rank(matrix.T) == rank
    assert evbmf_rank(1e-8 * matrix) == rank


def test_evbmf_edges():
    rng = np.random.default_rng(0)
    assert evbmf_rank(rng.normal(size=(40, 60))) <= 1
    assert evbmf_rank(np.zeros((4, 5))) == 0
    exact = rng.normal(size=(30, 3)) @ rng.normal(size=(3, 50))
    assert evbmf_rank(exact) == 3
    assert evbmf_rank(np.ones((3, 7))) == 1
    assert evbmf_rank(np.ones((1, 1))) == 0  # no telling signal from noise
    for bad, match in (
        (np.ones(3), r"shape \(3,\)"),
        (np.ones((0, 3)), "non-empty"),
        ([[np.nan, 1.0]], "finite"),
    ):
        with pytest.raises(ValueError, match=match):
            evbmf_rank(bad)


def noisy(rows, columns, rank=5, seed=0):
    rng = np.random.default_rng(seed)
    signal = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, columns))
    return signal + 0.3 * rng.normal(size=(rows, columns))


@pytest.mark.parametrize("scale", [0.0, 1e-8, 1e-3])
@pytest.mark.parametrize("dead", [4, 8, 16, 32])
def test_evbmf_leaves_dead_rows_and_columns_out(dead, scale):
    matrix = noisy(64, 576)
    matrix[:dead] *= scale
    assert evbmf_rank(matrix) == evbmf_rank(matrix.T) == 5
    matrix[:, : 9 * dead] *= scale
    assert evbmf_rank(matrix) == 5


def test_vbmf_finds_the_signal_among_dead_filters():
    conv = nn.Conv2d(64, 64, 3)
    linear = nn.Linear(576, 64)
    ranks = {}
    for dead in (0, 16):
        with torch.no_grad():
            conv.weight.copy_(torch.from_numpy(noisy(64, 576)).unflatten(1, (64, 3, 3)))
            linear.weight.copy_(torch.from_numpy(noisy(64, 576, seed=1)))
            conv.weight[:dead] = linear.weight[:dead] = 0
        plan = rankopt.search(nn.Sequential(conv, linear), None, strategy=VBMF(1.0))
        ranks[dead] = plan["0"].ranks[1], plan["1"].ranks
    assert ranks[16] == ranks[0] == (5, (5,))


def test_vbmf_leaves_dead_channels_of_a_group_to_that_group():
    conv = nn.Conv2d(128, 64, 3, groups=2)  # [64, 64, 3, 3]
    with torch.no_grad():
        halves = [torch.from_numpy(noisy(32, 576, seed=seed)) for seed in (2, 3)]
        conv.weight.copy_(torch.cat(halves).unflatten(1, (64, 3, 3)))
        conv.weight[:12] = 0
    plan = rankopt.search(nn.Sequential(conv), None, strategy=VBMF(1.0))
    assert plan["0"].ranks[1] == 5


def test_vbmf_lets_errors_of_torch_through(monkeypatch):
    def broken(*_):
        raise NotImplementedError("no kernel of this name on this device")

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    with pytest.raises(NotImplementedError, match="no kernel of this name"):
        rankopt.search(nn.Sequential(nn.Linear(37, 41)), None, strategy="vbmf")


def test_evbmf_against_a_brute_force_minimum():
    """The noise variance the rank rests on is the global minimum of the free energy."""
    from rankopt_strategies.vbmf import _free_energy

    rng = np.random.default_rng(3)
    small, large = 24, 40
    matrix = rng.normal(size=(small, 5)) @ rng.normal(size=(5, large)) + rng.normal(
        size=(small, large)
    )
    matrix /= np.sqrt((matrix**2).mean())
    squared = np.linalg.svd(matrix, compute_uv=False) ** 2
    aspect = small / large
    tau = 2.5129 * np.sqrt(aspect)
    x_bar = (1 + tau) * (1 + aspect / tau)
    grid = np.exp(np.linspace(np.log(1e-4), 0, 20001))
    energies = [_free_energy(v, squared, large, aspect, x_bar) for v in grid]
    variance = grid[int(np.argmin(energies))]
    assert evbmf_rank(matrix) == int((squared > large * variance * x_bar).sum())


def test_vbmf_explains_what_it_leaves():
    model = planted_model()
    with torch.no_grad():
        model.hidden.weight.normal_()
    plan = rankopt.search(model, None, strategy="vbmf")
    assert "no component above the noise" in plan["hidden"].reason
    # Four components were planted in the output mode: 32 - 0.8 * (32 - 4), rounded down.
    assert re.fullmatch(r"VBMF rank \d+ x 4, weakening 0.8", plan["conv"].reason)
    assert plan["conv"].ranks[1] == 9
    forced = rankopt.search(model, None, strategy=VBMF(noise="compress"))
    assert not forced["hidden"].keeps


def test_vbmf_on_pure_noise_names_the_way_out():
    model = nn.Sequential(nn.Linear(32, 32))
    with torch.no_grad():
        model[0].weight.normal_()
    with pytest.raises(
        BudgetInfeasible,
        match=r"smallest reachable is params 100.00%.*reason: EVBMF finds .*noise='compress'",
    ):
        rankopt.search(model, "params<=50%", strategy="vbmf")
    plan = rankopt.search(model, "params<=50%", strategy=VBMF(noise="compress"))
    assert plan.changes


def test_vbmf_leaves_methods_without_unfoldings():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3), torch.nn.Conv2d(32, 32, 1))
    plan = rankopt.search(model, None, strategy=VBMF(noise="compress"), methods=("cp", "svd"))
    assert plan["0"].reason == "keep: vbmf finds no ranks of cp: allow svd or tucker2"
    assert plan["1"].method == "svd"

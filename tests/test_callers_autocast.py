"""Whoever calls under `torch.autocast` gets the factors of the weights' own precision."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

import rankopt
from rankopt._model.layers import find_layers
from rankopt.plan import Factors, RankPlan
from rankopt.registry import decompositions

# Float32 rounding through two products; bfloat16 leaves 4e-3.
ROUNDING = 2e-5


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 1),
    ).eval()


def distance(one, other, x):
    return float((one(x) - other(x)).detach().norm() / one(x).detach().norm())


def at_full_rank(model, plan):
    layers = {layer.name: layer for layer in find_layers(model)}
    decisions = []
    for decision in plan.changes:
        axes = decompositions.create(decision.method).rank_axes(layers[decision.targets[0]])
        args = {**decision.args, "ranks": [axis.maximum for axis in axes]}
        decisions.append(type(decision)(**{**vars(decision), "args": args, "factors": Factors()}))
    return RankPlan(model={}, decisions=tuple(decisions))


@pytest.mark.parametrize("method", ["svd", "tucker2", "spatial_svd", "tt"])
def test_full_rank_reproduces_the_weights(method):
    model, x = convolutions(), torch.randn(4, 3, 8, 8)
    plan = at_full_rank(model, rankopt.search(model, "params<=90%", methods=method))
    with autocast():
        small = rankopt.apply(model, plan)
        dense = rankopt.fold(small, model)
    assert distance(model, small, x) < ROUNDING
    assert distance(model, dense, x) < ROUNDING


@pytest.mark.parametrize("settings", [{}, {"fisher": True}, {"asymmetric": True}])
@pytest.mark.parametrize("method", ["svd", "cp", "tt", "branched_tucker"])
def test_a_search_with_calibration_gives_the_plan_it_gives_without(method, settings):
    """The model itself runs as the caller runs it, so that its inputs may differ a little."""
    model = convolutions()
    data = [torch.randn(16, 3, 8, 8) for _ in range(2)]
    errors = []
    for context in (contextlib.nullcontext(), autocast()):
        with context:
            plan = rankopt.search(
                model, "params<=90%", methods=method, calibration=data, **settings
            )
            small = rankopt.apply(model, plan, calibration=data)
        assert all(p.dtype == torch.float32 for p in small.parameters())
        errors.append(distance(model, small, data[0]))
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


def test_compress_sees_the_weights_it_has_just_trained():
    model = convolutions().append(nn.Flatten()).append(nn.LazyLinear(4))
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model(x)
    labels = x.mean(dim=(1, 2, 3)).gt(0).long()
    train = list(zip(x.split(16), labels.split(16), strict=True))
    arguments = {"recover": False, "finetune": {"epochs": 3, "learning_rate": 1e-2}}

    def evaluate(model):
        return -float(nn.functional.cross_entropy(model(x).float(), labels))

    with autocast():
        done = rankopt.compress(
            model, "macs<=50%", train=train, example_inputs=x[:4], evaluate=evaluate, **arguments
        )
        assert torch.is_autocast_cache_enabled()
    with autocast(), torch.no_grad():
        ended = evaluate(done.model)
    metrics = {stage.name: stage.metric for stage in done.stages}
    assert metrics["finetune"] == metrics["verify"] == pytest.approx(ended, rel=1e-6)

"""The model, metric and study that the tests of studies share."""

from __future__ import annotations

import torch

import rankopt
from rankopt.testing import planted_inputs, planted_model

INPUTS = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(2))
WARM = ("knapsack", "parameter_ratio")


with torch.no_grad():
    WANT = planted_model()(INPUTS)


def closeness(model):
    """The share of the outputs' energy that is kept; 1 for the dense model."""
    with torch.no_grad():
        return 1 - float((model(INPUTS) - WANT).square().sum() / WANT.square().sum())


def open_study(storage=None, **more):
    arguments = {"evaluate": closeness, "example_inputs": planted_inputs(), "warm_starts": WARM}
    return rankopt.study(planted_model(), storage=storage, **{**arguments, **more})

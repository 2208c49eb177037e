"""Models whose outputs are not finite once a certain layer is decomposed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankopt
from rankopt.errors import RankoptWarning
from rankopt_strategies import Relaxed


class Margin(nn.Module):
    """A square root that is NaN as soon as `b` moves by much."""

    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(32, 32), nn.Linear(32, 4)
        self.b = nn.Linear(32, 32, bias=False)
        self.register_buffer("reference", self.b.weight.detach().clone())

    def forward(self, x):
        moved = (self.b(x) - nn.functional.linear(x, self.reference)).square().sum(-1, keepdim=True)
        return self.c(torch.relu(self.a(x))) * torch.sqrt(0.05 - moved)


@pytest.fixture
def margin():
    torch.manual_seed(0)
    return Margin()


@pytest.mark.parametrize("strategy", ["knapsack", Relaxed(rounds=2)])
def test_such_a_layer_is_spared(margin, strategy):
    with pytest.warns(RankoptWarning, match=r"layer b: .*not finite.*ignore="):
        plan = rankopt.search(
            margin, "params<=70%", calibration=[torch.randn(64, 32)], strategy=strategy
        )
    assert plan["b"].keeps
    assert rankopt.RankPlan.from_json(plan.to_json()) == plan


def test_factors_that_lose_the_outputs_lose_the_search(margin):
    plan = rankopt.search(
        margin, "params<=60%", calibration=[torch.randn(64, 32)], strategy="energy",
        asymmetric="search",
    )  # fmt: skip
    assert len(plan.extensions["factors"]) == 2
    assert rankopt.RankPlan.from_json(plan.to_json()) == plan

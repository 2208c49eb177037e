"""Calibration and example inputs as users give them, and as models treat them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankopt


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
        rankopt.recover(small, teacher=model, calibration=data, seconds=0.1)
        assert all(torch.equal(x, y) for x, y in zip((*data, example), given, strict=True))
    assert torch.equal(*outputs)

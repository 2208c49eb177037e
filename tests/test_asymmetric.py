from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

import rankopt
import rankopt_strategies
from rankopt._calibration import collect as calibration
from rankopt.errors import ModelError, PlanError
from rankopt.testing import planted_model


def error(dense, small, batches):
    """Relative error² of the outputs."""
    with torch.no_grad():
        pairs = [(dense(x), small(x)) for x in batches]
    return float(sum((a - b).square().sum() for a, b in pairs)) / float(
        sum(a.square().sum() for a, _ in pairs)
    )


def planned(model, data, budget="params<=40%", **settings):
    return [
        rankopt.search(model, budget, calibration=data, asymmetric=asymmetric, **settings)
        for asymmetric in (False, True)
    ]


def mlp(bias=True):
    torch.manual_seed(0)
    sizes = (24, 48, 48, 48, 16)
    layers = [nn.Sequential(nn.Linear(a, b, bias=bias), nn.ReLU()) for a, b in pairwise(sizes)]
    return nn.Sequential(*layers[:-1], layers[-1][0]).eval()


def test_later_layers_answer_for_the_errors_of_earlier_ones():
    model, data = mlp(), [torch.randn(256, 24) for _ in range(4)]
    symmetric, asymmetric = planned(model, data)
    assert [d.ranks for d in symmetric.changes] == [d.ranks for d in asymmetric.changes]
    assert {d.factors.kind for d in asymmetric.changes} == {"asymmetric"}
    fresh = [torch.randn(256, 24)]
    before, after = (
        error(model, rankopt.apply(model, plan, calibration=data), fresh)
        for plan in (symmetric, asymmetric)
    )
    assert after < 0.95 * before


def test_a_single_layer_has_nothing_to_answer_for():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(32, 32), nn.ReLU()), [torch.randn(512, 32)]
    small = [rankopt.apply(model, p, calibration=data) for p in planned(model, data)]
    assert error(small[0], small[1], data) < 1e-6


@pytest.mark.parametrize("patches", [True, False])
def test_convolutions_with_batchnorm(monkeypatch, patches):
    if not patches:  # as for kernels whose patches are too large
        monkeypatch.setattr(calibration, "MAX_PATCH", 8)
    model = planted_model(noise=0.5)
    data = [torch.randn(32, 3, 12, 12) for _ in range(4)]
    before, after = (
        error(model, rankopt.apply(model, plan, calibration=data), data)
        for plan in planned(model, data, "params<=25%")
    )
    assert after < before


def test_attention_and_a_layer_called_twice():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
            self.twice = nn.Linear(32, 32)

        def forward(self, x):
            return self.twice(torch.relu(self.twice(self.layer(x))))

    torch.manual_seed(0)
    model, data = Net().eval(), [torch.randn(64, 6, 32) for _ in range(4)]
    before, after = (
        error(model, rankopt.apply(model, plan, calibration=data), data)
        for plan in planned(model, data, "params<=50%")
    )
    assert after < before


class Branches(nn.Module):
    """One branch or the other by a flag; the first, called twice, adds to its input in place."""

    def __init__(self, *, writes):
        super().__init__()
        self.writes = writes
        self.a, self.b, self.head = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x, flag):
        if flag:
            x = self.b(x)
        else:
            for scale in (4.0, 1.0):
                y = x.mul_(scale) if self.writes else x * scale
                x = y.add_(self.a(y)) if self.writes else y + self.a(y)
        return self.head(x.relu())


def test_layers_that_are_idle_in_the_first_batch():
    torch.manual_seed(0)
    model, basis = Branches(writes=False).eval(), torch.randn(6, 32)
    data = [(torch.randn(64, 6) @ basis, torch.tensor(i > 0)) for i in range(3)]
    x = torch.cat([x for x, _ in data[1:]])
    distances = []
    for given in (data, data[1:] + data[:1]):
        _, plan = planned(model, given)
        assert plan["b"].factors.asymmetric
        small = rankopt.apply(model, plan, calibration=given)
        with torch.no_grad():
            distances.append(float((small.b(x) - model.b(x)).norm() / model.b(x).norm()))
    assert distances[0] == pytest.approx(distances[1], rel=1e-3)


def test_inputs_that_are_written_into_between_calls():
    torch.manual_seed(0)
    models = [Branches(writes=writes).eval() for writes in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    data = [(torch.randn(64, 32), torch.tensor(False))]
    small = [rankopt.apply(m, planned(models[1], data)[1], calibration=data) for m in models]
    for name, value in small[0].state_dict().items():
        assert torch.allclose(value, small[1].state_dict()[name], atol=1e-4), name


def test_the_plan_file_says_so_and_gives_the_same_model(tmp_path):
    model, data = mlp(bias=False), [torch.randn(256, 24)]
    _, plan = planned(model, data)
    plan.save(tmp_path / "plan.json")
    again = rankopt.RankPlan.load(tmp_path / "plan.json")
    assert again == plan
    first, second = (rankopt.apply(model, p, calibration=data) for p in (plan, again))
    x = torch.randn(8, 24)
    assert torch.equal(first(x), second(x))
    with pytest.raises(PlanError, match="'asymmetric': pass the calibration inputs"):
        rankopt.apply(model, plan)
    inside = rankopt.apply_(mlp(bias=False), plan, calibration=data)
    assert torch.allclose(inside(x), first(x), atol=1e-5)


def test_needs_calibration():
    with pytest.raises(ModelError, match="asymmetric=True needs calibration="):
        rankopt.search(mlp(), "params<=50%", asymmetric=True)


@pytest.mark.parametrize("seed", [1, 3])
@pytest.mark.parametrize("strategy", ["knapsack", "optuna"])
def test_a_bound_on_the_metric_is_held_by_the_factors_of_the_plan(strategy, seed):
    torch.manual_seed(seed)
    layers = [nn.Linear(16, 48), nn.Linear(48, 48), nn.Linear(48, 48), nn.Linear(48, 8)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU()))).eval()
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(2)
    x, data = torch.randn(512, 16), [torch.randn(48, 16)]
    classes = model(x).argmax(dim=1)

    def agreement(other):
        return float((other(x).argmax(dim=1) == classes).float().mean())

    chosen = rankopt_strategies.OptunaSearch(n_trials=10) if strategy == "optuna" else strategy
    plan = rankopt.search(
        model, "metric_drop<=0.3, minimize=macs", strategy=chosen, example_inputs=x[:8],
        evaluate=agreement, calibration=data, asymmetric=True,
    )  # fmt: skip
    assert plan.changes
    reached = agreement(rankopt.apply(model, plan, calibration=data))
    assert reached >= 0.7
    recorded = plan.extensions.get("metric_drop", plan.extensions.get("study"))
    assert recorded["metric"] == pytest.approx(reached)

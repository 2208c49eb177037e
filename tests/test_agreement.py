from __future__ import annotations

import pytest
import torch
from torch import nn

import rankopt
from rankopt._model.inputs import divergence_loss
from rankopt.errors import CalibrationError, ModelError
from rankopt.testing import planted_inputs, planted_model


def test_it_is_the_mean_divergence_of_the_batches():
    model = planted_model().train()
    x, y = planted_inputs(48), torch.zeros(48, dtype=torch.long)
    nearness = rankopt.Agreement(model, [(x[:32], y[:32]), (x[32:], y[32:])], temperature=2.0)
    assert model.training
    small = rankopt.apply(model, rankopt.search(model, "params<=40%")).eval()
    values = list(nearness(small))
    assert [weight for _, weight in values] == [32, 16]
    model.eval()
    with torch.no_grad():
        wanted = divergence_loss(model(x[:32]), small(x[:32]), temperature=2.0)
    assert values[0][0] == pytest.approx(-float(wanted), rel=1e-4)
    assert [value for value, _ in nearness(model)] == pytest.approx([0.0, 0.0], abs=1e-6)


def test_studies_and_comparisons_take_it(tmp_path):
    model, x = planted_model(), planted_inputs(32)
    nearness = rankopt.Agreement(model, [x])
    path = tmp_path / "s.db"
    with rankopt.study(
        model, evaluate=nearness, example_inputs=x, storage=path, warm_starts=("knapsack",)
    ).run(n_trials=6) as study:
        best = study.best("macs<=70%")
    small = rankopt.apply(model, best)
    found = rankopt.compare(model, small, evaluate=nearness).metric
    assert found.after == pytest.approx(best.extensions["study"]["metric"], rel=1e-3, abs=1e-6)
    assert repr(rankopt.Agreement(model, [x])) == repr(nearness)
    assert repr(rankopt.Agreement(model, [x + 1])) != repr(nearness)


def test_what_it_refuses():
    with pytest.raises(ModelError, match="expected a torch"):
        rankopt.Agreement("resnet18", [planted_inputs()])
    with pytest.raises(ValueError, match="temperature=0"):
        rankopt.Agreement(planted_model(), [planted_inputs()], temperature=0)
    with pytest.raises(CalibrationError):
        rankopt.Agreement(nn.Flatten(), [])

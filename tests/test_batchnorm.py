"""BatchNorm statistics: what recalibration gives, and that no failure leaves them half-written."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import rankopt
from rankopt import recalibrate
from rankopt._build.settle import COMPARED_SAMPLES
from rankopt._model.inputs import divergence
from rankopt.errors import CalibrationError, RankoptWarning
from rankopt.testing import planted_model

NORMS = (1, 4, 7, 10)
# Rounding of float32 statistics, through four layers.
EXACT = 1e-8
# Share of what stale statistics do that passing the batches one by one may leave.
SEVERAL = 0.005


def data():
    return [torch.randn(16, 3, 12, 12) for _ in range(3)]


def deep():
    """Four norms whose running statistics are not quite those of the data."""
    layers = []
    for channels in (3, 12, 12, 12):
        layers += [nn.Conv2d(channels, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))
    for _ in range(40):
        model(1.2 * torch.randn(64, 3, 8, 8) + 0.2)
    return model.eval()


def changed(model):
    """Other weights, as compression gives them."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() > 1:
                parameter += 0.5 * parameter.std() * torch.randn_like(parameter)
    return other


def entering(model, index, x):
    """Mean and variance of what a norm takes in."""
    rows = model[:index](x).transpose(0, 1).flatten(1).double()
    return rows.mean(dim=1), rows.var(dim=1, correction=0)


def one_by_one(model, x, teacher=None):
    """Brute force: a pass over all samples for each norm, later ones after earlier ones."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for index in NORMS:
            mean, variance = entering(model, index, x)
            if teacher is not None:
                norm, (wanted, spread) = teacher[index], entering(teacher, index, x)
                sigma = (norm.running_var.double() + norm.eps).sqrt()
                new_sigma = sigma * (variance / spread).sqrt()
                mean = mean - (wanted - norm.running_mean.double()) / sigma * new_sigma
                variance = new_sigma.square() - norm.eps
            model[index].running_mean.copy_(mean)
            model[index].running_var.copy_(variance)
    return model


@pytest.mark.parametrize("against", [False, True], ids=["plain", "teacher"])
@pytest.mark.parametrize("size", [256, 64, 1])
def test_deep_norms_are_as_a_pass_for_each_would_make_them(size, against):
    dense = deep()
    small, shade = changed(dense), torch.rand(256, 1, 1, 1)
    x = (0.2 + 2 * shade) * torch.randn(256, 3, 8, 8) + 4 * shade.flip(0) - 2
    teacher = dense if against else None
    wanted, found = one_by_one(small, x, teacher), copy.deepcopy(small)
    assert recalibrate(found, x.split(size), teacher=teacher) == len(NORMS)
    with torch.no_grad():
        stale, off = (divergence(wanted(x), model(x)) for model in (small, found))
    assert off < (EXACT if size == len(x) else SEVERAL) * stale


def test_every_norm_of_a_model_equal_to_its_teacher_stays():
    model = deep()
    with torch.no_grad():
        model[3].weight[0] = 0  # a constant channel
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(40, 3, 8, 8)
    assert recalibrate(model, iter(x.split(8)), teacher=copy.deepcopy(model)) == len(NORMS)
    for name, value in model.state_dict().items():
        assert torch.allclose(value, before[name], rtol=1e-3, atol=1e-5), name


def test_channels_that_died_leave_with_the_mean_of_the_teacher():
    teacher = deep()
    model, x = copy.deepcopy(teacher), torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        model[3].weight[0] = 0
        recalibrate(model, [x], teacher=teacher)
        means = [net[:5](x).mean(dim=(0, 2, 3))[0] for net in (model, teacher)]
    assert means[0] == pytest.approx(float(means[1]), abs=1e-3)


def test_a_single_value_has_no_variance():
    model = nn.Sequential(nn.BatchNorm1d(4))
    assert recalibrate(model, [torch.ones(1, 4)]) == 0
    assert torch.equal(model[0].running_var, torch.ones(4))
    assert recalibrate(model, torch.randn(9, 4).split(1)) == 1


def _unchanged(model, before):
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_statistics_that_are_not_finite_are_refused():
    model = deep()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(8, 3, 8, 8)
    x[3, 0, 0, 0] = math.nan
    for teacher in (None, deep()):
        with pytest.raises(CalibrationError, match="^norm 1: what it takes in .* not finite"):
            recalibrate(model, [torch.randn(8, 3, 8, 8), x], teacher=teacher)
        _unchanged(model, before)


def test_statistics_beyond_half_precision_are_refused():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)).half()
    model[1].weight.data *= 2000
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        CalibrationError, match=r"^norm 2: its running_var would be .*e\+0.*beyond the 6.55e\+04"
    ):
        recalibrate(model, [torch.randn(64, 4).half()])
    _unchanged(model, before)


class Interrupted(nn.Module):
    """Fails in its n-th call, and in those after it."""

    def __init__(self, calls):
        super().__init__()
        self.left = calls

    def forward(self, x):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return x


def test_an_interruption_leaves_the_statistics_alone():
    model = nn.Sequential(nn.BatchNorm1d(4), Interrupted(2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, torch.randn(24, 4).split(8))
    _unchanged(model, before)


def compressible():
    """A model that takes images of 8x8 only, and a plan from its weights."""
    model = nn.Sequential(
        nn.Conv2d(8, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 36, 32),
    ).eval()
    return model, rankopt.search(model, "params<=50%")


@pytest.mark.parametrize("calls", [2, 4, 6])
def test_apply_in_place_leaves_the_model_as_it_was(calls, monkeypatch):
    model, plan = compressible()
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    good = torch.randn(8, 8, 8, 8)
    with pytest.raises(CalibrationError, match="the model fails on a calibration batch"):
        rankopt.apply_(model, plan, calibration=[good, torch.randn(8, 8, 9, 9)])
    assert list(model.modules()) == modules
    _unchanged(model, before)
    nth = Interrupted(calls)
    monkeypatch.setattr("rankopt._build.settle.divergence", lambda a, b: nth(0.0))
    monkeypatch.setattr("rankopt._calibration.batchnorm.run", lambda m, x: nth(m(x)))
    with pytest.raises(KeyboardInterrupt):
        rankopt.apply_(model, plan, calibration=[good, good])
    assert list(model.modules()) == modules
    _unchanged(model, before)


def test_apply_in_place_gives_the_statistics_that_apply_gives():
    model, held = deep(), [torch.randn(64, 3, 8, 8) for _ in range(2)]
    plan = rankopt.search(model, "params<=30%", strategy="parameter_ratio")
    small = rankopt.apply(model, plan, calibration=held)
    assert not torch.equal(small[4].running_mean, model[4].running_mean)
    assert rankopt.apply_(model, plan, calibration=held) is model
    for index in NORMS:
        assert torch.equal(small[index].running_mean, model[index].running_mean)
        assert torch.equal(small[index].running_var, model[index].running_var)


def test_apply_tells_why_statistics_stay():
    model, plan = compressible()
    x = torch.randn(8, 8, 8, 8)
    x[0] = math.nan
    with pytest.warns(RankoptWarning, match="stay: the dense model gives .* not finite"):
        small = rankopt.apply(model, plan, calibration=[x])
    assert torch.equal(small[1].running_var, model[1].running_var)
    after = [torch.randn(COMPARED_SAMPLES, 8, 8, 8), x]  # outputs are compared before it
    with pytest.warns(RankoptWarning, match="stay: norm 1: what it takes in .* not finite"):
        small = rankopt.apply(model, plan, calibration=after)
    assert torch.equal(small[1].running_var, model[1].running_var)


def test_recalibration_is_exact():
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 6), nn.BatchNorm1d(6))
    held = [torch.randn(10, 5), 3 * torch.randn(4, 5) + 1]
    assert recalibrate(model, held) == 2
    hidden = model[0](torch.cat(held)).double()
    assert torch.allclose(model[1].running_mean.double(), hidden.mean(dim=0), atol=1e-5)
    variance = hidden.var(dim=0, correction=0)
    assert torch.allclose(model[1].running_var.double(), variance, rtol=1e-4)
    assert model.training
    assert int(model[1].num_batches_tracked) == 0


def test_recalibration_against_a_teacher_leaves_equals_alone():
    model = planted_model()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    before = [model.norm.running_mean.clone(), model.norm.running_var.clone()]
    assert recalibrate(model, data(), teacher=planted_like(model)) == 1
    assert torch.allclose(model.norm.running_mean, before[0], atol=1e-4)
    assert torch.allclose(model.norm.running_var, before[1], rtol=1e-3)


def planted_like(model):
    other = planted_model()
    other.load_state_dict(model.state_dict())
    return other


def test_recalibration_without_batchnorm_and_without_data():
    assert recalibrate(nn.Linear(3, 3), [torch.ones(2, 3)]) == 0
    with pytest.raises(CalibrationError, match="empty"):
        recalibrate(nn.Sequential(nn.BatchNorm1d(3)), [])

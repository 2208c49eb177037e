from __future__ import annotations

import pytest
import torch
from torch import nn

from rankopt._calibration.collect import layer_inputs
from rankopt._calibration.moments import Moments
from rankopt._decompositions import SVD, SpatialSVD, Tucker2
from rankopt._decompositions.projection import survival
from rankopt._decompositions.rebuild import rebuild
from rankopt._model.layers import canonical_weight, find_layers

MODULES = [
    nn.Linear(12, 20),
    nn.Linear(20, 12),
    nn.Conv2d(8, 12, 1),
    nn.Conv2d(12, 8, 3, groups=2),
    nn.Conv2d(16, 5, (3, 2)),
    nn.Conv1d(8, 6, 3),
]
CASES = [
    (module, method, aware)
    for module in MODULES
    for method in (SVD(), Tucker2(), SpatialSVD())
    for aware in (False, True)
    if method.applies(find_layers(nn.Sequential(module))[0])
]


def described(module, aware):
    (layer,) = find_layers(nn.Sequential(module))
    weight = canonical_weight(module).double()
    if not aware:
        return layer, weight, None
    x = torch.randn(64, layer.in_channels, *(9 for _ in layer.kernel), dtype=torch.float64)
    rows = layer_inputs(layer, x)
    second = rows.mT @ rows / rows.shape[1]
    return layer, weight, Moments(second, second.shape[-1] // layer.group_shape[0], 64)


def hard(maxima, ranks):
    mass = torch.zeros(maxima, dtype=torch.float64)
    mass[tuple(rank - 1 for rank in ranks)] = 1.0
    return survival(mass)


@pytest.mark.parametrize(("module", "method", "aware"), CASES)
def test_a_certain_rank_is_the_truncation(module, method, aware):
    layer, weight, moments = described(module, aware)
    basis = method.prepare(weight, moments)
    project = basis.projection()
    maxima = [axis.maximum for axis in method.rank_axes(layer)]
    scale = weight.norm()
    for ranks in ([1] * len(maxima), [max(1, n // 2) for n in maxima], maxima):
        soft = project(weight, hard(maxima, ranks))
        error = (weight - soft).norm() / scale
        if len(maxima) == 1:  # two modes are turned anew by the factors
            exact = rebuild(method, layer, ranks, basis.factors(ranks))
            assert (soft - exact).norm() <= 1e-9 * scale
        if not aware:
            assert error == pytest.approx(float(basis.error(ranks)), abs=1e-7)
        if ranks == maxima:
            assert error <= 1e-9
        # Of the rank it should be, so that factors of that rank reproduce it.
        again = method.prepare(soft).error(ranks)
        assert float(again) <= 1e-6


@pytest.mark.parametrize(("module", "method", "aware"), CASES)
def test_mixtures_are_exact(module, method, aware):
    layer, weight, moments = described(module, aware)
    project = method.prepare(weight, moments).projection()
    maxima = [axis.maximum for axis in method.rank_axes(layer)]
    mass = torch.rand(maxima, dtype=torch.float64)
    mass /= mass.sum()
    cells = [tuple(int(i) + 1 for i in cell) for cell in mass.nonzero()]
    mean = sum(
        mass[tuple(r - 1 for r in ranks)] * project(weight, hard(maxima, ranks)) for ranks in cells
    )
    soft = project(weight, survival(mass))
    assert (soft - mean).norm() <= 1e-12 * weight.norm()


def test_gradients_reach_gate_and_weight():
    weight = torch.randn(1, 6, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    project = Tucker2().prepare(weight.detach()).projection()
    gate = torch.rand(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(project, (weight, gate))


def test_survival_of_two_ranks():
    mass = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    expected = torch.tensor([[1.0, 0.6], [0.7, 0.4]])
    torch.testing.assert_close(survival(mass), expected)

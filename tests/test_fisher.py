"""Outputs weighed by the Fisher information: the metric itself, factors, plans, studies."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from weighing import Blind

import rankopt
from rankopt._calibration import collect as calibration
from rankopt._calibration import fisher
from rankopt._calibration.moments import Moments
from rankopt._decompositions import (
    CP,
    SVD,
    TT,
    BranchedTucker,
    DepthwiseSeparable,
    SpatialSVD,
    Tucker2,
)
from rankopt._decompositions.cache import BasisCache
from rankopt._decompositions.rebuild import rebuild
from rankopt._model.inputs import divergence
from rankopt._model.layers import find_layers
from rankopt._search.opening import open_problem
from rankopt.errors import (
    CalibrationError,
    DeadlineExceeded,
    ModelError,
    PlanError,
)
from rankopt.testing import planted_model
from rankopt_strategies import Relaxed


def roots(model, data, **found):
    layers = [layer for layer in find_layers(model) if layer.refusal is None]
    return dict(fisher.output_roots(model, [[layer] for layer in layers], data, **found))


def random_root(groups, size):
    square = torch.randn(groups, size, size, dtype=torch.float64)
    return torch.linalg.cholesky(square @ square.mT + torch.eye(size, dtype=torch.float64)).mT


# The metric


def test_the_metric_of_the_last_layer_is_the_fisher_of_the_classes(monkeypatch):
    monkeypatch.setattr(fisher, "TEMPERATURE", 1.0)
    monkeypatch.setattr(fisher, "DAMPING", 1e-3)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 5)), torch.randn(20_000, 8)
    p = model(x).softmax(1).double().detach()
    exact = torch.diag(p.mean(0)) - p.T @ p / len(p)
    exact = exact / exact.diagonal().mean()
    root = roots(model, [x])["0"][0]
    assert torch.equal(root, root.triu())
    assert torch.allclose(root.mT @ root, exact, atol=0.05)


def test_the_metric_of_an_earlier_layer_is_carried_back_by_the_later_one(monkeypatch):
    monkeypatch.setattr(fisher, "DAMPING", 1e-6)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1)), torch.randn(64, 6)
    direction = model[1].weight.detach().double()  # one output: nothing else is seen
    exact = direction.T @ direction
    root = roots(model, [x])["0"][0]
    assert torch.allclose(root.mT @ root, exact / exact.diagonal().mean(), atol=1e-4)


def test_groups_positions_and_calls_add_up():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3, groups=2)
            self.twice = nn.Linear(8, 8)
            self.unused = nn.Linear(8, 8)

        def forward(self, x):
            x = torch.relu_(self.conv(x)).mean((2, 3))  # in place, on what the hook was given
            return self.twice(self.twice(x))

    torch.manual_seed(0)
    model, data = Net(), [torch.randn(16, 4, 7, 5) for _ in range(2)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = roots(model, data)
    assert {name: tuple(root.shape) for name, root in found.items()} == {
        "conv": (2, 4, 4),
        "twice": (1, 8, 8),
    }
    for root in found.values():
        assert (root.mT @ root).diagonal(dim1=-2, dim2=-1).mean() == pytest.approx(1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_it_says_what_cannot_be_differentiated():
    class NoGrad(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            with torch.no_grad():
                return self.layer(x).relu()

    with pytest.raises(CalibrationError, match="under no_grad.*Leave fisher=True out"):
        roots(NoGrad(), [torch.randn(4, 8)])

    class InPlace(NoGrad):
        def forward(self, x):
            part = self.layer(x).chunk(2, dim=1)[0]
            part += 1
            return part

    with pytest.raises(CalibrationError, match="fisher=True differentiates.*modified inplace"):
        roots(InPlace(), [torch.randn(4, 8)])


class Partly(nn.Module):
    """A layer is wide, one is not used, one runs for some inputs only, one without gradient."""

    def __init__(self):
        super().__init__()
        self.frozen, self.sometimes = nn.Linear(8, 8), nn.Linear(8, 8)
        self.unused, self.wide = nn.Linear(8, 8), nn.Linear(8, 64)
        self.last = nn.Linear(64, 5)

    def forward(self, x):
        with torch.no_grad():
            x = self.frozen(x)
        if x.shape[0] > 4:
            x = self.sometimes(x)
        return {"logits": (self.last(self.wide(x)),)}


@pytest.mark.parametrize("most", [1, 10**9])
def test_layers_that_no_gradient_reaches_are_left_out_however_they_are_taken(monkeypatch, most):
    monkeypatch.setattr(fisher, "MAX_OUTPUTS", 32)
    monkeypatch.setattr(calibration, "LEAST_SUM_BYTES", most)
    monkeypatch.setattr(calibration, "MOST_SUM_BYTES", most)
    torch.manual_seed(0)
    model, data = Partly(), [torch.randn(size, 8) for size in (4, 6)]
    found = roots(model, data)
    assert set(found) == {"sometimes", "last"}
    (only,) = fisher.output_roots(
        model, [[x] for x in find_layers(model) if x.name == "last"], data
    )
    assert torch.equal(only[1], found["last"])  # whichever layers are watched
    assert dict(fisher.output_roots(model, [[find_layers(model)[3]]], data)) == {}


def test_inputs_with_a_history_keep_their_gradients_to_themselves():
    leaf = torch.randn(16, 8, requires_grad=True)
    encoder = nn.Linear(8, 8)
    model, inputs = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), encoder(leaf)
    for _ in range(2):  # nor is a graph freed that is needed again
        roots(model, [leaf, inputs])
    assert leaf.grad is None
    assert encoder.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype):
    torch.manual_seed(0)
    model, data = Blind().eval().to(dtype), [torch.randn(64, 32).to(dtype)]
    plan = rankopt.search(model, "params<=50%", strategy="relaxed", calibration=data, fisher=True)
    small = rankopt.apply(model, plan, calibration=data)
    assert small(data[0]).dtype == dtype
    assert small(data[0]).isfinite().all()


def test_half_precision_is_not_rounded_in_the_weighed_basis():
    directions = torch.randn(3, 32, dtype=torch.float64)
    root = fisher._root((directions.T @ directions)[None])
    weight, eye = torch.randn(1, 32, 32).bfloat16(), torch.eye(32, dtype=torch.float64)
    moments = Moments(eye[None], 1, 64).weighing(root)
    basis = BasisCache().get(SVD(), weight, moments)
    factors = basis.factors([32])
    product = factors["last.weight"].double() @ factors["first.weight"].double()
    assert (product - weight[0].double()).norm() / weight.double().norm() < 1e-5
    gated = basis.projection()(weight, torch.ones(32))
    assert gated.dtype == torch.bfloat16


def test_time_runs_out_while_differentiating():
    model, data = Blind().eval(), [torch.randn(64, 32)]
    problem = open_problem(model, None, calibration=data).problem
    problem.deadline = 0.0
    with pytest.raises(DeadlineExceeded):
        problem.weigh()


# Factors

METHODS = (SVD(), SpatialSVD(), Tucker2(), CP(), DepthwiseSeparable(), TT(), BranchedTucker())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("groups", [1, 2])
def test_errors_are_those_of_the_weighed_outputs(method, groups):
    torch.manual_seed(0)
    kernel = 1 if method.name == "svd" else 3
    conv = nn.Conv2d(6 * groups, 8 * groups, kernel, groups=groups, bias=False).double()
    (layer,) = find_layers(nn.Sequential(conv))
    weight = conv.weight.detach().unflatten(0, (groups, -1))
    size = 6 * kernel**2
    rows = torch.randn(groups, 500, size, dtype=torch.float64)
    plain = Moments(rows.mT @ rows / 500, kernel**2, 500)
    root = random_root(groups, 8)
    basis = BasisCache().get(method, weight, plain.weighing(root))
    axes = method.rank_axes(layer)
    ranks = [max(axis.step, axis.maximum // 4 // axis.step * axis.step) for axis in axes]
    near = rebuild(method, layer, ranks, basis.factors(ranks)).reshape(weight.shape)
    input_root = torch.linalg.cholesky(plain.second)

    def size_of(x):
        return float((root @ x.flatten(2) @ input_root).norm())

    error = size_of(weight - near) / size_of(weight)
    assert basis.fitted_error(ranks) == pytest.approx(error, abs=2e-3)
    other = BasisCache().get(method, weight, plain).factors(ranks)
    unweighed = rebuild(method, layer, ranks, other).reshape(weight.shape)
    assert error < size_of(weight - unweighed) / size_of(weight)


@pytest.mark.parametrize("method", [SVD(), SpatialSVD()], ids=lambda m: m.name)
def test_soft_truncation_at_a_hard_gate_is_the_truncation(method):
    torch.manual_seed(0)
    kernel = 1 if method.name == "svd" else 3
    conv = nn.Conv2d(6, 8, kernel, bias=False).double()
    (layer,) = find_layers(nn.Sequential(conv))
    weight = conv.weight.detach()[None]
    rows = torch.randn(1, 500, 6 * kernel**2, dtype=torch.float64)
    # Of too few patches for factors that follow them beyond what is nested.
    moments = Moments(rows.mT @ rows / 500, kernel**2, 0).weighing(random_root(1, 8))
    basis = BasisCache().get(method, weight, moments)
    axes = method.rank_axes(layer)
    ranks = [axis.maximum // 2 for axis in axes]
    gate = (torch.arange(axes[0].maximum) < ranks[0]).double()
    soft = basis.projection().double()(weight, gate)
    hard = rebuild(method, layer, ranks, basis.factors(ranks)).reshape(weight.shape)
    assert torch.allclose(soft, hard, atol=1e-6)


# Plans


def searched(model, data, **settings):
    return [
        rankopt.search(model, "params<=30%", calibration=data, fisher=weighed, **settings)
        for weighed in (False, True)
    ]


def moved(model, plan, data):
    small = rankopt.apply(model, plan, calibration=data)
    with torch.no_grad():
        return sum(divergence(model(x), small(x)) for x in data)


def test_what_the_model_does_not_look_at_gets_no_rank():
    model, data = Blind().eval(), [torch.randn(128, 32) for _ in range(4)]
    plain, weighed = searched(model, data, only=["first"])
    assert plain.changes[0].factors.kind == "whitened"
    assert weighed.changes[0].factors.kind == "whitened+fisher"
    assert weighed.changes[0].ranks == plain.changes[0].ranks
    assert moved(model, weighed, data) < 0.3 * moved(model, plain, data)


def test_the_plan_file_says_so_and_gives_the_same_model(tmp_path):
    model, data = Blind().eval(), [torch.randn(128, 32)]
    _, plan = searched(model, data)
    plan.save(tmp_path / "plan.json")
    again = rankopt.RankPlan.load(tmp_path / "plan.json")
    assert again == plan
    x = torch.randn(8, 32)
    first, second = (rankopt.apply(model, p, calibration=data) for p in (plan, again))
    assert torch.equal(first(x), second(x))
    with pytest.raises(PlanError, match=r"'whitened\+fisher': pass the calibration inputs"):
        rankopt.apply(model, plan)


@pytest.mark.parametrize("strategy", ["knapsack", "relaxed", "parameter_ratio", "energy"])
def test_strategies_search_with_it(strategy):
    model = planted_model(noise=0.5)
    data = [torch.randn(32, 3, 12, 12) for _ in range(2)]
    plan = rankopt.search(
        model, "params<=40%", strategy=strategy, calibration=data, fisher=True,
        example_inputs=data[0],
    )  # fmt: skip
    assert {d.factors.fisher for d in plan.changes} == {True}
    assert moved(model, plan, data) < float("inf")


def test_a_search_that_weighs_does_not_go_on_with_one_that_does_not(tmp_path):
    model, data = Blind().eval(), [torch.randn(64, 32)]
    strategy = Relaxed(rounds=2, folder=str(tmp_path))
    rankopt.search(model, "params<=50%", strategy=strategy, calibration=data)
    folder = {"strategy": strategy, "calibration": data}
    weighed = rankopt.search(model, "params<=50%", fisher=True, **folder)
    alone = {**folder, "strategy": Relaxed(rounds=2)}
    assert weighed.decisions == rankopt.search(model, "params<=50%", fisher=True, **alone).decisions
    assert len(list(tmp_path.glob("relaxed-*.pt"))) == 2


def test_with_asymmetric_factors():
    model, data = Blind().eval(), [torch.randn(256, 32) for _ in range(4)]
    plain, weighed = searched(model, data, asymmetric=True)
    assert {d.factors.kind for d in weighed.changes} == {"asymmetric+fisher"}
    assert moved(model, weighed, data) < moved(model, plain, data)


def test_it_needs_calibration():
    with pytest.raises(ModelError, match="fisher=True needs calibration="):
        rankopt.search(Blind(), "params<=50%", fisher=True)


def test_a_layer_with_very_many_outputs_weighs_them_alike(monkeypatch):
    monkeypatch.setattr(fisher, "MAX_OUTPUTS", 32)
    model, data = Blind().eval(), [torch.randn(128, 32)]
    plan = rankopt.search(model, "params<=60%", calibration=data, fisher=True)
    assert {d.targets[0]: d.factors.fisher for d in plan.changes} == {"first": False}

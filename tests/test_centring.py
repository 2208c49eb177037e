"""Factors of layers with a bias answer for deviations from the mean of the inputs alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankopt
from rankopt._calibration import collect as calibration
from rankopt._calibration.collect import centres, collect
from rankopt._calibration.moments import Moments, pool
from rankopt._decompositions.base import Decomposition
from rankopt._decompositions.rebuild import rebuild, response
from rankopt._model.inputs import digest
from rankopt._model.layers import canonical_weight, find_layers
from rankopt.plan import Decision, Factors, RankPlan

# Float32 outputs against sums in float64.
ROUNDING = 2e-5


def shifted(count: int, size: int, *, mean: float = 3.0) -> torch.Tensor:
    """Rows with a mean that is large beside what varies, of falling variances."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(size, size, generator=generator) * torch.logspace(0, -1, size)
    where = mean * torch.randn(size, generator=generator)
    return where + 0.5 * torch.randn(count, size, generator=generator) @ mix.T


def applied(module: nn.Module, method: str, ranks: list[int], data, kind="whitened") -> nn.Module:
    """The module as a plan's chain."""
    model, shape = nn.Sequential(module), tuple(module.weight.shape)
    factors = Factors(kind, digest(data))
    decision = Decision(("0",), (shape,), method, {"ranks": ranks}, factors=factors)
    plan = RankPlan(model={}, decisions=(decision,))
    return rankopt.apply(model, plan, calibration=data, progress=False)


def rows_of(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Outputs as [positions, out] in float64."""
    with torch.no_grad():
        y = module(x).double()
    return y.movedim(1 if y.dim() > 3 else -1, -1).flatten(0, -2)


def lost(dense: nn.Module, small: nn.Module, x: torch.Tensor) -> float:
    """Error of the outputs relative to what they vary by."""
    y, z = rows_of(dense, x), rows_of(small, x)
    return float((y - z).norm() / (y - y.mean(dim=0)).norm())


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_error_is_the_discarded_energy_of_the_centred_outputs(rank):
    torch.manual_seed(0)
    dense, x = nn.Linear(32, 24), shifted(2048, 32)
    small = applied(dense, "svd", [rank], [x[:1024], x[1024:]])
    centred = (x - x.mean(dim=0)).double() @ dense.weight.detach().double().T
    energies = torch.linalg.svdvals(centred).square()
    expected = float((energies[rank:].sum() / energies.sum()).sqrt())
    assert lost(dense, small, x) == pytest.approx(expected, abs=1e-3)
    plan = rankopt.search(nn.Sequential(dense), "params<=40%", calibration=[x], methods="svd")
    (decision,) = plan.changes
    made = rankopt.apply(nn.Sequential(dense), plan, calibration=[x])
    assert decision.error == pytest.approx(lost(dense, made, x), abs=1e-3)


CASES = [
    ("svd", nn.Linear(12, 10), (200, 12)),
    ("svd", nn.Linear(12, 10), (40, 5, 12)),
    ("svd", nn.Conv2d(12, 10, 1, stride=2), (16, 12, 7, 7)),
    ("svd", nn.Conv2d(12, 16, 1, groups=2, padding="same"), (16, 12, 6, 6)),
    ("tucker2", nn.Conv2d(8, 10, 3), (16, 8, 7, 7)),
    ("tucker2", nn.Conv2d(12, 16, 3, groups=2, padding="valid"), (16, 12, 7, 7)),
    ("spatial_svd", nn.Conv2d(8, 10, 3, dilation=2), (16, 8, 8, 8)),
    ("tt", nn.Conv2d(8, 10, 3, stride=2), (16, 8, 9, 9)),
    ("cp", nn.Conv2d(8, 10, 3), (16, 8, 7, 7)),
    ("branched_tucker", nn.Conv2d(8, 12, 3), (16, 8, 7, 7)),
    ("svd", nn.Linear(12, 10).to(torch.bfloat16), (200, 12)),
    ("svd", nn.Linear(12, 10).double(), (200, 12)),
]


def method_for(name: str, module: nn.Module) -> tuple[Decomposition, list[int]]:
    method = rankopt.decompositions.create(name)
    (layer,) = find_layers(nn.Sequential(module))
    axes = method.rank_axes(layer)
    return method, [max(axis.step, axis.maximum // 3 // axis.step * axis.step) for axis in axes]


@pytest.mark.parametrize(("name", "module", "shape"), CASES, ids=str)
@pytest.mark.parametrize("asymmetric", [False, True], ids=["", "asymmetric"])
def test_the_mean_output_stays(name, module, shape, asymmetric):
    torch.manual_seed(0)
    x = (torch.randn(shape) + 4).to(module.weight.dtype)
    _, ranks = method_for(name, module)
    kind = "asymmetric" if asymmetric else "whitened"
    small = applied(module, name, ranks, [x[: len(x) // 2], x[len(x) // 2 :]], kind)
    dense, chain = rows_of(module, x), rows_of(small, x)
    assert not torch.equal(small[0][-1].bias, module.bias)
    scale = float(dense.square().mean().sqrt())
    rounding = max(ROUNDING, 2 * torch.finfo(x.dtype).eps)
    assert (dense.mean(dim=0) - chain.mean(dim=0)).abs().max() < rounding * scale
    assert (dense - chain).norm() > 0.01 * dense.norm()  # at a rank that loses something


def test_a_low_rank_is_not_spent_on_the_mean():
    torch.manual_seed(0)
    x = shifted(4096, 64)
    with_bias, without = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
    without.weight = with_bias.weight
    errors = [lost(m, applied(m, "svd", [4], [x]), x) for m in (with_bias, without)]
    assert errors[0] < 0.97 * errors[1]


@pytest.mark.parametrize(
    ("module", "shape", "centred"),
    [
        (nn.Conv2d(6, 8, 3, padding=1), (4, 6, 6, 6), False),
        (nn.Conv2d(6, 8, 3, padding="same"), (4, 6, 6, 6), False),
        (nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), (4, 6, 6, 6), False),
        (nn.Conv2d(6, 8, 1, padding=1), (4, 6, 6, 6), False),
        (nn.Conv2d(6, 8, 3, bias=False), (4, 6, 6, 6), False),
        (nn.Conv2d(6, 8, 3), (4, 6, 6, 6), True),
        (nn.Linear(6, 8, bias=False), (9, 6), False),
    ],
    ids=str,
)
def test_which_layers_are_centred(module, shape, centred):
    x = torch.randn(shape) + 2
    (layer,) = find_layers(nn.Sequential(module))
    assert centres(layer) == centred
    found = collect(nn.Sequential(module), [layer], [x])["0"]
    assert (found.mean is not None) == centred
    if centred:
        return
    method = "svd" if layer.pointwise else "tucker2"
    small = applied(module, method, method_for(method, module)[1], [x])
    if module.bias is not None:
        assert torch.equal(small[0][-1].bias, module.bias)
    else:
        assert small[0][-1].bias is None


def test_kernels_whose_patches_are_too_large_are_not(monkeypatch):
    monkeypatch.setattr(calibration, "MAX_PATCH", 30)
    assert not centres(find_layers(nn.Sequential(nn.Conv2d(6, 8, 3)))[0])


def test_full_rank_reproduces_the_layer():
    torch.manual_seed(0)
    dense, x = nn.Linear(12, 10), shifted(256, 12)
    fresh = shifted(64, 12, mean=-2)
    small = applied(dense, "svd", [10], [x])
    assert torch.allclose(rows_of(small, fresh), rows_of(dense, fresh), atol=1e-4)
    assert torch.allclose(small[0][-1].bias, dense.bias, atol=1e-4)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_inputs(asymmetric, dtype):
    torch.manual_seed(0)
    dense, x = nn.Linear(12, 10).to(dtype), 0.1 * torch.arange(1, 13, dtype=dtype).repeat(700, 1)
    small = applied(dense, "svd", [2], [x], "asymmetric" if asymmetric else "whitened")
    assert torch.allclose(rows_of(small, x), rows_of(dense, x), atol=1e-5)
    assert all(p.isfinite().all() for p in small.parameters())


def test_a_mean_far_above_the_variance_loses_no_digits():
    torch.manual_seed(0)
    x = torch.randn(4096, 8) + 3000
    (layer,) = find_layers(model := nn.Sequential(nn.Linear(8, 8)))
    found = collect(model, [layer], list(x.split(300)))["0"]
    exact = torch.cov(x.double().T, correction=0)
    assert torch.allclose(found.second[0], exact, atol=1e-5)
    assert torch.allclose(found.mean[0], x.double().mean(dim=0), rtol=1e-7)


@pytest.mark.parametrize("known", [True, False])
def test_layers_of_one_weight_pool_their_means(known):
    a, b = shifted(300, 5).double(), shifted(100, 5, mean=-1).double()

    def of(rows, mean):
        second = rows.T @ rows / len(rows) - (torch.outer(mean, mean) if mean is not None else 0)
        return Moments(second[None], 1, len(rows), None if mean is None else mean[None])

    both = torch.cat([a, b])
    pooled = pool([of(a, a.mean(dim=0)), of(b, b.mean(dim=0) if known else None)])
    if known:
        assert torch.allclose(pooled.mean[0], both.mean(dim=0))
        assert torch.allclose(pooled.second[0], torch.cov(both.T, correction=0))
    else:  # a layer without a bias among them: nothing makes up for the mean
        assert pooled.mean is None
        assert torch.allclose(pooled.second[0], both.T @ both / len(both))


class Tied(nn.Module):
    def __init__(self, bias: str):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.b.weight = self.a.weight
        if bias == "shared":
            self.b.bias = self.a.bias
        self.head = nn.Linear(16, 16)
        if bias == "elsewhere":
            self.head.bias = self.a.bias

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))))


@pytest.mark.parametrize("bias", ["own", "shared", "elsewhere"])
def test_biases_that_are_shared_stay_so(bias):
    model, x = Tied(bias).eval(), shifted(512, 16)
    plan = rankopt.search(model, "params<=70%", calibration=[x])
    small = rankopt.apply(model, plan, calibration=[x])
    held = sum(p.numel() for p in small.parameters())
    assert plan.totals["params"]["measured"] == held
    last = [small.a[-1], small.b[-1]]
    assert last[0].weight is last[1].weight
    assert (last[0].bias is last[1].bias) == (bias == "shared")
    if bias == "elsewhere":  # moving it would move the head's outputs too
        assert last[0].bias is [m for m in small.head.modules() if hasattr(m, "bias")][-1].bias
    else:
        assert not torch.equal(last[0].bias, model.a.bias)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.patch, self.norm = nn.Conv2d(3, 32, 4, stride=4), nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 16)

    def forward(self, x):
        y = self.layer(self.patch(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(y.mean(dim=1)).relu())


@pytest.mark.parametrize("settings", [{}, {"asymmetric": True}, {"fisher": True}], ids=str)
def test_plans_count_and_files_keep_the_moved_biases(tmp_path, settings):
    model = Attention().eval()
    data = [torch.rand(16, 3, 16, 16) for _ in range(4)]
    plan = rankopt.search(model, "params<=60%", calibration=data, **settings)
    small = rankopt.apply(model, plan, calibration=data)
    assert plan.totals["params"]["measured"] == sum(p.numel() for p in small.parameters())
    rankopt.save(small, tmp_path / "small.safetensors")
    same = rankopt.load(Attention(), tmp_path / "small.safetensors").eval()
    again = rankopt.apply(model, rankopt.RankPlan.from_json(plan.to_json()), calibration=data)
    inside = rankopt.apply_(Attention().eval(), plan, calibration=data)
    with torch.no_grad():
        expected = small(data[0])
        assert torch.equal(same(data[0]), expected)
        assert torch.allclose(again(data[0]), expected, atol=1e-5)
        assert torch.allclose(inside(data[0]), expected, atol=1e-5)


def test_folding_keeps_the_bias():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8)).eval()
    x = shifted(256, 24)
    small = rankopt.apply(
        model, rankopt.search(model, "params<=50%", calibration=[x]), calibration=[x]
    )
    assert torch.allclose(rankopt.fold(small, model)(x), small(x), atol=1e-4)


@pytest.mark.parametrize("methods", ["svd", "tucker2", "cp"])
def test_a_soft_model_computes_what_the_plan_builds(methods):
    torch.manual_seed(0)
    layer = nn.Linear(24, 24) if methods == "svd" else nn.Conv2d(8, 12, 3)
    x = shifted(256, 24) if methods == "svd" else torch.rand(16, 8, 6, 6) + 1
    model = nn.Sequential(layer, nn.ReLU()).eval()
    soft = rankopt.soften(model, "params<=50%", calibration=[x], methods=methods).eval()
    plan = soft.discretise()
    assert plan.changes
    soft.settle(plan)
    with torch.no_grad():
        seen = soft(x)
        assert torch.allclose(soft.build(plan)(x), seen, atol=1e-4)
        small = rankopt.apply(model, plan, calibration=[x])
        assert float((small(x) - seen).norm() / seen.norm()) < 1e-3


def test_the_response_to_a_patch_is_that_of_the_rebuilt_weight():
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3, groups=2, stride=2, dilation=2).double()
    (layer,) = find_layers(nn.Sequential(conv))
    method, patch = rankopt.decompositions.create("tucker2"), torch.randn(2, 36).double()
    factors = method.prepare(canonical_weight(conv)).factors([2, 3])
    dense = rebuild(method, layer, [2, 3], factors).flatten(2)
    expected = (dense @ patch[..., None]).flatten()
    assert torch.allclose(response(method, layer, [2, 3], factors, patch), expected, atol=1e-5)

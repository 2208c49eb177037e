"""What models do that are not plain: patched forwards, experts, shared modules, odd scales."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import rankopt
from rankopt._model import inputs
from rankopt._search import opening
from rankopt.errors import CalibrationError, ModelError
from rankopt.testing import planted_inputs, planted_model


def test_a_patched_forward_is_kept():
    """Some tools replace `forward` of an instance; its weight is not all it does."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    plain = model[0].forward
    model[0].forward = lambda x: plain(x) + 100
    plan = rankopt.search(model, "params<=70%")
    assert plan["0"].keeps
    assert plan["0"].reason == "keep: its forward is patched"
    assert plan["1"].method == "svd"


class Routed(nn.Module):
    """Two experts; which one a token goes to depends on its values."""

    def __init__(self, always=None):
        super().__init__()
        self.always = always
        self.body, self.experts = nn.Linear(24, 24), nn.ModuleList(nn.Linear(24, 24) for _ in "ab")

    def forward(self, x):
        x = self.body(x)
        first = x[:, 0] > (0 if self.always is None else -torch.inf)
        out = torch.zeros_like(x)
        out[first], out[~first] = self.experts[0](x[first]), self.experts[1](x[~first])
        return out


def test_an_expert_that_gets_no_token():
    model, data = Routed(always=0), [torch.randn(64, 24)]
    plan = rankopt.search(model, "params<=60%", calibration=data)
    assert not plan["experts.1"].keeps
    small = rankopt.apply(model, plan, calibration=data)
    assert small(data[0]).shape == (64, 24)


def test_asymmetric_factors_need_the_same_calls():
    model, data = Routed(), [torch.randn(64, 24)]
    plan = rankopt.search(model, "params<=30%", calibration=data, asymmetric=True)
    with pytest.raises(CalibrationError, match="asymmetric=True pairs its inputs"):
        rankopt.apply(model, plan, calibration=data)


def test_one_module_under_two_names_is_folded():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(32, 32)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x).relu())

    model = Shared()
    small = rankopt.apply(model, rankopt.search(model, "params<=60%"))
    x = torch.randn(4, 32)
    assert torch.allclose(rankopt.fold(small, model)(x), small(x), atol=1e-5)


def test_pruned_attention_is_kept():
    attention = nn.MultiheadAttention(32, 4)
    prune.l1_unstructured(attention, "in_proj_weight", 0.5)
    model = nn.Sequential(nn.Linear(32, 32), Attending(attention))
    x = torch.randn(5, 2, 32)
    plan = rankopt.search(model, "params<=90%", example_inputs=x)
    small = rankopt.apply(model, plan)
    assert type(small[1].attention) is nn.MultiheadAttention
    assert small(x).shape == x.shape


class Attending(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@torch.inference_mode()
def test_inside_inference_mode():
    with torch.inference_mode(False):
        model, data = planted_model(), [planted_inputs(16)]
    plan = rankopt.search(model, "macs<=60%", example_inputs=planted_inputs(), calibration=data)
    small = rankopt.apply(model, plan, calibration=data)
    assert not any(parameter.is_inference() for parameter in small.parameters())


def test_outputs_that_take_much_memory_are_not_kept(monkeypatch):
    """A language model gives a whole vocabulary for every token of every sample."""
    kept = []
    real = opening.main_output
    monkeypatch.setattr(
        opening, "main_output", lambda output: kept.append(len(output)) or real(output)
    )
    monkeypatch.setattr(inputs, "OUTPUT_BYTES", 12 * 40 * 4)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 40))
    data = [torch.randn(32, 16) for _ in range(4)]
    rankopt.search(model, "params<=60%", calibration=data, strategy="parameter_ratio")
    assert not kept  # a formula compares no outputs
    rankopt.search(model, "params<=60%", calibration=data)
    assert sum(kept) == 12


@pytest.mark.parametrize("scale", [1e-24, 1e24])
@pytest.mark.parametrize("method", ["svd", "tucker2", "spatial_svd", "tt"])
def test_errors_do_not_depend_on_the_scale_of_the_weight(method, scale):
    torch.manual_seed(0)
    conv = nn.Conv2d(160, 160, 3 if method != "svd" else 1, bias=False)
    errors = []
    for factor in (1.0, scale):
        model = nn.Sequential(copy.deepcopy(conv))
        with torch.no_grad():
            model[0].weight.mul_(factor)
        plan = rankopt.search(model, "params<=50%", methods=[method], strategy="parameter_ratio")
        chain = rankopt.apply(model, plan)
        weight = model[0].weight.detach().double()
        folded = rankopt.fold(chain, model)[0].weight.detach().double()
        errors.append(float((folded - weight).norm() / weight.norm()))
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)


def test_an_expanded_buffer():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = planted_model()
            self.register_buffer("mask", torch.ones(1, 8).expand(4, 8))

        def forward(self, x):
            return self.inner(x) * self.mask.sum()

    plan = rankopt.search(Masked(), "macs<=60%", example_inputs=planted_inputs())
    assert plan.totals["macs"]["measured"] <= 0.6 * plan.totals["macs"]["before"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_scripted_part_is_kept():
    model = nn.Sequential(torch.jit.script(nn.Linear(32, 32)), nn.Linear(32, 32))
    plan = rankopt.search(model, "params<=80%")
    assert "ScriptModule is not a layer" in plan["0"].reason
    assert plan["1"].method == "svd"
    with pytest.raises(ModelError, match="ScriptModule has no layer to decompose"):
        rankopt.search(torch.jit.script(nn.Linear(32, 32)), "params<=80%")

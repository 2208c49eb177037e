from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankopt
from rankopt.errors import BudgetError, BudgetInfeasible, ModelError, PlanError
from rankopt.strategy.relaxation import Relaxation
from rankopt.testing import ModelledClock, planted_inputs, planted_model


def train(soft, model, steps=60):
    x = torch.randn(128, 3, 12, 12)
    with torch.no_grad():
        target = model(x)
    optimiser = torch.optim.Adam(
        [{"params": soft.weights(), "lr": 1e-3}, {"params": soft.logits(), "lr": 0.1}]
    )
    soft.train()
    losses = []
    for step in range(steps):
        part = slice(32 * (step % 4), 32 * (step % 4 + 1))
        loss = F.mse_loss(soft(x[part]), target[part]) / target.var()
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        (loss + soft.penalty(step / (steps - 1))).backward()
        optimiser.step()
    soft.eval()
    return x, losses


def mean_entropy(soft):
    with torch.no_grad():
        return float(soft.entropy(soft.probabilities()))


def test_ranks_are_learned_and_the_built_model_computes_the_same():
    model = planted_model()
    before = [p.clone() for p in model.parameters()]
    soft = rankopt.soften(model, "macs<=50%", example_inputs=planted_inputs())
    entropy = mean_entropy(soft)
    x, losses = train(soft, model)
    assert losses[-1] < losses[0]
    assert mean_entropy(soft) < 0.5 * entropy
    plan = soft.discretise()
    assert 0.45 < plan.totals["macs"]["measured"] / plan.totals["macs"]["before"] <= 0.5
    assert soft.expected_cost()["macs"] <= 1.05
    assert rankopt.RankPlan.from_json(plan.to_json()) == plan
    small = soft.build(plan)
    with torch.no_grad(), soft.using(soft._certain(plan)):
        torch.testing.assert_close(small(x), soft(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("method", ["svd", "tucker2", "cp", "tt", "branched_tucker"])
def test_once_settled_it_trains_what_is_built(method):
    model = planted_model()
    budget = "macs<=97%" if method == "svd" else "macs<=60%"
    soft = rankopt.soften(
        model, budget, example_inputs=planted_inputs(), methods=[method]
    ).double()  # as accelerate moves models
    plan = soft.discretise()
    soft.settle(plan)
    assert not soft.scores.requires_grad
    optimiser = torch.optim.SGD(soft.weights(), lr=1e-2)
    x = torch.randn(32, 3, 12, 12, dtype=torch.float64)
    before = soft(x)
    (soft(x).square().mean() + soft.penalty(1.0)).backward()
    optimiser.step()
    soft.eval()
    with torch.no_grad():
        small = soft.build(plan).double()
        assert not torch.allclose(soft(x), before, rtol=1e-3)
        torch.testing.assert_close(small(x), soft(x), rtol=1e-4, atol=1e-5)


def test_half_precision_leaves_the_budget_exact():
    soft = rankopt.soften(planted_model(), "macs<=50%", example_inputs=planted_inputs()).eval()
    plain = soft.expected_cost(), soft.penalty(0.5).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (soft.expected_cost(), soft.penalty(0.5).item()) == plain


def test_a_built_model_can_be_saved(tmp_path):
    model = planted_model()
    soft = rankopt.soften(model, "params<=60%", example_inputs=planted_inputs())
    small = soft.build(soft.discretise()).eval()
    rankopt.save(small, tmp_path / "small.safetensors")
    same = rankopt.load(planted_model(), tmp_path / "small.safetensors")
    with torch.no_grad():
        assert torch.equal(same(planted_inputs()), small(planted_inputs()))


def test_untrained_it_is_a_plan_for_the_model_itself():
    model = planted_model()
    inputs = [planted_inputs(32)]
    soft = rankopt.soften(model, "macs<=60%", example_inputs=planted_inputs(), calibration=inputs)
    plan = soft.discretise()
    small = rankopt.apply(model, plan, calibration=inputs)
    assert small(planted_inputs()).isfinite().all()
    assert soft.discretise().decisions == plan.decisions


def test_trained_its_plan_is_not_for_the_model_itself(tmp_path):
    model = planted_model()
    soft = rankopt.soften(model, "params<=60%")
    with torch.no_grad():
        soft.logits()[0].add_(torch.rand(len(soft.logits()[0])))
    assert {d.factors.kind for d in soft.discretise().changes} == {"weights"}
    with torch.no_grad():
        soft.weights()[0].mul_(1.5)
    plan = soft.discretise()
    assert {d.factors.kind for d in plan.changes} == {"learned"}
    with pytest.raises(PlanError, match=r"factors are learned.*build"):
        rankopt.apply(model, plan)
    soft.settle(plan)
    small = soft.build(plan).eval()
    torch.testing.assert_close(small(planted_inputs()), soft.eval()(planted_inputs()))
    again = rankopt.soften(model, "params<=60%")
    again.load_state_dict(soft.state_dict())
    assert again.discretise().decisions == plan.decisions


def test_every_kind_of_layer_trains():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
            self.two.weight = self.one.weight  # tied: one site

        def forward(self, x):
            return self.two(torch.relu(self.one(x)))

    soft = rankopt.soften(Net(), "params<=60%", example_inputs=torch.randn(2, 16))
    loss = soft(torch.randn(4, 16)).square().mean() + soft.penalty(0.5)
    loss.backward()
    assert soft.model.one.weight.grad.abs().sum() > 0
    assert soft.logits()[0].grad.abs().sum() > 0
    small = soft.build(soft.discretise())
    assert small.one[0].weight is small.two[0].weight


def test_attention_is_unpacked():
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    soft = rankopt.soften(model, "params<=70%", example_inputs=x)
    assert soft.eval()(x).shape == x.shape
    assert soft.build(soft.discretise()).eval()(x).isfinite().all()


def test_mixed_precision_keeps_the_projections_exact():
    model = planted_model()
    soft = rankopt.soften(model, "params<=60%", example_inputs=planted_inputs()).eval()
    exact = soft.soft_weights()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert soft(planted_inputs()).dtype == torch.bfloat16
        mixed = soft.soft_weights()
    assert all(torch.equal(exact[name], mixed[name]) for name in exact)


def test_compiles():
    soft = rankopt.soften(nn.Sequential(nn.Linear(16, 16)), "params<=60%").eval()
    x = torch.randn(4, 16)
    compiled = torch.compile(soft, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), soft(x))


def test_state_survives_a_checkpoint():
    model = planted_model()
    arguments = {"budget": "params<=60%", "example_inputs": planted_inputs()}
    soft = rankopt.soften(model, **arguments)
    train(soft, model, steps=5)
    other = rankopt.soften(model, **arguments)
    other.load_state_dict(soft.state_dict())
    assert torch.equal(other.multipliers, soft.multipliers)
    assert other.discretise().decisions == soft.discretise().decisions


def test_frozen_models_are_refused():
    model = planted_model().requires_grad_(False)
    with pytest.raises(ModelError, match="every parameter of the model is frozen"):
        rankopt.soften(model, "params<=60%")


def test_integer_weights_are_refused():
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="int8, not floating point"):
        rankopt.soften(nn.Sequential(layer), "params<=60%")


def test_bad_requests():
    model = planted_model()
    with pytest.raises(BudgetError, match="needs a budget"):
        rankopt.soften(model, None)
    with pytest.raises(BudgetInfeasible, match="smallest reachable is params"):
        rankopt.soften(model, "params<=1%")
    soft = rankopt.soften(model, "params<=60%")
    with pytest.raises(ValueError, match=r"progress=1.5: expected a share"):
        soft.penalty(1.5)
    full = rankopt.Decision(("hidden",), ((64, 48),), "svd", {"ranks": [48]})
    decisions = [full if d.targets == ("hidden",) else d for d in soft.discretise()]
    plan = rankopt.RankPlan(model={}, decisions=tuple(decisions))
    with pytest.raises(ModelError, match=r"hidden: svd at ranks \[48\] is no option"):
        soft.build(plan)


def test_divergence_is_no_plan():
    soft = rankopt.soften(planted_model(), "params<=60%")
    with torch.no_grad():
        soft.logits()[0][3] = torch.nan
    with pytest.raises(ModelError, match="layer conv: its rank logits are not finite"):
        soft.discretise()


def test_latency_is_held_as_measured():
    model, clock = planted_model(), ModelledClock()
    table = rankopt.ProfileTable(clock=clock, rounds=3)
    budget = "latency<=80%, params<=70%"
    soft = rankopt.soften(model, budget, example_inputs=planted_inputs(), profile=table)
    cost = soft.probabilities() @ soft.shares
    gradient = torch.autograd.grad(cost[soft.relaxation.axes.index("latency")], soft.scores)[0]
    assert gradient.abs().sum() > 0
    train(soft, model, steps=20)
    plan = soft.discretise()
    assert plan.changes
    assert plan.budget == rankopt.Budget.parse(budget)
    assert plan.extensions["latency"]["high"] <= 0.8
    small = soft.build(plan)
    with torch.no_grad():
        times = [clock(lambda m=m: m(planted_inputs())) for m in (small, model)]
    assert times[0] <= 0.8 * times[1]


def test_milliseconds_are_a_share_of_the_dense_time():
    model, clock = planted_model(), ModelledClock()
    dense = clock(lambda: model(planted_inputs()))
    table = rankopt.ProfileTable(clock=clock, rounds=3)
    soft = rankopt.soften(
        model, f"latency_ms<={0.8 * dense:.4f}", example_inputs=planted_inputs(), profile=table
    )
    plan = soft.discretise()
    assert plan.changes
    assert plan.totals["latency"]["measured"] <= 0.8 * dense
    with pytest.raises(BudgetInfeasible, match="layer times foresee|the smallest reachable"):
        rankopt.soften(
            model, "latency<=1%", example_inputs=planted_inputs(), profile=table
        ).discretise()


def test_the_same_options_under_another_budget():
    soft = rankopt.soften(planted_model(), "params<=60%")
    half = soft.opened.problem.with_budget(rankopt.Budget.parse("params<=50%"))
    moved, made = soft.relaxation.within(half), Relaxation(half, soft=True)
    assert np.allclose(moved.shares, made.shares)
    assert np.allclose(moved.room, made.room)
    with pytest.raises(BudgetInfeasible, match="smallest reachable is params"):
        soft.relaxation.within(soft.opened.problem.with_budget(rankopt.Budget(params=0.01)))


def test_what_was_built_says_that_its_factors_are_learned(tmp_path):
    model = planted_model()
    soft = rankopt.soften(model, "params<=60%")
    small = soft.build(soft.discretise()).eval()
    rankopt.save(small, tmp_path / "small.safetensors")
    plan = rankopt.load_plan(tmp_path / "small.safetensors")
    assert {decision.factors.kind for decision in plan.changes} == {"learned"}
    with pytest.raises(PlanError, match=r"factors are learned.*rankopt.load\(model, file\)"):
        rankopt.apply(model, plan)


@pytest.mark.parametrize("method", ["svd", "cp"])
def test_settled_ranks_are_part_of_the_state(method):
    model, x = planted_model(), planted_inputs(4)
    soft, resumed = (rankopt.soften(model, "params<=80%", methods=[method]) for _ in range(2))
    loose = {key: value.clone() for key, value in soft.state_dict().items()}
    soft.settle(soft.discretise())
    resumed.load_state_dict(soft.state_dict())
    assert not resumed.scores.requires_grad
    assert torch.equal(resumed(x), soft(x))
    resumed.load_state_dict(loose)
    assert resumed.scores.requires_grad
    assert not torch.equal(resumed(x), soft(x))


@pytest.mark.parametrize("method", ["svd", "tucker2", "cp"])
def test_a_copy_has_weights_of_its_own(method):
    soft = rankopt.soften(planted_model(), "params<=80%", methods=[method])
    other, x = copy.deepcopy(soft), planted_inputs(4)
    before = soft(x)
    assert torch.equal(other(x), before)
    with torch.no_grad():
        for parameter in (*other.weights(), *other.logits()):
            parameter.add_(torch.randn_like(parameter))
    assert torch.equal(soft(x), before)
    assert not torch.equal(other(x), before)
    assert other.discretise().decisions


class SharedModule(nn.Module):
    """One module under two names, as in models that repeat a block."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(32, 32)
        self.b, self.c = self.a, nn.Linear(32, 32)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def test_a_module_of_two_names_keeps_its_weight():
    model, x = SharedModule(), torch.randn(8, 32)
    soft = rankopt.soften(model, "params<=50%")
    with torch.no_grad():
        assert torch.equal(soft(x), soft(x))
    for progress in (0.0, 1.0):
        (soft(x).square().mean() + soft.penalty(progress)).backward()
    plan = soft.discretise()
    with torch.no_grad(), soft.using(soft._certain(plan)):
        torch.testing.assert_close(soft.build(plan)(x), soft(x), rtol=1e-4, atol=1e-5)


def test_a_part_may_be_compiled():
    part = torch.compile(nn.Sequential(nn.Linear(32, 32), nn.ReLU()), backend="eager")
    soft = rankopt.soften(nn.Sequential(part, nn.Linear(32, 32)), "params<=50%")
    plan, x = soft.discretise(), torch.randn(4, 32)
    with torch.no_grad(), soft.using(soft._certain(plan)):
        torch.testing.assert_close(soft.build(plan)(x), soft(x), rtol=1e-4, atol=1e-5)


def test_what_is_built_in_inference_mode_can_be_trained():
    soft = rankopt.soften(nn.Sequential(nn.Linear(32, 32)), "params<=50%")
    with torch.inference_mode():
        small = soft.build(soft.discretise())
    small(torch.randn(4, 32)).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_another_default_dtype():
    model = nn.Sequential(nn.Linear(32, 32))
    torch.set_default_dtype(torch.float64)
    try:
        soft = rankopt.soften(model, "params<=50%")
        soft.penalty(0.1).backward()
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_budget_on_the_metric_is_refused():
    with pytest.raises(BudgetError, match="use rankopt.search"):
        rankopt.soften(nn.Sequential(nn.Linear(32, 32)), "metric_drop<=0.1, minimize=params")


def test_attention_left_dense_survives_a_file(tmp_path):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 3, 16)
    soft = rankopt.soften(model, "params<=90%", example_inputs=x)
    plan = soft.discretise()
    touched = {name for decision in plan.changes for name in decision.targets}
    assert touched
    assert not all(any(f"{i}.self_attn" in name for name in touched) for i in range(2))
    small = soft.build(plan).eval()
    rankopt.save(small, tmp_path / "soft.safetensors")
    again = rankopt.load(model, tmp_path / "soft.safetensors")
    assert torch.equal(again(x), small(x))

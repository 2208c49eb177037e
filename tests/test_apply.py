from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rankopt
from rankopt import Decision, RankPlan
from rankopt.errors import LayerError, ModelError, PlanError, RankoptWarning
from rankopt.testing import planted_inputs, planted_model


def small_net():
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def plan_for(model, **ranks):
    """A hand-written plan: layer name (dots as __) to ranks."""
    decisions = []
    for key, value in ranks.items():
        name = key.replace("__", ".").lstrip("_")
        shape = tuple(model.get_submodule(name).weight.shape)
        method = "svd" if len(value) == 1 else "tucker2"
        decisions.append(Decision((name,), (shape,), method, {"ranks": list(value)}))
    return RankPlan(model={}, decisions=tuple(decisions))


def test_full_rank_reproduces_the_model():
    model = planted_model()
    plan = plan_for(model, conv=(16, 32), grouped=(16, 16), point=(32,), hidden=(48,))
    x = planted_inputs()
    with torch.no_grad():
        expected, found = model(x), rankopt.apply(model, plan)(x)
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_everything_else_survives():
    model = small_net().to(memory_format=torch.channels_last).double()
    model[1].eval()
    model[3].weight.requires_grad_(False)
    model[6].bias.requires_grad_(False)
    plan = plan_for(model, _0=(4, 8), _3=(6, 9), _6=(3,))
    small = rankopt.apply(model, plan)
    assert type(small[0]) is nn.Sequential
    assert [name for name, _ in small[0].named_children()] == ["first", "core", "last"]
    assert small[0].core.weight.is_contiguous(memory_format=torch.channels_last)
    assert not small[0].core.weight.is_contiguous()
    assert {p.dtype for p in small.parameters()} == {torch.float64}
    assert small[0].training
    assert not small[1].training
    assert [p.requires_grad for p in small[3].parameters()] == [False] * 3
    assert small[6].first.weight.requires_grad
    assert not small[6].last.bias.requires_grad
    assert {"1.weight", "1.running_mean"} <= set(small.state_dict())


def test_the_new_model_shares_nothing_with_the_old():
    model = small_net()
    small = rankopt.apply(model, plan_for(model, _3=(6, 9)))
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for tensor in (*small.parameters(), *small.buffers()):
            tensor.add_(1)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_in_place_keeps_kept_parameters_and_optimizers_alive():
    model = small_net()
    kept, bias = model[0].weight, model[6].bias
    plan = plan_for(model, _3=(6, 9), _6=(3,))
    reference = rankopt.apply(model, plan)
    assert rankopt.apply_(model, plan) is model
    assert model[0].weight is kept
    assert model[6].last.bias is bias
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(model.eval()(x), reference.eval()(x))


def test_a_failure_in_place_leaves_the_model_alone():
    model = small_net()
    plan = plan_for(model, _3=(6, 9), _6=(3,))
    model[6].weight.data[0, 0] = float("nan")
    before = [id(module) for module in model.modules()]
    with pytest.raises(LayerError, match="layer 6: .*holds 1 NaN"):
        rankopt.apply_(model, plan)
    assert [id(module) for module in model.modules()] == before


@torch.no_grad()
def test_compiled_and_parallel_wrappers():
    model = small_net().eval()
    plan = plan_for(model, _3=(6, 9))
    x = torch.randn(2, 8, 6, 6)
    expected = rankopt.apply(model, plan)(x)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(rankopt.apply(compiled, plan)(x), expected)
    assert torch.equal(rankopt.apply(nn.DataParallel(model), plan)(x), expected)
    inner = small_net().eval()
    inner.load_state_dict(model.state_dict())
    inner[3] = torch.compile(inner[3], backend="eager")
    assert torch.equal(rankopt.apply(inner, plan)(x), expected)


def test_results_compile_and_export():
    model = small_net().eval()
    small = rankopt.apply(model, plan_for(model, _0=(4, 8), _6=(3,)))
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        expected = small(x)
        assert torch.allclose(torch.export.export(small, (x,)).module()(x), expected, atol=1e-5)
        assert torch.allclose(torch.compile(small, backend="eager")(x), expected, atol=1e-5)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 24)
        self.b.weight = self.a.weight
        self.again = self.a
        self.c = nn.Linear(24, 24)

    def forward(self, x):
        return self.c(self.again(self.b(self.a(x))))


def test_tied_weights_and_layers_used_twice(tmp_path):
    model = Tied()
    x = torch.randn(3, 24)
    plan = rankopt.search(model, "macs<=50%", example_inputs=x)
    assert plan["a"].targets == ("a", "b")
    before, _ = plan["a"].cost["macs"]
    assert before == 3 * 3 * 24 * 24  # a twice, b once, batch of three
    small = rankopt.apply(model, plan)
    assert small.a is small.again
    assert small.a.first.weight is small.b.first.weight
    assert small.a.last.bias is not small.b.last.bias
    rankopt.save(small, tmp_path / "tied.safetensors")
    again = rankopt.load(Tied(), tmp_path / "tied.safetensors")
    assert again.a.first.weight is again.b.first.weight
    assert torch.equal(again(x), small(x))
    assert rankopt.compare(model, small, example_inputs=x, rounds=3).macs.ratio <= 0.5


def test_tied_to_an_embedding_is_kept():
    model = nn.ModuleDict(
        {"e": nn.Embedding(50, 32), "fc": nn.Linear(32, 50), "x": nn.Linear(32, 32)}
    )
    model["fc"].weight = model["e"].weight
    plan = rankopt.search(model, "params<=90%")
    assert plan["fc"].reason == "keep: its weight is tied to Embedding e"
    assert "not a layer rankopt decomposes" in plan["e"].reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_the_cpu(dtype):
    model = planted_model().to(dtype)
    plan = rankopt.search(model, "params<=60%")
    small = rankopt.apply(model, plan)
    assert {p.dtype for p in small.parameters()} == {dtype}
    reference = rankopt.apply(model.float(), RankPlan(model={}, decisions=plan.decisions))
    x = planted_inputs()
    with torch.no_grad():
        error = (small.float()(x) - reference(x)).norm() / reference(x).norm()
    assert error < 0.05  # the rounding of the factors to half precision


def test_a_plan_for_other_weights_warns():
    plan = rankopt.search(planted_model(0), "params<=60%")
    with pytest.warns(RankoptWarning, match="made for other weights"):
        rankopt.apply(planted_model(1), plan)


@pytest.mark.parametrize(
    ("decision", "match"),
    [
        (Decision(("nope",), ((4, 4),), "svd", {"ranks": [1]}), "layer nope: .*found no such"),
        (
            Decision(("6",), ((10, 33),), "svd", {"ranks": [1]}),
            r"layer 6: expected a weight \[10, 33\], found \[10, 32\]",
        ),
        (Decision(("6",), ((10, 32),), "svd", {"ranks": [11]}), "rank 11 is outside 1 to 10"),
        (Decision(("6",), ((10, 32),), "svd", {"ranks": [2, 2]}), r"takes 1 rank\(s\)"),
        (Decision(("6",), ((10, 32),), "tucker2", {"ranks": [2, 2]}), "tucker2 cannot treat it"),
        (Decision(("6",), ((10, 32),), "fuse", {"ranks": [2]}), "unknown decomposition 'fuse'"),
        (Decision(("6",), ((10, 32),), "svd", {"ranks": [2], "x": 1}), "has no setting x"),
        (
            Decision(("6",), ((10, 32),), "svd", {"ranks": [2], "stride_on": "?"}),
            "layer 6: stride_on",
        ),
    ],
)
def test_plans_that_do_not_fit(decision, match):
    model = small_net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match=match):
        rankopt.apply_(model, RankPlan(model={}, decisions=(decision,)))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_plan_for_another_model():
    plan = rankopt.search(small_net(), "params<=60%")
    wider = small_net()
    wider[6] = nn.Linear(32, 11)
    with pytest.raises(PlanError, match=r"layer 6: the plan expected a weight \[10, 32\], found"):
        rankopt.apply(wider, plan)
    with pytest.raises(
        PlanError, match="layer 0: expected by the plan .* not found in this Linear"
    ):
        rankopt.apply(nn.Linear(8, 8), plan)
    extra = small_net()
    extra.register_buffer("scale", torch.ones(3))
    with pytest.raises(PlanError, match="other parameters or buffers"):
        rankopt.apply(extra, plan)


def test_data_aware_plans_are_never_applied_from_weights():
    decision = Decision(
        ("6",),
        ((10, 32),),
        "svd",
        {"ranks": [2]},
        factors=rankopt.plan.Factors("whitened", "a" * 64),
    )
    with pytest.raises(rankopt.errors.RankoptError, match="layer 6: its factors are 'whitened'"):
        rankopt.apply(small_net(), RankPlan(model={}, decisions=(decision,)))


def test_root_layer():
    model = nn.Linear(64, 64)
    plan = rankopt.search(model, "params<=50%")
    small = rankopt.apply(model, plan)
    assert small(torch.randn(2, 64)).shape == (2, 64)
    with pytest.raises(PlanError, match="replaces the root module"):
        rankopt.apply_(model, plan)


def test_meta_and_lazy_models():
    with torch.device("meta"):
        meta = small_net()
    with pytest.raises(ModelError, match=r"0.weight is on the meta device.*to_empty"):
        rankopt.search(meta, "params<=50%")
    with pytest.raises(ModelError, match="not initialised; run the lazy model once"):
        rankopt.search(nn.LazyLinear(3), "params<=50%")
    plan = rankopt.search(small_net(), "params<=60%")
    with pytest.raises(ModelError, match="meta device"):
        rankopt.apply(meta, plan)


def test_models_that_cannot_be_copied():
    model = small_net()
    model.generator = (x for x in ())
    with pytest.raises(ModelError, match="Sequential cannot be .* generator is a generator"):
        rankopt.search(model, "params<=60%")


def test_layers_of_one_decision_share_their_weight():
    def two(tied):
        model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
        if tied:
            model[2].weight = model[0].weight
        return model.eval()

    plan = rankopt.search(two(tied=True), "params<=60%")
    assert plan.changes[0].targets == ("0", "2")
    with pytest.raises(PlanError, match="layers 0 and 2: the plan gives them one set of factors"):
        rankopt.apply(two(tied=False), plan)

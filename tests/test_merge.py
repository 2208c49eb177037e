from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import rankopt
from rankopt import measure
from rankopt.bottlenecks import find_bottlenecks
from rankopt.channels import _order, prepare
from rankopt.errors import (
    BudgetError,
    BudgetInfeasible,
    LayerError,
    ModelError,
    PlanError,
    RankoptWarning,
)
from rankopt.plan import Factors, RankPlan

# Rounding of float32 forward passes, relative to the output.
FLOAT32 = 1e-4


class Block(nn.Module):
    """A bottleneck of torchvision's form, its ReLU shared."""

    def __init__(self, channels=24, width=16, groups=1, stride=1, bias=False):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=bias)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=bias)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=bias)
        self.bn3 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.residual = stride == 1

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        return self.relu(out + x) if self.residual else self.relu(out)


class Net(nn.Module):
    def __init__(self, **block):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.blocks = nn.Sequential(Block(**block), Block(**block))
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def settled(model, seed=0):
    """The model with norms that have seen data and learned something, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.uniform_(-0.5, 0.5, generator=generator)
    model.train()
    with torch.no_grad():
        for _ in range(8):
            model(images(seed=seed))
    return model.eval()


def images(count=32, seed=0, size=8):
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(count, 3, size, size, generator=generator)
    return nn.functional.avg_pool2d(flat, 3, 1, 1) * 2


def distance(model, other, x):
    with torch.no_grad():
        return float((model(x) - other(x)).norm() / model(x).norm())


def planned(model, ranks, factors=None):
    """A plan that merges every bottleneck of `model` to `ranks`."""
    plan = rankopt.merge_plan(model)
    decisions = [
        d
        if d.keeps
        else replace(d, args={**d.args, "ranks": list(ranks)}, factors=factors or d.factors)
        for d in plan
    ]
    return replace(plan, decisions=tuple(decisions), totals={})


# Structure


@pytest.mark.parametrize("groups", [1, 4])
def test_keeps_three_convolutions_at_the_new_width(groups):
    model = settled(Net(groups=groups))
    before = copy.deepcopy(model.state_dict())
    small = rankopt.merge(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert list(small.state_dict()) == list(before)
    assert type(small) is Net
    assert type(small.blocks[0]) is Block
    block = small.blocks[1]
    assert (block.conv1.out_channels, block.bn1.num_features) == (8, 8)
    assert (block.conv2.in_channels, block.conv2.out_channels, block.conv2.groups) == (8, 8, groups)
    assert (block.conv3.in_channels, block.bn3.num_features) == (8, 24)
    assert torch.equal(small.stem.weight, model.stem.weight)
    assert small(images()).shape == (32, 10)
    assert rankopt.compare(model, small).params.ratio < 1


def test_type_dtype_layout_mode_and_flags_survive():
    model = settled(Net(bias=True)).double().to(memory_format=torch.channels_last)
    model.train()
    model.blocks[0].bn1.eval()
    model.blocks[0].conv2.weight.requires_grad_(False)
    model.blocks[1].bn2.eps = 0.25
    small = rankopt.merge(model)
    assert small.blocks[0].conv2.weight.dtype == torch.float64
    assert small.blocks[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    modes = [module.training for module in model.modules()]
    assert [module.training for module in small.modules()] == modes
    flags = [parameter.requires_grad for parameter in model.parameters()]
    assert [parameter.requires_grad for parameter in small.parameters()] == flags
    assert small.blocks[1].bn2.eps == 0.25
    bfloat = rankopt.merge(settled(Net()).bfloat16(), calibration=[images().bfloat16()])
    assert bfloat.blocks[0].conv2.weight.dtype == torch.bfloat16


def test_compiles_and_exports():
    small = rankopt.merge(settled(Net()))
    x = images(4)
    with torch.no_grad():
        assert torch.allclose(torch.compile(small, backend="eager")(x), small(x), atol=1e-5)


# Values


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("aware", [False, True])
def test_full_width_changes_nothing(groups, aware):
    model = settled(Net(groups=groups, bias=True, stride=2))
    factors = Factors("whitened+output", "0" * 64) if aware else None
    plan = planned(model, (16, 16), factors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankoptWarning)  # of the made-up digest
        small = rankopt.apply(model, plan, calibration=[images()] if aware else None)
    for norm in (m for m in small.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.load_state_dict(norm.state_dict())
    if aware:  # statistics are settled anew: compare what was fitted
        small.load_state_dict(
            {k: v for k, v in model.state_dict().items() if "bn" in k}, strict=False
        )
    assert distance(model, small, images(seed=3)) < FLOAT32


@pytest.mark.parametrize("aware", [False, True])
def test_redundant_channels_cost_nothing(aware):
    """Channels that are multiples of others pass ReLU as such, and are rebuilt exactly."""
    model = settled(Net())
    for block in model.blocks:
        with torch.no_grad():
            for conv, norm in ((block.conv1, block.bn1), (block.conv2, block.bn2)):
                for values in (conv.weight, norm.bias, norm.weight, norm.running_mean):
                    values[8:] = values[:8]
                norm.running_var[8:] = norm.running_var[:8]
                norm.weight[8:] *= 3  # h and 3h
                norm.bias[8:] *= 3
    x = images(seed=5)
    sizes = {}
    small = rankopt.merge(model, calibration=[images()] if aware else None)
    for name, module in small.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            sizes[name] = module.num_features
    assert sizes["blocks.0.bn2"] == 8
    assert distance(model, small, x) < 10 * FLOAT32 if not aware else 0.02


def test_calibration_helps_and_recovers():
    model = settled(Net())
    data, x = [images(seed=s) for s in range(4)], images(64, seed=9)
    blind, fitted = rankopt.merge(model), rankopt.merge(model, calibration=data)
    assert distance(model, fitted, x) < 0.8 * distance(model, blind, x)
    # The layers that `recover` watches must be those whose widths have not changed.
    done = rankopt.recover(fitted, teacher=model, calibration=data, seconds=1)
    assert done.steps > 0


@pytest.mark.parametrize(("groups", "mixed"), [(1, False), (4, False), (4, True)])
def test_lost_energy_is_what_least_squares_leaves(groups, mixed):
    torch.manual_seed(1)
    root, outer = torch.randn(16, 40).double(), torch.randn(12, 16).double()
    second, demand = root @ root.T, outer.T @ outer
    if not mixed:
        mask = torch.block_diag(*[torch.ones(16 // groups, 16 // groups)] * groups)
        second, demand = second * mask, demand * mask
    side = _order(second, demand, groups, mixed=mixed)
    assert sorted(side.order.tolist()) == list(range(16))
    for count in range(1, 16 // groups + 1):
        kept = side.chosen(count * groups)
        per_group = torch.bincount(kept // (16 // groups), minlength=groups)
        assert per_group.tolist() == [count] * groups
        left = second - side.rebuild(count * groups) @ second[kept]
        expected = float((demand * left).sum() / (demand * second).sum())
        assert side.energy[count] == pytest.approx(expected, abs=1e-5)
    assert np.all(np.diff(side.energy) <= 0)
    assert (side.energy[0], side.energy[-1]) == (1.0, 0.0)


def test_chooses_better_than_chance():
    """The greedy choice against every pair of channels: within 5% of the best."""
    torch.manual_seed(2)
    root, outer = torch.randn(8, 30).double(), torch.randn(6, 8).double()
    second, demand = root @ root.T, outer.T @ outer
    side = _order(second, demand, 1, mixed=True)
    losses = []
    for pair in torch.combinations(torch.arange(8), 2):
        inner = second[pair][:, pair]
        left = second - second[:, pair] @ torch.linalg.solve(inner, second[pair])
        losses.append(float((demand * left).sum() / (demand * second).sum()))
    assert side.energy[2] <= 1.05 * min(losses)


# Plans


def test_plan_round_trips_and_is_carried_out_as_written(tmp_path):
    model = settled(Net())
    data = [images()]
    plan = rankopt.merge_plan(model, example_inputs=images(2), calibration=data)
    plan.save(tmp_path / "plan.json")
    assert RankPlan.load(tmp_path / "plan.json") == plan
    decision = plan["blocks.0.conv2"]
    assert decision.method == "merge"
    assert decision.targets == tuple(f"blocks.0.conv{i}" for i in (1, 2, 3))
    assert decision.args == {
        "ranks": [8, 8],
        "norms": ["blocks.0.bn1", "blocks.0.bn2"],
        "between": "keep",
    }
    assert decision.factors.kind == "whitened+output"
    assert plan["stem"].reason == "keep: in no bottleneck"
    for entry in plan.totals.values():
        assert entry["predicted"] == entry["measured"] < entry["before"]
    small = rankopt.apply(model, plan, calibration=data)
    for axis, count in (("params", measure.count_params), ("memory", measure.count_memory)):
        assert count(small) == plan.totals[axis]["measured"]
    assert measure.count_macs(small, images(2)) == plan.totals["macs"]["measured"]
    with pytest.raises(PlanError, match=r"apply\(..., calibration=...\)"):
        rankopt.apply(model, plan)
    with pytest.warns(RankoptWarning, match="calibration inputs are not those"):
        rankopt.apply(model, plan, calibration=[images(seed=8)])


def test_save_and_load(tmp_path):
    model = settled(Net(groups=4))
    small = rankopt.merge(model, calibration=[images()])
    rankopt.save(small, tmp_path / "small.safetensors")
    same = rankopt.load(Net(groups=4), tmp_path / "small.safetensors")
    assert torch.equal(same.eval()(images()), small(images()))
    with pytest.raises(PlanError, match=r"expected a weight|expected by the plan|other parameters"):
        rankopt.load(Net(width=32), tmp_path / "small.safetensors")


def test_in_place_and_beside_decompositions():
    model = settled(Net())
    plan = rankopt.merge_plan(model, only=["blocks.0.*"])
    other = rankopt.search(model, None, strategy="parameter_ratio", only=["head"])
    decisions = [other["head"] if d.targets == ("head",) else d for d in plan]
    plan = replace(plan, decisions=tuple(decisions), totals={})
    small = rankopt.apply(model, plan)
    same = copy.deepcopy(model)
    rankopt.apply_(same, plan)
    assert torch.equal(same(images()), small(images()))
    assert isinstance(small.head, nn.Sequential)
    assert small.blocks[0].conv2.in_channels == 8
    assert small.blocks[1].conv2.in_channels == 16


def test_plans_that_do_not_fit():
    model = settled(Net())
    plan = rankopt.merge_plan(model)
    with pytest.raises(PlanError, match=r"blocks.0.conv1: expected weight|layer blocks"):
        rankopt.apply(settled(Net(width=32)), plan)
    free = replace(plan, model={"class": "Net"})

    def changed(**fields):
        first = next(d for d in free if not d.keeps)
        swapped = replace(first, **fields)
        return replace(free, decisions=tuple(swapped if d is first else d for d in free))

    args = free["blocks.0.conv1"].args
    for fields, message in (
        ({"targets": ("conv1", "blocks.0.conv2", "blocks.0.conv3")}, "a bottleneck of conv1"),
        ({"args": {**args, "ranks": [8, 17]}}, "output rank 17 is outside 1 to 16"),
        ({"args": {**args, "ranks": [8]}}, r"takes 2 ranks \(input, output\), got \[8\]"),
        ({"args": {**args, "norms": ["a", "b"]}}, "expected norms"),
        ({"args": {**args, "branches": 2}}, "merge has no setting branches"),
        ({"shapes": ((1, 1), (1, 1), (1, 1))}, "expected weights"),
        ({"args": {**args, "between": "?"}}, r"between '\?': expected one of keep, drop"),
        ({"args": {**args, "between": "drop"}}, "fitted to calibration"),
    ):  # fmt: skip
        with pytest.raises(PlanError, match=message):
            rankopt.apply(model, changed(**fields))
    grouped = settled(Net(groups=4))
    with pytest.raises(PlanError, match="rank 6 is no multiple of the 4 groups"):
        rankopt.apply(grouped, planned(grouped, (6, 8)))
    deep = settled(Net(groups=16))
    with pytest.raises(PlanError, match="cannot be merged: blocks.0.conv2 is depthwise"):
        rankopt.apply(deep, replace(free, decisions=merged_by_hand(deep)))


def merged_by_hand(model):
    return tuple(
        rankopt.Decision(
            block.targets,
            tuple(layer.shape for layer in block.layers),
            "merge",
            {"ranks": [16, 16], "norms": list(block.norms)},
        )
        for block in find_bottlenecks(model)
    )


# Nothing between


def linear_block():
    """A bottleneck whose activations change nothing on positive values, one used once."""
    model = nn.Sequential(
        nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1, stride=2),
    )  # fmt: skip
    with torch.no_grad():
        for index in (1, 4):
            model[index].bias.fill_(50.0)
    return model.eval()


def test_dropping_is_exact_where_activations_do_nothing():
    model = linear_block()
    with torch.no_grad():  # half of the channels carry all there is
        for conv in (model[0], model[3]):
            conv.weight[4:] = conv.weight[:4]
        model[0].bias[4:] = model[0].bias[:4]
    data = [torch.randn(64, 6, 9, 9)]
    plan = rankopt.merge_plan(model, calibration=data, between="drop", example_inputs=data[0])
    small = rankopt.apply(model, plan, calibration=data)
    assert type(small) is nn.Sequential
    assert [type(small[i]) for i in (1, 2, 4, 5)] == [nn.Identity] * 4
    assert measure.count_params(small) == plan.totals["params"]["measured"]
    assert plan.totals["memory"]["predicted"] == plan.totals["memory"]["measured"]
    assert distance(model, small, torch.randn(8, 6, 9, 9)) < 0.01


def test_dropping_shared_activations(tmp_path):
    model = settled(Net())
    data, x = [images(seed=s) for s in range(2)], images(seed=7)
    plan = rankopt.merge_plan(model, calibration=data, between="drop", ratio=0.75)
    small = rankopt.apply(model, plan, calibration=data)
    block = small.blocks[0]
    assert isinstance(block, torch.fx.GraphModule)
    assert isinstance(block.bn1, nn.Identity)
    assert not any(module.training for module in small.modules())
    with torch.no_grad():
        seen = []
        block.relu.register_forward_hook(lambda *_: seen.append(1))
        small(x)
    assert len(seen) == 1  # only the one after the sum
    assert distance(model, small, x) < 0.5
    same = copy.deepcopy(model)
    rankopt.apply_(same, plan, calibration=data)
    assert torch.equal(same(x), small(x))
    rankopt.save(small, tmp_path / "s.safetensors")
    assert torch.equal(rankopt.load(Net(), tmp_path / "s.safetensors").eval()(x), small(x))
    inner, rows = Block().eval(), [torch.randn(64, 24, 8, 8)]
    own = rankopt.merge_plan(inner, calibration=rows, between="drop")
    with pytest.raises(PlanError, match="replaces the root module Block itself"):
        rankopt.apply_(inner, own, calibration=rows)
    with pytest.raises(ModelError, match="between='drop' needs calibration="):
        rankopt.merge(model, between="drop")
    with pytest.raises(ValueError, match="between='fold'"):
        rankopt.merge(model, between="fold")


# Budgets


@pytest.mark.parametrize("calibrated", [False, True])
def test_meets_budgets_on_the_built_model(calibrated):
    model = settled(Net())
    data = [images()] if calibrated else None
    errors = []
    for share in (75, 85, 95):
        budget = f"macs<={share}%, params<={share}%"
        plan = rankopt.merge_plan(model, budget, example_inputs=images(2), calibration=data)
        for axis in ("macs", "params"):
            entry = plan.totals[axis]
            assert entry["predicted"] == entry["measured"] <= share / 100 * entry["before"]
        errors.append(sum(d.error**2 for d in plan.changes))
    assert errors == sorted(errors, reverse=True)
    with pytest.raises(BudgetInfeasible, match="smallest reachable by merging 2 bottlenecks") as e:
        rankopt.merge_plan(model, "params<=1%")
    assert 0.01 < e.value.smallest["params"] < 1


def test_spends_where_channels_are_needed():
    """The block with redundant channels is narrowed, the other kept wider."""
    model = settled(Net())
    block = model.blocks[0]
    with torch.no_grad():
        for values in (block.conv1.weight, block.bn1.weight, block.bn1.bias):
            values[4:] = values[:4].repeat(3, *(1,) * (values.dim() - 1))
    plan = rankopt.merge_plan(model, "params<=80%")
    narrowed, other = plan["blocks.0.conv2"].ranks, plan["blocks.1.conv2"].ranks
    assert narrowed[0] <= 7
    assert not other or other[0] > narrowed[0]


def test_multiples_and_ratios():
    model = settled(Net(groups=4))
    plan = rankopt.merge_plan(model, "params<=80%", round_to=8)
    assert all(rank % 8 == 0 for d in plan.changes for rank in d.ranks)
    assert rankopt.merge_plan(model, ratio=0.3).changes[0].ranks == (4, 4)
    whole = rankopt.merge_plan(model, ratio=1.0)
    assert not whole.changes
    assert whole["blocks.0.conv2"].reason == "keep: 1 of the width is the whole of it"


def test_only_and_ignore():
    model = settled(Net())
    assert [d.targets[1] for d in rankopt.merge_plan(model, ignore=["*.1.conv2"]).changes] == [
        "blocks.0.conv2"
    ]
    reason = rankopt.merge_plan(model, only="blocks.1.*")["blocks.0.conv2"].reason
    assert reason == "keep: blocks.0.conv1: not among only="


def test_bad_requests():
    model = settled(Net())
    with pytest.raises(ModelError, match="no bottleneck to merge: blocks.0.conv2: .* is depthwise"):
        rankopt.merge(settled(Net(groups=16)))
    with pytest.raises(ModelError, match="no k×k convolution lies between two 1x1"):
        rankopt.merge(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(BudgetError, match="needs example_inputs"):
        rankopt.merge_plan(model, "macs<=50%")
    with pytest.raises(BudgetError, match="not on latency"):
        rankopt.merge_plan(model, "latency<=50%")
    with pytest.raises(ValueError, match="give one of them"):
        rankopt.merge_plan(model, "params<=50%", ratio=0.5)
    for ratio in (0, 1.5, True, "half"):
        with pytest.raises(ValueError, match="expected a share above 0"):
            rankopt.merge_plan(model, ratio=ratio)
    with pytest.raises(ValueError, match="round_to=0"):
        rankopt.merge_plan(model, round_to=0)
    with torch.no_grad():
        model.blocks[1].conv3.weight[0, 0] = torch.nan
    with pytest.raises(LayerError, match="blocks.1.conv3: its weight .* holds 1 NaN"):
        rankopt.merge(model)


def test_without_norms_in_one_dimension():
    model = nn.Sequential(
        nn.Conv1d(12, 8, 1),
        nn.GELU(),
        nn.Conv1d(8, 8, 5, padding=2),
        nn.Tanh(),
        nn.Conv1d(8, 12, 1),
    )
    data = [torch.randn(16, 12, 20)]
    small = rankopt.merge(model, calibration=data)
    assert small[2].weight.shape == (4, 4, 5)
    assert distance(model, small, data[0]) < 1
    basis = prepare(dict(model.named_modules()), find_bottlenecks(model)[0])
    assert 0 < basis.error((4, 4)) < 1


def test_a_block_whose_graph_depends_on_its_mode():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 6, 1)

        def forward(self, x):
            x = self.c(self.b(torch.relu(self.a(x))))
            return nn.functional.dropout(x, 0.1, self.training)

    model, data = Net().eval(), [torch.randn(16, 6, 5, 5)]
    assert rankopt.merge(model, calibration=data).b.in_channels == 4
    with pytest.raises(LayerError, match="layer b: its activations cannot be dropped: .* its mode"):
        rankopt.merge(model, calibration=data, between="drop")

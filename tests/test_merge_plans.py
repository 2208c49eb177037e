"""Plans of merging: as written, under budgets, and refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from merging import Net, distance, images, planned, settled
from torch import nn

import rankopt
from rankopt._merging.bottlenecks import find_bottlenecks
from rankopt._merging.channels import prepare
from rankopt._model import measure
from rankopt.errors import (
    BudgetError,
    BudgetInfeasible,
    CalibrationError,
    LayerError,
    ModelError,
    PlanError,
    RankoptWarning,
)
from rankopt.plan import RankPlan

# Plans


def test_calibration_that_the_model_cannot_take_is_what_is_named():
    model = settled(Net())
    for ask in (rankopt.merge_plan, rankopt.merge):
        with pytest.raises(CalibrationError, match=r"a calibration batch of \[4, 5, 8, 8\]"):
            ask(model, calibration=[torch.randn(4, 5, 8, 8)])


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


class Keywords(nn.Module):
    """A bottleneck whose layers are called by keyword, and what else hangs on it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(24, 16, 1), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 24, 1)
        self.norm, self.gate = nn.BatchNorm2d(16), nn.Linear(24, 24)
        self.register_buffer("scale", torch.ones(1))

    def gated(self, x):
        return self.gate(x.mean((2, 3)))

    def forward(self, x):
        inner = self.b(input=torch.relu(self.norm(input=self.a(input=x))))
        return self.c(input=torch.relu(inner))


@pytest.mark.parametrize("between", ["keep", "drop"])
def test_calls_by_keyword_and_members_outside_the_graph(between):
    model, data = nn.Sequential(Keywords()).eval(), [torch.randn(16, 24, 5, 5)]
    small = rankopt.merge(model, calibration=data, between=between)
    assert distance(model, small, data[0]) < 1
    assert {"0.gate.weight", "0.scale"} < set(copy.deepcopy(small).state_dict())


def test_a_block_that_is_more_than_its_forward():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Keywords()

        def forward(self, x):
            return self.block.gated(self.block(x))

    model, data = Net().eval(), [torch.randn(16, 24, 5, 5)]
    assert rankopt.merge(model, calibration=data)(data[0]).shape == (16, 24)
    with pytest.raises(ModelError, match="compressed Net fails .* no attribute 'gated'"):
        rankopt.merge_plan(model, calibration=data, between="drop")


def test_a_convolution_called_outside_of_its_block():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(Keywords(), Keywords())

        def forward(self, x):
            aside = self.body[0].a(x) if x.sum() > -1e9 else x  # which torch.fx cannot trace
            return self.body(x), aside

    plan = rankopt.merge_plan(Net().eval(), example_inputs=torch.randn(2, 24, 9, 9))
    assert "called 2, 1, 1 times" in plan["body.0.b"].reason
    assert [d.targets[1] for d in plan.changes] == ["body.1.b"]


def test_lazy_models_are_named():
    with pytest.raises(ModelError, match="parameter 0.weight is not initialised"):
        rankopt.merge_plan(nn.Sequential(nn.LazyConv2d(32, 1)))


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

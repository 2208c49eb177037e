"""Merged bottlenecks: structure, values, and blocks with nothing in between."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from merging import FLOAT32, Block, Net, distance, images, planned, settled
from torch import nn

import rankopt
from rankopt._merging.channels import _order
from rankopt._model import measure
from rankopt.errors import (
    ModelError,
    PlanError,
    RankoptWarning,
)
from rankopt.plan import Factors

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
    done = rankopt.recover(fitted, teacher=model, calibration=data, steps=10)
    assert done.steps == 10


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


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(32, 16, 1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv3 = nn.Conv2d(16, 32, 1)

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return self.conv3(y) * (1 + self.scale())

    def scale(self):
        return 0


class ReadsAWeight(Reader):
    def scale(self):
        return self.conv2.weight.abs().sum()


class ReadsANorm(Reader):
    def scale(self):
        return self.bn2.weight.abs().sum()


class ReadsAWidth(Reader):
    def scale(self):
        return self.bn2.num_features


@pytest.mark.parametrize("kind", [ReadsAWeight, ReadsANorm, ReadsAWidth])
@pytest.mark.parametrize("inputs", ["none", "example_inputs", "calibration"])
def test_blocks_whose_own_forward_reads_them_stay(kind, inputs):
    x = torch.randn(8, 32, 6, 6)
    given = {
        "none": {},
        "example_inputs": {"example_inputs": x},
        "calibration": {"calibration": [x]},
    }
    assert rankopt.merge(Reader().eval(), **given[inputs]).conv2.out_channels < 16
    with pytest.raises(ModelError, match="its (weight|num_features) is read"):
        rankopt.merge(kind().eval(), **given[inputs])

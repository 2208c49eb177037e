"""Promises that are easy to break: the user's model, threads, files, odd signatures."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

import rankopt
from rankopt._calibration.batchnorm import recalibrate
from rankopt._model import surgery
from rankopt._model.inputs import hold
from rankopt.errors import CalibrationError, CheckpointError, RankoptWarning
from rankopt.testing import planted_inputs, planted_model


class Merging(nn.Module):
    """An adapter layer in the manner of loralib: eval mode merges, train mode unmerges."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(32, 32)
        self.delta = nn.Parameter(torch.randn(32, 32))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            with torch.no_grad():
                self.fc.weight.add_(self.delta, alpha=-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x):
        return self.fc(x) + (0 if self.merged else x @ self.delta.T)


@pytest.mark.parametrize("calibrated", [False, True])
def test_forwards_that_write_do_not_reach_the_users_model(calibrated):
    renormed = nn.Sequential(nn.Embedding(50, 32, max_norm=1.0), nn.Linear(32, 32))
    merging = nn.Sequential(Merging(), nn.Linear(32, 32)).train()
    for model, x in ((renormed, torch.arange(50)[None]), (merging, torch.randn(8, 32))):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        plan = rankopt.search(
            model, "params<=90%", example_inputs=x, calibration=[x] if calibrated else None
        )
        rankopt.apply(model, plan, calibration=[x] if calibrated else None)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_compare_undoes_what_eval_mode_does():
    model = Merging().train()
    before = model.fc.weight.clone()
    rankopt.compare(model, model, example_inputs=torch.randn(2, 32), rounds=3)
    assert not model.merged
    assert torch.allclose(model.fc.weight, before, atol=1e-5)


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.free = nn.Linear(32, 32)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x.to(layer.weight.dtype))
        return self.free(x)


def test_searches_in_threads_do_not_see_each_other():
    failures = []

    def work():
        try:
            model, x = Listed(), torch.randn(2, 32)
            plan = rankopt.search(model, "params<=95%", example_inputs=x)
            assert [d.targets for d in plan.changes] == [("free",)]
            rankopt.apply(model, plan)(x)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"fc": nn.Linear(32, 32)})
        self.items = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])
        self.free = nn.Linear(32, 32)

    def forward(self, x):
        x = x.to(self.inner.fc.weight.dtype)
        return self.free(
            self.items[1](self.items[0](self.inner["fc"](x.to(self.items[0].weight.dtype))))
        )


def test_source_is_read_through_attributes_and_indices():
    plan = rankopt.search(Deep(), "params<=90%")
    assert {d.targets[0] for d in plan.changes} == {"free"}


@pytest.mark.parametrize("first", [None, 4000])
def test_saving_again_in_another_form_leaves_nothing_stale(first, tmp_path):
    model = planted_model()
    small = rankopt.apply(model, rankopt.search(model, "params<=60%", strategy="energy"))
    path = tmp_path / "s.safetensors"
    sizes = {"max_shard_bytes": 4000}
    rankopt.save(small, path, **(sizes if first else {}))
    with torch.no_grad():
        small.conv.core.weight.add_(1)
    rankopt.save(small, path, **({} if first else sizes))
    assert torch.equal(rankopt.load(model, path).conv.core.weight, small.conv.core.weight)


def test_loading_into_a_skeleton_on_the_meta_device(tmp_path):
    model = planted_model()
    small = rankopt.apply(model, rankopt.search(model, "params<=60%"))
    rankopt.save(small, tmp_path / "s.safetensors")
    with torch.device("meta"):
        skeleton = type(model)()
    again = rankopt.load(skeleton, tmp_path / "s.safetensors").eval()
    assert torch.equal(again(planted_inputs()), small(planted_inputs()))

    holder = nn.Sequential(nn.Linear(32, 32))
    holder.register_buffer("table", torch.ones(3), persistent=False)
    rankopt.save(
        rankopt.apply(holder, rankopt.search(holder, "params<=60%")), tmp_path / "b.safetensors"
    )
    with pytest.raises(CheckpointError, match="buffer table is on the meta device"):
        rankopt.load(holder.to("meta"), tmp_path / "b.safetensors")


def test_recover_is_all_or_nothing():
    teacher = planted_model(noise=0.5)
    small = rankopt.apply(teacher, rankopt.search(teacher, "params<=40%"))
    before = {key: value.clone() for key, value in small.state_dict().items()}
    calls = iter(range(100))

    def interrupted(inputs, generator):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return inputs

    with pytest.raises(KeyboardInterrupt):
        rankopt.recover(
            small,
            teacher=teacher,
            calibration=[torch.randn(64, 3, 12, 12)],
            augment=interrupted,
            batch_size=8,
        )
    assert all(torch.equal(before[k], v) for k, v in small.state_dict().items())


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.user, self.item = nn.Embedding(9, 32), nn.Embedding(9, 32)
        self.fc = nn.Linear(32, 32)

    def forward(self, u, i):
        return self.fc(input=self.user(u) * self.item(i))


def test_two_required_inputs_and_keyword_calls():
    pairs = [(torch.arange(8), torch.arange(8))]
    assert len(hold(Pair(), pairs)[0]) == 2
    plan = rankopt.search(Pair(), "macs<=60%", example_inputs=pairs[0], calibration=pairs)
    assert plan["fc"].cost["macs"][0] == 8 * 32 * 32
    assert plan["fc"].factors.kind == "whitened"


def test_surplus_items_and_scalars():
    x = torch.randn(4, 16)
    batch = (x, torch.zeros(4), torch.arange(4))
    assert torch.equal(hold(nn.Sequential(nn.Linear(16, 2)), [batch])[0], x)

    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x, t):
            return self.fc(x) * t

    held = [(x, torch.tensor(2.0))]
    plan = rankopt.search(Timed(), "params<=70%", calibration=held, calibration_samples=3)
    assert plan.changes


def test_outputs_that_change_shape_only_cost_the_measurement():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            y = self.b(torch.relu(self.a(x)))
            return y[y[:, 0] > 0]

    model, held = Masked(), [torch.randn(64, 32)]
    with pytest.warns(RankoptWarning, match="all layers weigh alike"):
        plan = rankopt.search(model, "params<=50%", strategy="knapsack", calibration=held)
    rankopt.apply(model, plan, calibration=held)
    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), Masked()).eval()
    with pytest.warns(RankoptWarning, match="those of the dense model stay: outputs changed"):
        small = rankopt.apply(model, rankopt.search(model, "params<=50%"), calibration=held)
    assert torch.equal(small[1].running_mean, model[1].running_mean)


def test_half_precision_statistics_do_not_overflow():
    model = nn.Sequential(nn.BatchNorm1d(4)).half()
    x = (200 * torch.randn(64, 4)).half()  # the sum of squares is beyond float16, their mean is not
    recalibrate(model, [x])
    true = x.double().var(dim=0, correction=0)
    assert torch.allclose(model[0].running_var.double(), true, rtol=0.001)
    with pytest.raises(CalibrationError, match="norm 0: its running_var .* of torch.float16"):
        recalibrate(model, [2 * x])
    model = nn.Sequential(nn.BatchNorm1d(4)).to(torch.bfloat16)
    x = (20 + torch.randn(512, 4)).to(torch.bfloat16)
    recalibrate(model, [x])
    true = x.double().var(dim=0, correction=0)
    assert torch.allclose(model[0].running_var.double(), true, rtol=0.01)


def test_shuffled_loaders_do_not_move_the_global_generator():
    model = planted_model()
    data = torch.utils.data.TensorDataset(torch.randn(48, 3, 12, 12))
    loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
    state = torch.get_rng_state()
    plan = rankopt.search(model, "params<=60%", calibration=loader)
    assert torch.equal(state, torch.get_rng_state())
    rankopt.apply(model, plan, calibration=loader)  # the same order, so no warning
    assert torch.equal(state, torch.get_rng_state())


def test_hooks_of_unpacked_attention_keep_their_form():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    seen = []
    layer.self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(sorted(kwargs)), with_kwargs=True
    )
    x = torch.randn(2, 5, 32)
    plan = rankopt.search(layer, "params<=70%", strategy="energy", example_inputs=x)
    rankopt.apply(layer, plan)(x)
    assert seen


def test_root_attention_with_cross_inputs():
    model = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    inputs = (torch.randn(2, 5, 32), *(torch.randn(2, 7, 32),) * 2)
    plan = rankopt.search(model, "params<=80%", strategy="energy", example_inputs=inputs)
    assert "q_proj" in plan.layer_names
    assert rankopt.apply(model, plan)(*inputs)[0].shape == (2, 5, 32)


class Clipped(nn.Linear):
    """Writes into its weight once it has seen a large input."""

    def forward(self, x):
        """The linear layer, clipped to the weights of a critic."""
        if x.abs().max() > 10:
            self.weight.data.clamp_(-1e-3, 1e-3)
        return super().forward(x)


@pytest.mark.parametrize("make", [
    lambda: (nn.Sequential(nn.Embedding(50, 32, max_norm=1.0), nn.Linear(32, 32)),
             torch.zeros(8, 3, dtype=torch.int64), torch.randint(1, 50, (64, 3))),
    lambda: (nn.Sequential(Clipped(32, 32), nn.Linear(32, 32)),
             torch.randn(4, 32).clamp(-1, 1), 100 * torch.randn(64, 32)),
])  # fmt: skip
def test_weights_that_only_calibration_inputs_change_stay_as_they_were(make):
    torch.manual_seed(0)
    model, example, others = make()
    model[0].weight.data.mul_(3)
    model[0].weight.data[0] = 0.01
    before = copy.deepcopy(model.state_dict())
    data = [example, others]
    plan = rankopt.search(model, "params<=80%", example_inputs=example, calibration=data, only="1")
    rankopt.apply(model, plan, calibration=data)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_run_that_wrote_nothing_leaves_one_set_of_weights():
    model = nn.Sequential(nn.Linear(8, 8), nn.Embedding(4, 8, max_norm=1.0), nn.BatchNorm1d(8))
    twin = surgery.clone(model)
    with torch.no_grad():
        twin[2].weight.add_(1)
    surgery.share_unchanged(twin, model)
    assert twin[0].weight is model[0].weight
    assert twin[1].weight is not model[1].weight
    assert twin[2].weight is not model[2].weight
    assert twin[2].bias is model[2].bias
    twin = surgery.clone(model)
    with torch.no_grad():
        twin[0].weight.mul_(2).mul_(0.5)
    surgery.share_unchanged(twin, model)
    assert twin[0].weight is not model[0].weight

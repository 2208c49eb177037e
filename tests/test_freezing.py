from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import rankopt
from rankopt import Decision
from rankopt._build.provenance import remember_plan
from rankopt.errors import ModelError
from rankopt.testing import planted_inputs, planted_model
from rankopt.training import (
    Fixed,
    FixedFreezing,
    Freezer,
    NoFreezing,
    Schedule,
    Sequential,
    SequentialFreezing,
)
from rankopt.training.freezing import _convolve_then_add, factors, release

PAIR, TRIPLE = frozenset({"first", "last"}), frozenset({"first", "core", "last"})


class Mixed(nn.Module):
    """Convolutions with and without bias, a norm, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.norm = nn.BatchNorm2d(24)
        self.mix = nn.Conv2d(24, 24, 1, bias=False)
        self.deep = nn.Conv2d(24, 24, 3, padding=1)
        self.head = nn.Linear(24, 16)

    def forward(self, x):
        x = self.deep(self.mix(torch.relu(self.norm(self.stem(x)))).relu())
        return self.head(x.relu().mean(dim=(2, 3)))


@pytest.fixture
def small():
    dense = Mixed()
    plan = rankopt.search(
        dense,
        None,
        strategy="parameter_ratio",
        example_inputs=torch.randn(2, 3, 8, 8),
        methods=["svd", "tucker2"],
        ignore=["stem"],
    )
    found = rankopt.apply(dense, plan).train()
    assert {d.targets[0]: d.method for d in plan.changes} == {
        "mix": "svd", "deep": "tucker2", "head": "svd",
    }  # fmt: skip
    return found


def test_schedules_follow_the_papers():
    assert Fixed().frozen(3, PAIR) == {"first"}
    assert Fixed().frozen(3, TRIPLE) == {"first", "last"}
    sequence = Sequential()
    assert [sequence.frozen(t, TRIPLE) for t in (0, 1, 2)] == [PAIR, {"core"}, PAIR]
    assert [sequence.frozen(t, PAIR) for t in (0, 1)] == [{"first"}, {"last"}]
    assert Sequential(parity=1).frozen(0, TRIPLE) == {"core"}
    assert NoFreezing().frozen(0, TRIPLE) == frozenset()
    for schedule in (Fixed(), sequence):  # a chain of one factor always trains
        assert schedule.frozen(0, frozenset({"core"})) == frozenset()
        assert schedule.frozen(1, frozenset({"core"})) == frozenset()


def test_schedules_compose():
    composed = Sequential().every(2).until(4, Fixed().until(1))
    assert [composed.frozen(t, PAIR) for t in range(7)] == [
        {"first"}, {"first"}, {"last"}, {"last"}, {"first"}, set(), set(),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sequential(parity=2), "parity=2"),
        (lambda: Sequential().every(0), "count=0"),
        (lambda: Sequential().until(-1), "phase=-1"),
    ],
)
def test_bad_schedules(make, message):
    with pytest.raises(ValueError, match=message):
        make()


OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_frozen_weights_are_bit_identical(small, name, set_to_none):
    optimiser = OPTIMISERS[name](small.parameters())
    freezer = SequentialFreezing(small)
    moved = set()
    for epoch in range(4):
        freezer.step(epoch)
        frozen = set(freezer.frozen)
        assert frozen
        before = {n: p.detach().clone() for n, p in small.named_parameters()}
        for _ in range(3):
            small(torch.randn(8, 3, 8, 8)).square().mean().backward()
            assert all(small.get_parameter(n).grad is None for n in frozen)
            optimiser.step()
            optimiser.zero_grad(set_to_none=set_to_none)
        for n, p in small.named_parameters():
            assert torch.equal(before[n], p) == (n in frozen), n
        moved |= set(before) - frozen
    # Every factor had its turn, and its momentum survived the pause.
    assert moved == {n for n, _ in small.named_parameters()}
    assert len(optimiser.state) == len(moved)


def test_the_last_phases_train_everything(small):
    freezer = SequentialFreezing(small, every=2, final=4)
    frozen = [freezer.step(t) and len(freezer.frozen) for t in range(5)]
    assert frozen == [4, False, 3, False, 0]  # False: nothing changed


def test_what_was_frozen_before_stays_frozen(small):
    small.mix.first.weight.requires_grad_(False)
    freezer = SequentialFreezing(small)
    freezer.step(1)
    freezer.release()
    assert [n for n, p in small.named_parameters() if not p.requires_grad] == ["mix.first.weight"]


def test_what_is_frozen_meanwhile_stays_frozen(small):
    freezer = SequentialFreezing(small)
    freezer.step(0)
    small.norm.weight.requires_grad_(False)
    small.deep.core.weight.requires_grad_(False)
    assert [freezer.step(t) for t in (1, 0)] == [True, True]
    freezer.release()
    still = [n for n, p in small.named_parameters() if not p.requires_grad]
    assert still == ["norm.weight", "deep.core.weight"]


def test_what_is_let_go_meanwhile_is_frozen_anew(small):
    freezer = SequentialFreezing(small)
    freezer.step(0)
    small.requires_grad_(True)
    assert freezer.frozen == ()
    assert freezer.step(0)
    assert len(freezer.frozen) == 4


def test_names_are_those_of_the_model_before_it_was_compiled(small):
    freezer = SequentialFreezing(small)
    freezer.step(0)
    names = freezer.frozen
    freezer.release()
    small.mix = torch.compile(small.mix, backend="eager")
    freezer = SequentialFreezing(small)
    freezer.step(0)
    assert freezer.frozen == names


def test_loaded_and_wrapped_models(small, tmp_path):
    rankopt.save(small, tmp_path / "s.safetensors")
    loaded = rankopt.load(Mixed(), tmp_path / "s.safetensors")
    assert [f.name for f in factors(loaded)] == [f.name for f in factors(small)]
    compiled = torch.compile(loaded, backend="eager")
    freezer = SequentialFreezing(compiled)
    assert freezer.step(0)
    assert "mix.first.weight" in freezer.frozen


def test_sites_that_are_no_chains_are_left_alone(small):
    plan = small.rankopt_plan
    merged = Decision(("block",), ((24, 3, 3, 3),), "not-a-decomposition")
    names = [f.name for f in factors(small)]
    remember_plan(small, replace(plan, decisions=(*plan.decisions, merged)))
    assert [f.name for f in factors(small)] == names


def test_tied_layers_freeze_together():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    dense = Tied()
    small = rankopt.apply(dense, rankopt.search(dense, "params<=70%"))
    freezer = SequentialFreezing(small)
    freezer.step(0)
    assert small.a.first.weight is small.b.first.weight
    assert not small.a.first.weight.requires_grad
    assert small.a.last.weight.requires_grad


def backward_work(model, x):
    """(weight-gradient convolutions, matrix products) of one backward pass."""
    loss = model(x).square().sum()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        loss.backward()
    masks = [e.concrete_inputs[-1] for e in seen.events() if e.name == "aten::convolution_backward"]
    # oneDNN's weight-gradient kernel runs if the weight's or the bias's is asked for.
    weights = sum(bool(mask[1] or mask[2]) for mask in masks)
    return weights, sum(e.name == "aten::mm" for e in seen.events())


def test_weight_gradients_are_not_computed(small):
    x = torch.randn(4, 3, 8, 8)
    convs = 1 + 2 + 3  # stem, mix and deep
    assert backward_work(small, x) == (convs, 4)
    freezer = SequentialFreezing(small)
    freezer.step(0)  # trains the core of deep, the last of mix and head
    assert backward_work(small, x) == (convs - 3, 3)
    freezer.step(1)
    assert small.deep.last.bias.grad is not None
    assert backward_work(small, x) == (convs - 2, 3)
    freezer.release()
    assert backward_work(small, x) == (convs, 4)


def test_freezing_changes_no_function(small):
    x = torch.randn(4, 3, 8, 8)
    small.eval()
    expected = small(x)
    freezer = SequentialFreezing(small)
    for phase in (0, 1):
        freezer.step(phase)
        assert torch.allclose(small(x), expected, rtol=1e-5, atol=1e-6)
        copied = copy.deepcopy(small)  # an averaged model, say, with weights of its own
        assert torch.equal(copied(x), small(x))
        with torch.no_grad():
            copied.deep.last.bias.add_(1.0)
        assert not torch.equal(copied(x), small(x))
    freezer.release()
    assert torch.equal(small(x), expected)
    assert not any("forward" in vars(module) for module in small.modules())


@pytest.mark.parametrize("schedule", [Sequential(), NoFreezing().front("mix", 1)], ids=repr)
def test_under_compile_each_phase_is_traced_once(small, schedule):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(small, backend=counter)
    freezer = Freezer(compiled, schedule)
    x = torch.randn(4, 3, 8, 8)
    for phase in (0, 1, 2, 3):
        freezer.step(phase)
        small.zero_grad()
        compiled(x).square().sum().backward()
        with_gradient = {n for n, p in small.named_parameters() if p.grad is not None}
        assert with_gradient == {n for n, _ in small.named_parameters()} - set(freezer.frozen)
    assert counter.frame_count == 2


def test_the_ceiling_counts_the_skipped_macs():
    dense = planted_model()
    x = planted_inputs()
    plan = rankopt.search(dense, "macs<=50%", example_inputs=x)
    small = rankopt.apply(dense, plan)
    freezer = SequentialFreezing(small)
    even, odd = (freezer.skipped(t, x) for t in (0, 1))
    chains = sum(d.cost["macs"][1] for d in plan.changes)
    assert even + odd == pytest.approx(chains / plan.totals["macs"]["measured"])
    assert freezer.ceiling(0, x) == pytest.approx(3 / (3 - even))
    assert FixedFreezing(small).ceiling(0, x) > 1
    assert Freezer(small, NoFreezing()).ceiling(0, x) == 1
    assert not freezer.frozen  # asking changes nothing


def test_bad_models(small):
    with pytest.raises(ModelError, match="carries no plan"):
        SequentialFreezing(Mixed())

    class Everything(Schedule):
        def frozen(self, phase, roles):
            return roles

    linear = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    plan = rankopt.search(linear, "params<=50%", strategy="parameter_ratio")
    bare = rankopt.apply(linear, plan)
    with pytest.raises(ModelError, match="freezes every parameter"):
        Freezer(bare, Everything()).step(0)
    assert all(p.requires_grad for p in bare.parameters())
    Freezer(small, Everything()).step(0)  # norms and biases still train


def test_what_an_interrupted_freezer_left_trains_again(small):
    SequentialFreezing(small).step(0)  # and no release
    freezer = SequentialFreezing(copy.deepcopy(small))
    assert not freezer.frozen
    assert [freezer.step(t) and len(freezer.frozen) for t in range(2)] == [4, 3]
    small.mix.first.weight.requires_grad_(False)
    SequentialFreezing(small).release()
    assert all(p.requires_grad for p in small.parameters())


def test_recover_trains_what_an_interrupted_freezer_left(small):
    SequentialFreezing(small).step(0)  # and no release
    assert not all(p.requires_grad for p in small.parameters())
    rankopt.recover(small, teacher=Mixed(), calibration=[torch.randn(64, 3, 8, 8)], steps=1)
    assert all(p.requires_grad for p in small.parameters())


def test_a_frozen_model_can_be_pickled():
    model = planted_model()
    plan = rankopt.search(model, "params<=50%", methods=["tucker2", "svd"])
    small = rankopt.apply(model, plan)
    SequentialFreezing(small).step(0)
    apart = [name for name, m in small.named_modules() if "forward" in m.__dict__]
    assert apart
    again = pickle.loads(pickle.dumps(small))
    x = planted_inputs()
    torch.testing.assert_close(again(x), small(x))
    SequentialFreezing(again).step(0)
    assert again.get_submodule(apart[0]).forward.__func__ is _convolve_then_add
    release(again)
    assert not any("forward" in m.__dict__ for m in again.modules())


def test_a_wrapped_chain_is_not_silently_left_to_train():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    small = rankopt.apply(model, rankopt.search(model, "params<=60%", only=["0"]))
    small[0] = nn.Sequential(small[0])  # as torch's checkpoint_wrapper does
    with pytest.raises(ModelError, match="layer 0 of the plan has no factors in this Sequential"):
        SequentialFreezing(small)

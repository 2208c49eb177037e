"""A front of the network that does not train at all."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import rankopt
from rankopt.errors import ModelError, RankoptWarning
from rankopt.training import Fixed, Freezer, NoFreezing, Schedule, Sequential
from rankopt.training.front import check_fronts


class Net(nn.Module):
    """A parameter of its own, a front of two parts, and a rest."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3, 1, 1))
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24))
        self.body = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.ReLU())
        self.deep = nn.Conv2d(24, 24, 3, padding=1)
        self.head = nn.Linear(24, 16)

    def forward(self, x):
        x = self.deep(self.body(self.stem(x + self.shift)))
        return self.head(x.relu().mean(dim=(2, 3)))


FRONT = ("shift", "stem.", "body.")
x = torch.randn(8, 3, 8, 8)


@pytest.fixture
def small():
    dense = Net()
    plan = rankopt.search(
        dense, None, strategy="parameter_ratio", example_inputs=x, methods=["svd", "tucker2"]
    )
    return rankopt.apply(dense, plan).train()


def in_front(model):
    return {name for name, _ in model.named_parameters() if name.startswith(FRONT)}


def test_phases():
    schedule = Sequential().front("stem", 2).front("body", 4)
    assert [schedule.fronts(t) for t in (1, 2, 3, 4)] == [
        frozenset(), {"stem"}, {"stem"}, {"stem", "body"},
    ]  # fmt: skip
    pair = frozenset({"first", "last"})
    assert [schedule.frozen(t, pair) for t in (4, 5)] == [{"first"}, {"last"}]
    assert not schedule.until(3).fronts(4)
    passing = Fixed().front("stem", 1, 3)
    assert [bool(passing.fronts(t)) for t in range(4)] == [False, True, True, False]
    assert repr(passing) == "Fixed().front('stem', 1, 3)"
    assert schedule.every(2).fronts(3) == frozenset()
    assert schedule.every(2).fronts(4) == {"stem"}
    assert Fixed().until(1, schedule).fronts(3) == {"stem"}
    assert repr(schedule) == "Sequential(parity=0).front('stem', 2).front('body', 4)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fixed().front("", 1), "module=''"),
        (lambda: Fixed().front(3, 1), "module=3"),
        (lambda: Fixed().front("stem", -1), "start=-1"),
        (lambda: Fixed().front("stem", 2, 2), "end=2: expected an integer of at least 3"),
        (lambda: Fixed().front("stem", True), "start=True"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("base", [NoFreezing(), Sequential()])
def test_nothing_in_the_front_moves_and_all_the_rest_does(small, base):
    freezer = Freezer(small, base.front("body", 1))
    optimiser = torch.optim.SGD(small.parameters(), 0.01, momentum=0.9, weight_decay=0.1)
    moved = []
    for phase in range(4):
        freezer.step(phase)
        before = {name: p.detach().clone() for name, p in small.named_parameters()}
        small(x).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        after = dict(small.named_parameters())
        moved.append({name for name in before if not torch.equal(before[name], after[name])})
        assert moved[-1] == set(before) - set(freezer.frozen)
    assert moved[0] & in_front(small)
    assert not (moved[1] | moved[2] | moved[3]) & in_front(small)
    assert moved[2] | moved[3] == set(before) - in_front(small)
    freezer.release()
    assert all(p.requires_grad for p in small.parameters())


def test_a_backward_pass_ends_behind_the_front(small):
    def kernels():
        loss = small(x).square().sum()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            loss.backward()
        names = [event.name for event in seen.events()]
        return [
            names.count(f"aten::{name}_backward") for name in ("convolution", "native_batch_norm")
        ]

    freezer = Freezer(small, NoFreezing().front("body", 1))
    convs = sum(isinstance(module, nn.Conv2d) for module in small.modules())
    assert kernels() == [convs, 1]
    freezer.step(1)
    assert kernels() == [sum(isinstance(m, nn.Conv2d) for m in small.deep.modules()), 0]


def test_statistics_of_the_front_go_on(small):
    """Its norms normalise by batch as before, so that what the rest sees does not change."""
    freezer = Freezer(small, NoFreezing().front("body", 0))
    free = small(x)
    freezer.step(0)
    before = small.stem[1].running_mean.clone()
    assert torch.equal(small(x), free)
    assert not torch.equal(small.stem[1].running_mean, before)


def test_the_ceiling_counts_both_gradients(small):
    freezer = Freezer(small, NoFreezing().front("body", 1))
    skipped = freezer.skipped(1, x)
    positions = {4: x.shape[0] * 8 * 8, 2: x.shape[0]}  # of convolutions and linear layers
    macs = {
        name: weight.numel() * positions[weight.dim()]
        for name, weight in small.named_parameters() if name.endswith("weight") and weight.dim() > 1
    }  # fmt: skip
    share = sum(macs[name] for name in macs.keys() & in_front(small)) / sum(macs.values())
    assert skipped == pytest.approx(share)
    assert freezer.ceiling(1, x) == pytest.approx(3 / (3 - 2 * share))
    assert freezer.ceiling(0, x) == 1
    both = Freezer(small, Sequential().front("body", 1))
    assert both.skipped(1, x) > skipped
    assert both.ceiling(1, x) == pytest.approx(3 / (3 - both.skipped(1, x) - skipped))
    assert not freezer.frozen


def test_what_is_used_again_later_trains():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Linear(32, 32, bias=False)
            self.inner = nn.Linear(32, 32)
            self.norm = nn.LayerNorm(32)
            self.deep = nn.Linear(32, 32)
            self.again = self.norm
            self.out = nn.Linear(32, 32, bias=False)
            self.out.weight = self.table.weight

        def forward(self, x):
            return self.out(self.again(self.deep(self.norm(self.inner(self.table(x))))))

    dense = Shared()
    plan = rankopt.search(dense, None, strategy="parameter_ratio", ignore=["table", "out"])
    small = rankopt.apply(dense, plan)
    freezer = Freezer(small, NoFreezing().front("norm", 0))
    freezer.step(0)
    assert {name.partition(".")[0] for name in freezer.frozen} == {"inner"}


def test_tied_embeddings_keep_the_backward_pass_going():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body = nn.Embedding(32, 24), nn.Linear(24, 24)
            self.deep, self.out = nn.Linear(24, 24), nn.Linear(24, 32, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, tokens):
            return self.out(self.deep(self.body(self.embed(tokens))))

    dense, tokens = Language(), torch.arange(32)
    plan = rankopt.search(dense, None, strategy="parameter_ratio", only=["body", "deep"])
    freezer = Freezer(rankopt.apply(dense, plan), NoFreezing().front("body", 0))
    skipped = freezer.skipped(0, tokens)
    assert skipped > 0
    assert freezer.ceiling(0, tokens) == pytest.approx(3 / (3 - skipped))


def test_layers_of_other_classes_compute_what_they_do():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            weight = self.weight - self.weight.mean()
            return self._conv_forward(x, weight, self.bias), None

    class Odd(Net):
        def __init__(self):
            super().__init__()
            self.stem = Standardised(3, 24, 3, padding=1)
            self.stem.bias = self.deep.bias  # trains as it is used again

        def forward(self, x):
            x = self.deep(self.body(self.stem(x)[0]))
            return self.head(x.relu().mean(dim=(2, 3)))

    dense = Odd()
    plan = rankopt.search(dense, None, strategy="parameter_ratio", only=["body*"])
    small = rankopt.apply(dense, plan)
    freezer = Freezer(small, NoFreezing().front("body", 0))
    before = small(x)
    freezer.step(0)
    assert "stem.weight" in freezer.frozen
    assert torch.equal(small(x), before)
    assert freezer.ceiling(0, x) > 1


def test_a_search_while_frozen_sees_the_same_layers(small):
    def seen():
        with pytest.warns(RankoptWarning, match="compressed already"):
            return [d.targets for d in rankopt.search(small, "params<=50%").decisions]

    plain = seen()
    Freezer(small, NoFreezing().front("body", 0)).step(0)
    assert seen() == plain


@pytest.mark.parametrize(
    ("module", "message"),
    [("stm", "no module of this name; it has stem"), ("zzz", "it has stem, body, deep, head")],
)
def test_unknown_modules(small, module, message):
    with pytest.raises(ModelError, match=message):
        Freezer(small, Fixed().front(module, 2).every(3).until(9, Fixed()))


def test_names_inside_layers_are_known_only_once_they_are_decomposed():
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Sequential(nn.Linear(8, 8)), nn.ReLU())
    check_fronts(model, {"0", "0.q.first", "0.out_proj", "1.0.first", "1"})
    check_fronts(nn.Linear(8, 8), {"first"})
    for wrong in ("3", "1.4", "1.4.first", "2", "first", ""):
        with pytest.raises(ModelError, match="front"):
            check_fronts(model, {wrong})


def test_a_schedule_of_ones_own_need_not_announce_its_fronts(small):
    class Own(Schedule):
        def frozen(self, phase, roles):
            return frozenset()

        def fronts(self, phase):
            return frozenset({"stem"}) if phase else frozenset()

    freezer = Freezer(small, Own())
    assert [freezer.step(t) and len(freezer.frozen) for t in range(2)] == [False, 5]


def test_a_front_that_is_everything(small):
    with pytest.raises(ModelError, match="last module of the model"):
        Freezer(small, Fixed().front("head", 7))


def test_a_front_in_finetune_resumes(small, tmp_path):
    pytest.importorskip("accelerate")
    train = [(x, torch.randint(16, (8,))) for _ in range(3)]
    settings = {"freezing": Sequential().front("body", 1), "epochs": 3, "optimizer": "sgd"}
    other = copy.deepcopy(small)
    whole = rankopt.finetune(small, train, **settings)
    counts = [epoch["frozen"] for epoch in whole.history]
    assert min(counts[1:]) > len(in_front(small)) > counts[0]
    assert all(p.requires_grad for p in small.parameters())

    thawed = rankopt.finetune(
        copy.deepcopy(other),
        train,
        final_epochs=2,
        **settings | {"freezing": Fixed().front("stem", 2)},
    )
    assert [epoch["frozen"] for epoch in thawed.history][1:] == [0, 5]  # the front's

    def killed_after(epochs):
        scores = iter([0.0] * (epochs + 1))

        def evaluate(_):
            score = next(scores, None)
            if score is None:
                raise KeyboardInterrupt
            return score

        return evaluate

    # The metric of every epoch is the same, so the first one's weights are kept: compare the run.
    with pytest.raises(KeyboardInterrupt):
        rankopt.finetune(other, train, folder=tmp_path, evaluate=killed_after(2), **settings)
    assert all(p.requires_grad for p in other.parameters())
    resumed = rankopt.finetune(other, train, folder=tmp_path, evaluate=killed_after(9), **settings)
    assert [epoch["frozen"] for epoch in resumed.history] == counts
    assert [epoch["loss"] for epoch in resumed.history] == [
        epoch["loss"] for epoch in whole.history
    ]

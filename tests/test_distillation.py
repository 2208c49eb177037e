from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import rankopt
from rankopt._model.hooks import hooked
from rankopt._model.inputs import divergence
from rankopt.errors import ModelError, RankoptWarning
from rankopt.testing import planted_inputs, planted_model
from rankopt.training import Distillation, Distiller


@pytest.fixture
def pair():
    teacher = planted_model(noise=0.5)
    plan = rankopt.search(teacher, "params<=40%", methods=["svd", "tucker2"])
    return teacher, rankopt.apply(teacher, plan).train(), planted_inputs(8)


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_every_term_is_what_it_says(pair):
    teacher, small, x = pair
    calls = []
    settings = Distillation(labels=2.0, weights=0.3, outputs=0.7, logits=0.4, temperature=2.0)
    before = snapshot(teacher)
    with Distiller(small, teacher, settings) as distiller:
        distiller.teacher.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        distiller.teach(x)
        output = small(x)
        loss, parts = distiller.loss(output, output.square().mean())
    assert calls == [False]  # once, and without gradients
    assert parts["labels"] == pytest.approx(output.square().mean().item())
    expected = sum(getattr(settings, name) * value.item() for name, value in parts.items())
    assert loss.item() == pytest.approx(expected)
    # The terms again, by hand: run the chain and the dense layer on their own.
    seen = {}
    names = [d.targets[0] for d in small.rankopt_plan.changes]
    for which, model in (("old", teacher), ("new", small)):
        for name in names:
            model.get_submodule(name).register_forward_hook(
                lambda m, i, o, key=(which, name): seen.update({key: o})
            )
    with torch.no_grad():
        old, new = teacher(x), small(x)
    outputs = sum(F.mse_loss(seen["new", n], seen["old", n]).item() for n in names)
    assert parts["outputs"].item() == pytest.approx(outputs, rel=1e-4)
    p, q = (o.div(2.0).softmax(dim=-1) for o in (old, new))
    divergence = 4.0 * (p * (p / q).log()).sum(dim=-1).mean().item()
    assert parts["logits"].item() == pytest.approx(divergence, rel=1e-3)
    plan = small.rankopt_plan
    weights = sum(
        d.error**2 * teacher.get_submodule(d.targets[0]).weight.square().mean().item()
        for d in plan.changes
    )
    assert parts["weights"].item() == pytest.approx(weights, rel=1e-2)
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_the_weights_term_pulls_factors_to_the_dense_weight(pair):
    teacher, small, _ = pair
    distiller = Distiller(small, teacher, Distillation(labels=0, weights=1, outputs=0))
    optimiser = torch.optim.Adam(small.parameters(), lr=1e-3)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    losses = []
    for _ in range(60):
        loss, _ = distiller.loss(None)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.7 * losses[0]


def test_a_model_equal_to_its_teacher_has_nothing_to_learn():
    teacher = planted_model()
    plan = rankopt.search(teacher, "params<=99%", methods=["svd"], only=["head"])
    (decision,) = plan.changes
    full = replace(decision, args={"ranks": [min(decision.shapes[0])]})
    same = rankopt.apply(teacher, replace(plan, decisions=(full,)))
    settings = Distillation(labels=0, logits=1, features=("head",))
    x = planted_inputs(4)
    with Distiller(same, teacher, settings) as distiller:
        distiller.teach(x)
        loss, parts = distiller.loss(same(x))
    assert loss.item() < 1e-6  # T² times the rounding of float32 log-probabilities
    assert "labels" not in parts


def test_hooks_are_gone_afterwards(pair):
    teacher, small, x = pair
    with Distiller(small, teacher) as distiller:
        assert any(m._forward_hooks for m in small.modules())
        distiller.teach(x)
    assert not any(m._forward_hooks for m in small.modules())


def test_hooks_are_gone_where_one_cannot_be_registered():
    module = nn.Linear(2, 2)

    def handles():
        yield module.register_forward_hook(lambda *_: None)
        raise KeyError

    with pytest.raises(KeyError), hooked(handles()):
        pass
    assert not module._forward_hooks


def test_language_models_and_regression():
    class Net(nn.Module):
        def __init__(self, columns):
            super().__init__()
            self.layer, self.head = nn.Linear(32, 32), nn.Linear(32, columns)

        def forward(self, x):
            return {"logits": self.head(self.layer(x).relu())}

    for columns in (7, 1):
        teacher = Net(columns)
        small = rankopt.apply(teacher, rankopt.search(teacher, "params<=70%", ignore=["head"]))
        x = torch.randn(2, 5, 32)
        with Distiller(small, teacher, Distillation(0, 0, 0, 1.0)) as distiller:
            distiller.teach(x)
            loss, _ = distiller.loss(small(x))
        old, new = teacher(x)["logits"], small(x)["logits"]
        if columns == 1:
            expected = F.mse_loss(new, old)
        else:
            p, q = (v.div(4).log_softmax(-1) for v in (old, new))
            expected = 16 * (p.exp() * (p - q)).sum(-1).mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, "temperature=0"),
        ({"outputs": -1}, "outputs=-1"),
        ({"logits": float("nan")}, "logits=nan"),
        ({"labels": True}, "labels=True"),
        ({"features": "head"}, "tuple of module names"),
        ({"labels": 0, "weights": 0, "outputs": 0}, "every term has weight 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Distillation(**settings)


def test_bad_pairs(pair):
    teacher, small, x = pair
    with pytest.raises(ModelError, match="no module 'neck'"):
        Distiller(small, teacher, Distillation(features=("neck",)))
    with pytest.raises(ModelError, match="the batch has no labels"):
        Distiller(small, teacher).loss(small(x))
    other = planted_model()
    other.head = nn.Linear(other.head.in_features, 3)
    with Distiller(small, other, Distillation(weights=0, outputs=0, logits=1)) as distiller:
        distiller.teach(x)
        with pytest.raises(ModelError, match=r"teacher's output is \[8, 3\]"):
            distiller.loss(small(x), small(x).sum())


@pytest.mark.parametrize("wrong", [7, 1])  # one output would broadcast
def test_a_teacher_with_a_layer_of_another_shape(wrong):
    dense = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    small = rankopt.apply(dense, rankopt.search(dense, "params<=60%"))
    assert not small.rankopt_plan["2"].keeps
    other = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, wrong))
    with pytest.raises(ModelError, match=rf"layer 2: the teacher's weight is \[{wrong}, 16\]"):
        Distiller(small, other)
    x = torch.randn(8, 16)
    with Distiller(small, other, Distillation(weights=0)) as distiller:
        distiller.teach(x)
        output = small(x)
        with pytest.raises(ModelError, match=rf"layer 2: the teacher's output is \[8, {wrong}\]"):
            distiller.loss(output, torch.zeros(()))


def test_classes_of_maps_are_their_channels():
    """Logits of segmentation are [n, classes, h, w]."""
    teacher, student = (nn.Conv2d(3, 5, 1).requires_grad_(False) for _ in range(2))
    x = torch.randn(2, 3, 4, 6)
    p, q = (F.log_softmax(model(x), dim=1) for model in (teacher, student))
    expected = float((p.exp() * (p - q)).sum(dim=1).mean())
    named = ({"logits": model(x)} for model in (teacher, student))
    assert divergence(*named) == pytest.approx(expected, rel=1e-5)
    settings = Distillation(labels=0, weights=0, outputs=0, logits=1.0, temperature=1.0)
    with Distiller(student, teacher, settings) as distiller:
        distiller.teach(x)
        loss, _ = distiller.loss(student(x))
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_masked_classes_are_no_reason_to_stop():
    """Logits of -inf, as of classes that are left out, would make the loss NaN."""

    class Masked(nn.Linear):
        def forward(self, x):
            return super().forward(x).index_fill(-1, torch.tensor([1, 4]), -torch.inf)

    teacher, student, x = Masked(8, 6), Masked(8, 6), torch.randn(16, 8)
    settings = Distillation(labels=0, weights=0, outputs=0, logits=1.0, temperature=1.0)
    with Distiller(student, teacher, settings) as distiller:
        distiller.teach(x)
        loss, _ = distiller.loss(student(x))
    loss.backward()
    kept = [0, 2, 3, 5]
    assert loss.item() == pytest.approx(divergence(teacher(x)[:, kept], student(x)[:, kept]))
    assert student.weight.grad.isfinite().all()


def test_no_term_is_left_out_silently(pair):
    teacher, small, x = pair
    distiller = Distiller(small, teacher)
    for use in (lambda: distiller.teach(x), lambda: distiller.loss(small(x), torch.zeros(()))):
        with pytest.raises(ModelError, match="inside `with Distiller"):
            use()
    with distiller, pytest.raises(ModelError, match="call teach"):
        distiller.loss(small(x), torch.zeros(()))


class Residual(nn.Module):
    """Writes into its layers' outputs, in training only into those of the second."""

    def __init__(self, *, inplace):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.inplace = inplace

    def forward(self, x):
        y = F.relu(self.first(x), inplace=self.inplace and not self.training)
        z = self.second(y)
        return z.add_(y) if self.inplace else z + y


def test_outputs_are_compared_as_the_layers_gave_them():
    found = {}
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    for inplace in (False, True):
        teacher = Residual(inplace=inplace).eval()
        small = rankopt.apply(teacher, rankopt.search(teacher, "params<=60%")).train()
        terms = Distillation(labels=0, weights=0, outputs=1)
        with Distiller(small, teacher, terms) as distiller:
            for training in (True, True, False, False):
                small.train(training)
                distiller.teach(x)
                loss, _ = distiller.loss(small(x))
                found.setdefault(inplace, []).append(loss.item())
            loss.backward()
    assert found[True] == pytest.approx(found[False])


def test_only_outputs_that_are_written_into_are_copied(monkeypatch):
    clone, copied = torch.Tensor.clone, [0, 0]
    teacher = Residual(inplace=True).eval()
    small = rankopt.apply(teacher, rankopt.search(teacher, "params<=60%")).train()
    x = torch.randn(8, 16)
    with Distiller(small, teacher, Distillation(labels=0, weights=0, outputs=1)) as distiller:
        for batch in range(2):

            def counted(tensor, batch=batch):
                copied[batch] += 1
                return clone(tensor)

            monkeypatch.setattr(torch.Tensor, "clone", counted)
            distiller.teach(x)
            output = small(x)
            monkeypatch.undo()
            distiller.loss(output)
    # Of the two by two outputs, that of our first is not: the model is in train mode.
    assert copied[1] == copied[0] - 1 >= 3


def test_features_without_a_weight_are_refused():
    with pytest.raises(ValueError, match="outputs=0 compares none; give outputs a weight"):
        Distillation(outputs=0, logits=1, features=("head",))


def test_a_model_that_was_compiled_before_it_was_watched_says_so(pair):
    teacher, small, x = pair
    compiled = torch.compile(small, backend="eager")
    compiled(x)
    with Distiller(compiled, teacher, Distillation(labels=0, outputs=1)) as distiller:
        distiller.teach(x)
        with pytest.raises(ModelError, match="compiled before they were watched"):
            distiller.loss(compiled(x))
        torch.compiler.reset()
        distiller.teach(x)
        assert distiller.loss(compiled(x))[1]["outputs"] > 0


class Twice(nn.Module):
    """One layer that runs twice in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x):
        x = x + self.layer(x).relu_()
        return self.head(x + self.layer(x))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_that_runs_twice_is_compared_twice(compiled):
    torch.manual_seed(0)
    teacher, x = Twice(), torch.randn(8, 32)
    plan = rankopt.search(teacher, "params<=60%", methods=["svd"], only=["layer"])
    small = rankopt.apply(teacher, plan)
    with torch.no_grad():
        x1, x2 = (x + model.layer(x).relu() for model in (teacher, small))
        first = F.mse_loss(small.layer(x), teacher.layer(x)).item()
        second = F.mse_loss(small.layer(x2), teacher.layer(x1)).item()
    expected = pytest.approx((first + second) / 2)
    run = torch.compile(small, backend="eager") if compiled else small
    with Distiller(small, teacher, Distillation(labels=0, weights=0, outputs=1)) as distiller:
        for _ in range(3):
            distiller.teach(x)
            assert distiller.loss(run(x))[1]["outputs"].item() == expected
            # Evaluations in between are no further calls, and hold no more memory.
            with torch.no_grad():
                for _ in range(4):
                    small(x[:3])
            assert [len(kept) for kept in distiller._layers._seen[0].found().values()] == [2]
        distiller.teach(x)
        small(x[:3])
        assert distiller.loss(small(x))[1]["outputs"].item() == expected  # of the last pass
    torch.compiler.reset()


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(32, 32), nn.Linear(32, 4)
        self.reentrant = True

    def forward(self, x):
        return self.head(checkpoint(self.layer, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("trains", ["distiller", "recover"])
def test_outputs_without_a_gradient_are_told_of(trains):
    torch.manual_seed(0)
    teacher, x = Checkpointed(), torch.randn(32, 32, requires_grad=True)
    plan = rankopt.search(teacher, "params<=60%", methods=["svd"], only=["layer"])
    small = rankopt.apply(teacher, plan)

    def train():
        if trains == "recover":
            rankopt.recover(small, teacher=teacher, calibration=[x], steps=2)
            return
        with Distiller(small, teacher, Distillation(labels=0)) as distiller:
            distiller.teach(x)
            distiller.loss(small(x))

    with pytest.warns(RankoptWarning, match="layer trains, but its output has no gradient.*_reent"):
        train()
    small.layer.requires_grad_(False)
    train()  # what is frozen needs none
    small.layer.requires_grad_(True)
    small.reentrant = False
    train()

from __future__ import annotations

import copy
import sys

import pytest
import torch
from finetuning import equal, in_batches, problem, snapshot
from torch import nn
from torch.utils.data import DataLoader

import rankopt
from rankopt.errors import EvaluationError, MissingDependency, ModelError, TrainingError
from rankopt.testing import planted_model
from rankopt.training import Distillation, Schedule
from rankopt.training.augmentation import shift_and_mirror

pytest.importorskip("accelerate")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([torch.zeros(4, 3, 12, 12)], "yielded a Tensor without labels"),
        ([("cat", "dog")], "a pair of str and str"),
        ([object()], "yielded a object without labels"),
        ([(torch.zeros(4, 3, 12, 12), torch.tensor([0, 1, 2, 10]))], "label 10 is out of range"),
        ([(torch.zeros(4, 3, 12, 12), torch.tensor([0, 1, -1, 2]))], "label -1 is out of range"),
        ([(torch.zeros(4, 3, 12, 12), torch.zeros(4))], "labels are torch.float32"),
        ([(torch.zeros(4, 3, 12, 12), torch.zeros(5, dtype=torch.long))], r"labels are \[5\]"),
        (
            [(torch.zeros(4, 5, 12, 12), torch.zeros(4, dtype=torch.long))],
            "step 0: the model fails",
        ),
        (
            [{"image": torch.zeros(4, 3, 12, 12), "label": torch.zeros(4, dtype=torch.long)}],
            r"dict without labels; .*forward takes \(x\), the batch has image, label; map it, "
            r"such as \[\(b\['image'\], b\['label'\]\) for b in loader\]",
        ),
        (
            [{"input": torch.zeros(4, 3, 12, 12), "labels": torch.zeros(4, dtype=torch.long)}],
            r"the batch has input, labels; map it, such as \[\(b\['input'\], b\['labels'\]\)",
        ),
        (
            [(torch.zeros(4, 3, 12, 12), torch.zeros(4), torch.zeros(4))],
            r"forward takes \(x\), the batch has 2 beside the labels; map it, such as \[\(b\[0\]",
        ),
        ([], "train is empty"),
    ],
)
def test_bad_batches(train, message):
    _, small, _, _ = problem(count=8)
    before = snapshot(small)
    with pytest.raises(TrainingError, match=message):
        rankopt.finetune(small, train, epochs=1)
    assert equal(before, snapshot(small))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("cat", "step 0: train yielded a str; expected a tensor, a tuple"),
        ([torch.tensor(1.0)], "step 0: train yielded a batch without a tensor that has a batch"),
    ],
)
def test_bad_batches_without_labels(batch, message):
    teacher, small, _, _ = problem(count=8)
    unlabelled = Distillation(labels=0, logits=1)
    with pytest.raises(TrainingError, match=message):
        rankopt.finetune(small, [batch], teacher=teacher, distillation=unlabelled, epochs=1)


def test_bad_requests():
    teacher, small, x, y = problem(count=64)
    train = in_batches(x, y)
    other = planted_model()
    other.head = nn.Linear(other.head.in_features, 7)
    with pytest.raises(ModelError, match=r"teacher's output is \[32, 7\]"):
        rankopt.finetune(
            small, train, teacher=other, distillation=Distillation(weights=0, outputs=0, logits=1)
        )
    with pytest.raises(ModelError, match="carries no plan"):
        rankopt.finetune(teacher, train, freezing="sequential")
    with pytest.raises(ModelError, match="only once"):
        rankopt.finetune(small, iter(train))
    with pytest.raises(ModelError, match="train is a Tensor"):
        rankopt.finetune(small, x)
    with pytest.raises(ModelError, match="batches_per_epoch"):
        rankopt.finetune(small, DataLoader(_Stream()))
    with pytest.raises(TrainingError, match="not a scalar"):
        rankopt.finetune(small, train, loss=lambda output, labels: output)
    for parameter in small.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ModelError, match="nothing to train"):
        rankopt.finetune(small, train)


def test_half_precision_is_refused():
    _, small, x, y = problem(count=64)
    with pytest.raises(ModelError, match=r"finetune cannot train float16 parameters.*\.float\(\)"):
        rankopt.finetune(small.half(), in_batches(x.half(), y))


@pytest.mark.parametrize(("value", "kind"), [(None, "NoneType"), (torch.tensor(1j), "Tensor")])
def test_a_metric_that_is_no_number(value, kind):
    _, small, x, y = problem(count=64)
    with pytest.raises(EvaluationError, match=f"evaluate gave a {kind}; expected a number"):
        rankopt.finetune(small, in_batches(x, y), epochs=1, evaluate=lambda model: value)


class _Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"schedule": "linear"}, "schedule='linear'"),
        ({"optimizer": "adam"}, "optimizer='adam'"),
        ({"optimizer": lambda p: 3}, "made a int"),
        ({"freezing": "sometimes"}, "freezing='sometimes'"),
        ({"precision": "int8"}, "precision='int8'"),
        ({"ema": 1.0}, "ema=1.0"),
        ({"clip": 0}, "clip=0"),
        ({"patience": 2}, "patience= needs evaluate="),
        ({"loss": 3}, r"loss=3: expected a function of \(output, labels\)"),
        ({"distillation": 0.5}, "distillation=0.5: expected a rankopt.training.Distillation"),
        ({"distillation": Distillation()}, "needs teacher="),
        ({"final_epochs": 11}, "there are 10 epochs"),
        ({"augment": "flip"}, "augment='flip'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        rankopt.finetune(nn.Linear(2, 2), [(torch.zeros(1, 2), torch.zeros(1))], **settings)


class Everything(Schedule):
    """Freezes whatever it can, from its second phase on."""

    def frozen(self, phase, roles):
        return roles if phase else frozenset()


def test_a_schedule_that_freezes_everything():
    linear = nn.Sequential(nn.Linear(32, 32, bias=False), nn.ReLU(), nn.Linear(32, 32, bias=False))
    bare = rankopt.apply(linear, rankopt.search(linear, "params<=50%"))
    train = [(torch.randn(8, 32), torch.randint(32, (8,))) for _ in range(2)]
    seen = []

    def keep(model):
        seen.append(snapshot(model))
        return 0.0

    with pytest.raises(ModelError, match="phase 1 of .*Everything.* freezes every parameter"):
        rankopt.finetune(bare, train, freezing=Everything(), epochs=3, evaluate=keep)
    assert len(seen) == 2  # before, and after the first epoch
    assert equal(seen[1], snapshot(bare))  # as the complete epoch left them
    assert all(p.requires_grad and p.grad is None for p in bare.parameters())
    # Where norms and biases remain, they train.
    _, small, x, y = problem(count=64)
    done = rankopt.finetune(small, in_batches(x, y), freezing=Everything(), epochs=2)
    assert [epoch["frozen"] > 0 for epoch in done.history] == [False, True]


def test_without_accelerate(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingDependency, match=r"pip install 'rankopt\[train\]'"):
        rankopt.finetune(nn.Linear(2, 2), [(torch.zeros(1, 2), torch.zeros(1))])


def test_what_would_not_be_used_is_refused():
    teacher, small, x, y = problem(count=64)
    with pytest.raises(ValueError, match="loss= is of labels"):
        rankopt.finetune(
            small, in_batches(x, y), teacher=teacher, distillation=Distillation(labels=0, logits=1),
            loss=nn.CrossEntropyLoss(),
        )  # fmt: skip


def test_labels_of_any_kind_suit_a_loss_of_ones_own():
    _, small, x, y = problem(count=64)
    train = [(inputs, {"class": labels}) for inputs, labels in in_batches(x, y)]
    with pytest.raises(TrainingError, match="a pair of Tensor and dict"):
        rankopt.finetune(small, train, epochs=1)
    rankopt.finetune(
        small,
        train,
        epochs=1,
        loss=lambda o, labels: nn.functional.cross_entropy(o, labels["class"]),
    )


def test_a_callers_inference_mode_is_left():
    _, small, x, y = problem(count=64)
    before = snapshot(small)
    with torch.inference_mode():
        rankopt.finetune(small, in_batches(x, y), epochs=1)
    assert not equal(before, snapshot(small))


def test_images_among_other_inputs_are_augmented():
    images, ids = torch.randn(4, 3, 8, 8), torch.arange(4)
    generator = torch.Generator().manual_seed(0)
    mapped = shift_and_mirror({"pixel_values": images, "ids": ids}, generator)
    first, second = shift_and_mirror((images, ids), generator.manual_seed(0))
    assert torch.equal(first, mapped["pixel_values"])
    assert not torch.equal(first, images)
    assert second is mapped["ids"] is ids
    assert shift_and_mirror((images, images), generator)[0] is images


def test_steps_that_never_update_end_with_an_error(monkeypatch):
    from accelerate.optimizer import AcceleratedOptimizer

    _, small, x, y = problem()
    skipped = property(lambda self: True)
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", skipped)
    with pytest.raises(TrainingError, match=r"step 31: .*overflowed 32 times .*precision='bf16'"):
        rankopt.finetune(small, in_batches(x, y), epochs=6)


def test_optimisers_that_need_a_closure_are_refused():
    _, small, x, y = problem()
    with pytest.raises(ValueError, match="optimizer made a LBFGS, whose step needs a closure"):
        rankopt.finetune(small, in_batches(x, y), epochs=1, optimizer=torch.optim.LBFGS)


def test_sparse_gradients_are_refused():
    model = nn.Sequential(nn.Embedding(50, 64, sparse=True), nn.Flatten(), nn.Linear(256, 10))
    small = rankopt.apply(model, rankopt.search(model, "params<=90%"))
    x, y = torch.randint(50, (32, 4)), torch.randint(10, (32,))
    advice = r"layer 0: {} cannot train a Embedding with sparse=True.*requires_grad_\(False\)"
    with pytest.raises(ModelError, match=advice.format("finetune")):
        rankopt.finetune(small, [(x, y)], epochs=1)
    with pytest.raises(ModelError, match=advice.format("recover")):
        rankopt.recover(small, teacher=model, calibration=[x], steps=1)
    small[0].requires_grad_(False)
    rankopt.finetune(small, [(x, y)], epochs=1, progress=False)


def test_a_tensor_as_learning_rate(tmp_path):
    _, small, x, y = problem()
    other = copy.deepcopy(small)
    settings = {"epochs": 2, "progress": False, "augment": "none"}
    rates = (torch.tensor(0.125), 0.125)
    for model, rate in zip((small, other), rates, strict=True):
        rankopt.finetune(
            model, in_batches(x, y), folder=tmp_path / str(type(rate).__name__),
            optimizer=lambda p, lr=rate: torch.optim.SGD(p, lr=lr), **settings,
        )  # fmt: skip
    for key, value in small.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[key])

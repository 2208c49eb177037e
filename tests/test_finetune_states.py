"""What finetune leaves behind, and models whose state dict is more than its tensors."""

from __future__ import annotations

import pytest
import torch
from finetuning import equal, in_batches, problem
from torch import nn

import rankopt
from rankopt.training.average import PRECISE, Average


class Versioned(nn.Sequential):
    """As torchvision's MNASNet: it loads no state that does not name its version."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        if local_metadata.get("version") != self._version:
            raise ValueError("version should be set")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def versioned():
    torch.manual_seed(0)
    dense = Versioned(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    small = rankopt.apply(dense, rankopt.search(dense, "params<=60%"))
    data = [(torch.randn(8, 16), torch.randint(4, (8,))) for _ in range(2)]
    return dense, small, data


def test_the_versions_of_modules_are_kept(tmp_path):
    dense, small, data = versioned()
    for epochs in (1, 2):  # the second goes on from the folder
        rankopt.finetune(small, data, teacher=dense, epochs=epochs, folder=tmp_path / str(epochs))
    assert not small.training


def test_modes_and_gradients_come_back_where_weights_cannot_be_loaded(monkeypatch):
    _, small, data = versioned()

    def refuse(*_):
        raise ValueError("no such state")

    monkeypatch.setattr(small, "load_state_dict", refuse)
    with pytest.raises(ValueError, match="no such state"):
        rankopt.finetune(small, data, epochs=1, freezing="sequential")
    assert not any(module.training for module in small.modules())
    assert all(p.grad is None and p.requires_grad for p in small.parameters())


def test_an_average_of_half_precision_does_not_round_away():
    model = torch.nn.Linear(4, 2).bfloat16()
    average = Average(model, 0.999)
    exact = None
    for step in range(300):
        with torch.no_grad():
            model.weight.copy_(torch.full_like(model.weight, 1 + step / 300))
        average.update(model)
        rate = 1 - min(0.999, (1 + step) / (10 + step)) if step else 1
        exact = torch.tensor(1.0) if exact is None else exact + rate * (model.weight[0, 0] - exact)
    assert average.model.weight.dtype == torch.bfloat16
    assert torch.allclose(average.model.weight.float(), exact.float(), rtol=2**-8)
    again = Average(torch.nn.Linear(4, 2).bfloat16(), 0.999)
    again.load_state_dict(average.state_dict())
    again.update(model)
    average.update(model)
    assert equal(again.state_dict()[PRECISE], average.state_dict()[PRECISE])
    assert torch.equal(again.model.weight, average.model.weight)


def test_an_average_leaves_norms_in_eval_mode_their_statistics():
    class Fixed(torch.nn.BatchNorm2d):
        def train(self, mode=True):
            return super().train(False)

    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 2
    layers = [torch.nn.Conv2d(3, 4, 1), Fixed(4), torch.nn.Conv2d(4, 4, 1)]
    ending = [torch.nn.BatchNorm2d(4), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    model = torch.nn.Sequential(*layers, *ending)
    rankopt.finetune(model, in_batches(x, torch.zeros(64).long()), epochs=2, ema=0.9)
    assert model[1].running_mean.abs().max() == 0
    assert model[3].running_mean.abs().max() > 0


def test_patience_ends_a_run_whose_metric_is_never_a_number():
    _, small, x, y = problem(count=64)
    done = rankopt.finetune(
        small, in_batches(x, y), epochs=6, patience=2, evaluate=lambda model: float("nan")
    )
    assert len(done.history) == 2


def test_one_value_per_sample_is_no_class():
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    train = in_batches(x, (x[:, 0] > 0).long())

    def loss(output, labels):
        return torch.nn.functional.binary_cross_entropy_with_logits(output[:, 0], labels.float())

    done = rankopt.finetune(torch.nn.Linear(4, 1), train, epochs=1, loss=loss)
    assert done.history[0]["accuracy"] is None

"""What finetune leaves behind, and models whose state dict is more than its tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankopt


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

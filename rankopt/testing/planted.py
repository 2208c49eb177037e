"""A small network of every kind of layer, whose ranks are known."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor, nn

from rankopt._model import measure
from rankopt._model.layers import canonical_weight, find_layers

__all__ = ["planted_inputs", "planted_model"]

INPUT_SIZE: Final = 12


class _Planted(nn.Module):
    """Convolutions, a grouped one, a strided 1x1, linear layers, kept layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.conv = nn.Conv2d(16, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.point = nn.Conv2d(32, 48, 1, stride=2)
        self.hidden = nn.Linear(48, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(torch.relu(self.stem(x)))))
        x = torch.relu(self.point(self.depthwise(torch.relu(self.grouped(x)))))
        out: Tensor = self.head(torch.relu(self.hidden(x.mean(dim=(2, 3)))))
        return out


def planted_model(seed: int = 0, *, rank: int = 4, noise: float = 0.1) -> nn.Module:
    """A small network whose weights are low rank plus noise, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with measure.preserve_rng():
        torch.manual_seed(seed)
        model = _Planted()
    for layer in find_layers(model):
        if layer.refusal is not None:
            continue
        for group in canonical_weight(model.get_submodule(layer.name)):
            out, rest = len(group), group[0].numel()
            signal = torch.randn(out, rank, generator=generator) @ torch.randn(
                rank, rest, generator=generator
            )
            mixed = signal / math.sqrt(rank) + noise * torch.randn(out, rest, generator=generator)
            group.copy_((mixed / math.sqrt(rest)).reshape(group.shape))
    return model.eval()


def planted_inputs(batch: int = 2) -> Tensor:
    """Example inputs for `planted_model`."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, INPUT_SIZE, INPUT_SIZE, generator=generator)

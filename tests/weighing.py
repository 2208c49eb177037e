"""A model whose outputs should be weighed."""

from __future__ import annotations

import torch
from torch import nn


class Blind(nn.Module):
    """Most of the first layer's outputs hardly matter, though they are the largest."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(32, 64), nn.Linear(64, 5)
        with torch.no_grad():
            self.first.weight[:48] *= 5
            self.last.weight[:, :48] *= 0.01

    def forward(self, x):
        return self.last(self.first(x))

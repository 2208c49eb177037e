"""The bottleneck network that the tests of merging share."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

import rankopt

# Rounding of float32 forward passes, relative to the output.
FLOAT32 = 1e-4


class Block(nn.Module):
    """A bottleneck of torchvision's form, its ReLU shared."""

    def __init__(self, channels=24, width=16, groups=1, stride=1, bias=False):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=bias)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=bias)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=bias)
        self.bn3 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.residual = stride == 1

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        return self.relu(out + x) if self.residual else self.relu(out)


class Net(nn.Module):
    def __init__(self, **block):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.blocks = nn.Sequential(Block(**block), Block(**block))
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def settled(model, seed=0):
    """The model with norms that have seen data and learned something, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.uniform_(-0.5, 0.5, generator=generator)
    model.train()
    with torch.no_grad():
        for _ in range(8):
            model(images(seed=seed))
    return model.eval()


def images(count=32, seed=0, size=8):
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(count, 3, size, size, generator=generator)
    return nn.functional.avg_pool2d(flat, 3, 1, 1) * 2


def distance(model, other, x):
    with torch.no_grad():
        return float((model(x) - other(x)).norm() / model(x).norm())


def planned(model, ranks, factors=None):
    """A plan that merges every bottleneck of `model` to `ranks`."""
    plan = rankopt.merge_plan(model)
    decisions = [
        d
        if d.keeps
        else replace(d, args={**d.args, "ranks": list(ranks)}, factors=factors or d.factors)
        for d in plan
    ]
    return replace(plan, decisions=tuple(decisions), totals={})

"""Merged bottlenecks against plain half-width channel selection, and the time of a merged ResNet-50.

Run: python -m benchmarks.merging [--train SECONDS] [--recover SECONDS] [--rounds N].
A small bottleneck ResNet is trained on CIFAR-10 (development data, see
`benchmarks.cifar.data_folder`) with labels; all that follows uses 1,024 other training
images without labels. Both ways halve the inner width of every block, both get
BatchNorm statistics anew and `rankopt.recover` with the same time and settings; the
5,000 validation images are only reported.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cifar import images
from rankopt._recover import _shift_and_mirror

BATCH, LEARNING_RATE, WEIGHT_DECAY = 128, 0.1, 5e-4
LABELLED, UNLABELLED = 4890, 103  # images per class


class _Block(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * planes
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class BottleneckNet(nn.Module):
    """A ResNet of bottlenecks for 32x32 images, planes 32, 64, 128, two blocks each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(64)
        blocks, width = [], 64
        for planes, stride in ((32, 1), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1)):
            blocks.append(_Block(width, planes, stride))
            width = 4 * planes
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, 10]."""
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        out: Tensor = self.head(x.mean(dim=(2, 3)))
        return out


def train(model: nn.Module, x: Tensor, y: Tensor, seconds: float) -> int:
    """SGD with Nesterov momentum and a one-cycle rate over `seconds`; returns the steps."""
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.SGD(
        model.parameters(), LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    model.train()
    started, steps = time.perf_counter(), 0
    while True:
        for part in torch.randperm(len(x), generator=generator).split(BATCH):
            spent = (time.perf_counter() - started) / seconds
            if spent >= 1:
                model.eval()
                return steps
            rate = LEARNING_RATE * min(spent / 0.2, 1) * 0.5 * (1 + math.cos(math.pi * spent))
            for group in optimiser.param_groups:
                group["lr"] = rate
            loss = F.cross_entropy(model(_shift_and_mirror(x[part], generator)), y[part])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            steps += 1


def trained(seconds: float, cache: Path | None) -> nn.Module:
    """The dense network, trained now, or read from `cache` where it was trained before."""
    torch.manual_seed(0)
    model = BottleneckNet()
    if cache is not None and cache.exists():
        model.load_state_dict(torch.load(cache, weights_only=True))
        return model.eval()
    steps = train(model, *images("train", UNLABELLED, LABELLED), seconds)
    print(f"trained for {seconds:.0f} s, {steps} steps of {BATCH}", flush=True)
    if cache is not None:
        torch.save(model.state_dict(), cache)
    return model

"""The default settings on networks they were not chosen on: Fashion-MNIST, VGG- and ViT-like.

Run: python -m benchmarks.unseen [--data FOLDER] [--epochs N] [--recover SECONDS].
Data: Fashion-MNIST as in Debian's package dataset-fashion-mnist. Each network is
trained here first. The baselines are uniform ranks of the same size: Tucker-2 and SVD
from the weights alone, with and without new BatchNorm statistics.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import rankopt
from benchmarks.calibrated import percent
from rankopt._utils.tables import table, to_text

FOLDER = Path("/usr/share/datasets/fashion-mnist")
BUDGET = "macs<=50%, params<=50%"
CALIBRATION = 1024


def images(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 28, 28], standardised, and labels of ``train`` or ``t10k``."""
    pixels, labels = (
        np.frombuffer(gzip.decompress((folder / f"{part}-{name}.gz").read_bytes()), np.uint8)
        for name in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    shaped = torch.from_numpy(pixels[16:].copy()).reshape(-1, 1, 28, 28).float()
    return (shaped / 255 - 0.286) / 0.353, torch.from_numpy(labels[8:].copy()).long()


def vgg(width: int = 24) -> nn.Sequential:
    """Six convolutions with BatchNorm in three stages, and two linear layers."""
    layers: list[nn.Module] = []
    before = 1
    for stage in range(3):
        for _ in range(2):
            after = width * 2**stage
            layers += [
                nn.Conv2d(before, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
            before = after
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(before * 9, 256), nn.ReLU(), nn.Linear(256, 10)
    )


class ViT(nn.Module):
    """Patches of 4 x 4 pixels, pre-norm encoder layers, mean over the tokens."""

    def __init__(self, width: int = 96, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, stride=4)
        self.places = nn.Parameter(torch.zeros(1, 49, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [n, 10] of images [n, 1, 28, 28]."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        scores: Tensor = self.head(self.norm(self.encoder(tokens)).mean(dim=1))
        return scores


def train(model: nn.Module, data: tuple[Tensor, Tensor], epochs: int) -> nn.Module:
    """AdamW with a one-cycle schedule."""
    inputs, labels = data
    steps = epochs * (len(inputs) // 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs)).split(128)[: len(inputs) // 128]:
            loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def correct(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """Per image, whether the model is right."""
    batches = zip(data[0].split(500), data[1].split(500), strict=True)
    return torch.cat([model(x).argmax(dim=1) == y for x, y in batches])


def rows(name: str, model: nn.Module, held: Any, test: Any, seconds: float) -> list[list[str]]:
    """Dense, uniform baselines and the default, one line each."""
    example, loader = held[:64], list(held.split(128))

    def line(kind: str, small: nn.Module, plan: Any) -> list[str]:
        shares = [
            "1"
            if plan is None
            else f"{plan.totals[axis]['measured'] / plan.totals[axis]['before']:.3f}"
            for axis in ("macs", "params")
        ]
        return [name, kind, *shares, percent(correct(small, test))]

    made = [line("dense", model, None)]
    uniform = rankopt.search(model, BUDGET, strategy="parameter_ratio", example_inputs=example)
    small = rankopt.apply(model, uniform)
    made.append(line("uniform, weights only", small, uniform))
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        rankopt.recalibrate(small, loader)
        made.append(line("uniform, BatchNorm recalibrated", small, uniform))
    every = ("svd", "tucker2", "spatial_svd", "cp")
    plan = rankopt.search(model, BUDGET, example_inputs=example, calibration=loader, methods=every)
    made.append(line("default, with cp", rankopt.apply(model, plan, calibration=loader), plan))
    plan = rankopt.search(model, BUDGET, example_inputs=example, calibration=loader)
    small = rankopt.apply(model, plan, calibration=loader)
    made.append(line("default", small, plan))
    if seconds:
        rankopt.recover(small, teacher=model, calibration=loader, seconds=seconds)
        made.append(line(f"default, recovered {seconds:.0f} s", small, plan))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=FOLDER)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--recover", type=float, default=60.0, help="seconds; 0 for none")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    seen, test = images(arguments.data, "train"), images(arguments.data, "t10k")
    made = table(
        f"Fashion-MNIST, {CALIBRATION} unlabelled images, 10,000 test images",
        "network", "plan", "macs", "params", "accuracy",
    )  # fmt: skip
    for name, model in (("VGG-like", vgg()), ("ViT-like", ViT())):
        train(model, seen, arguments.epochs)
        for cells in rows(name, model, seen[0][:CALIBRATION], test, arguments.recover):
            made.add_row(*cells)
            print(*cells, sep=" | ", flush=True)
    print(to_text(made))


if __name__ == "__main__":
    main()

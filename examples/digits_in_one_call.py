"""From a trained network to a smaller, fine-tuned, verified file in one call, on real digits.

Needs the extras `demo` and `train`: pip install -c constraints.txt -e '.[demo,train]'
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import rankopt


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [n, 1, 8, 8] and labels: 1,297 to train on, 500 to test."""
    data = load_digits()
    x, y = torch.tensor(data.images).float()[:, None] / 16, torch.tensor(data.target)
    return x[:-500], y[:-500], x[-500:], y[-500:]


def network() -> nn.Sequential:
    """Three convolutions with BatchNorm, and a linear layer."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 32, 1), (32, 64, 2), (64, 64, 1)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 10))


def train(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]], epochs: int) -> None:
    """Train with Adam, leave the model in eval mode."""
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    model.eval()


def main() -> None:
    """Train a network, then search, apply, recover, fine-tune, verify and save."""
    torch.manual_seed(0)
    x, y, test_x, test_y = digits()
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
    model = network()
    train(model, loader, epochs=6)

    def accuracy(model: nn.Module) -> float:
        return 100 * float((model(test_x).argmax(dim=1) == test_y).float().mean())

    result = rankopt.compress(
        model,
        "macs<=30%",
        train=loader,
        evaluate=accuracy,
        recover={"seconds": 1},
        finetune={"epochs": 3, "learning_rate": 2e-3},
        output="digits.safetensors",
    )
    print(result)


if __name__ == "__main__":
    main()

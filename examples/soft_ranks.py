"""Learn ranks and weights together, in a training loop of one's own, on real digits.

Needs the extra `demo`: pip install -c constraints.txt -e '.[demo]'
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

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


def main() -> None:
    """Soften, train with one more term in the loss, discretise, build."""
    torch.manual_seed(0)
    x, y, test_x, test_y = digits()
    model = network()

    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(120):
        part = torch.randint(0, len(x), (64,))
        loss = F.cross_entropy(model(x[part]), y[part])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()

    soft = rankopt.soften(model, "macs<=30%", example_inputs=x[:1]).train()
    optimiser = torch.optim.Adam(soft.weights(), lr=2e-3)
    optimiser.add_param_group({"params": soft.logits(), "lr": 0.05})

    def train(steps: int, *, settled: bool = False) -> None:
        for step in range(steps):
            part = torch.randint(0, len(x), (64,))
            loss = F.cross_entropy(soft(x[part]), y[part])
            if not settled:
                loss = loss + soft.penalty(step / (steps - 1))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    train(200)  # weights and ranks together
    plan = soft.discretise()
    soft.settle(plan)
    train(100, settled=True)  # weights alone, at the ranks chosen
    small = soft.build(plan).eval()
    print(plan)

    def accuracy(model: nn.Module) -> float:
        return 100 * float((model(test_x).argmax(dim=1) == test_y).float().mean())

    print(rankopt.compare(model, small, example_inputs=x[:64], rounds=5, evaluate=accuracy))


if __name__ == "__main__":
    main()

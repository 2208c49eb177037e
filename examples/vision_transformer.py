"""Cut torchvision's ViT, attention included, to half of its parameters, on real digits.

Needs the extras `demo` and `vision`: pip install -c constraints.txt -e '.[demo,vision]'
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import rankopt
from rankopt.vision import import_torchvision


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images [n, 3, 16, 16] and labels: 1,297 to train on, 500 to test."""
    data = load_digits()
    x, y = torch.tensor(data.images).float()[:, None] / 16, torch.tensor(data.target)
    x = F.interpolate((x - 0.3) / 0.4, size=16, mode="bilinear").expand(-1, 3, -1, -1)
    return x[:-500], y[:-500], x[-500:], y[-500:]


def main() -> None:
    """Train, search, apply, recover without labels, compare."""
    torch.manual_seed(0)
    x, y, test_x, test_y = digits()
    model: nn.Module = import_torchvision().models.VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128,
        num_classes=10,
    )  # fmt: skip

    epochs = 20
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    steps = epochs * -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(64):
            loss = F.cross_entropy(model(x[part]), y[part])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    model.eval()

    inputs = list(x[:512].split(64))  # unlabelled
    plan = rankopt.search(model, "params<=50%", example_inputs=x[:64], calibration=inputs)
    print(plan)
    small = rankopt.apply(model, plan, calibration=inputs)
    print(rankopt.recover(small, teacher=model, calibration=inputs, seconds=10))

    def accuracy(model: nn.Module) -> float:
        return 100 * float((model(test_x).argmax(dim=1) == test_y).float().mean())

    print(rankopt.compare(model, small, example_inputs=x[:64], rounds=5, evaluate=accuracy))


if __name__ == "__main__":
    main()

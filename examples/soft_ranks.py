"""Learn ranks and weights together, in a training loop of one's own."""

import torch
import torch.nn.functional as F
from torch import nn

import rankopt


def main() -> None:
    """Soften, train with one more term in the loss, discretise, build."""
    torch.manual_seed(0)
    x = torch.randn(512, 64)
    labels = (x @ torch.randn(64, 4)).argmax(dim=1)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
                          nn.Linear(128, 4))  # fmt: skip
    soft = rankopt.soften(model, "macs<=40%", example_inputs=x[:1])
    optimiser = torch.optim.Adam(soft.weights(), lr=1e-3)
    optimiser.add_param_group({"params": soft.logits(), "lr": 0.05})
    steps = 150
    for step in range(steps):
        part = torch.randint(0, len(x), (64,))
        loss = F.cross_entropy(soft(x[part]), labels[part]) + soft.penalty(step / (steps - 1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    plan = soft.discretise()
    small = soft.build(plan).eval()
    right = (small(x).argmax(dim=1) == labels).double().mean().item()
    print(rankopt.compare(model, small, example_inputs=x, rounds=5), f"right: {right:.1%}")


if __name__ == "__main__":
    main()

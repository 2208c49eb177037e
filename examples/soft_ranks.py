"""Learn ranks and weights together, in a training loop of one's own, on real digits.

Needs the extra: pip install 'rankopt[demo]'
"""

import torch
import torch.nn.functional as F

import rankopt
from rankopt._commands import demo


def main() -> None:
    """Soften, train with one more term in the loss, discretise, build."""
    x, labels, test_x, test_labels = demo.load_digits()
    model = demo.DigitsNet(width=8)
    demo.train(model, x, labels, epochs=4)
    soft = rankopt.soften(model, "macs<=30%", example_inputs=x[:1]).train()
    optimiser = torch.optim.Adam(soft.weights(), lr=2e-3)
    optimiser.add_param_group({"params": soft.logits(), "lr": 0.05})

    def train(steps: int, *, settled: bool = False) -> None:
        for step in range(steps):
            part = torch.randint(0, len(x), (64,))
            loss = F.cross_entropy(soft(x[part]), labels[part])
            if not settled:
                loss = loss + soft.penalty(step / (steps - 1))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    train(200)
    plan = soft.discretise()
    soft.settle(plan)
    train(100, settled=True)
    small = soft.build(plan).eval()
    print(plan)
    print(
        rankopt.compare(
            model, small, example_inputs=x[:64], rounds=5,
            evaluate=lambda network: demo.accuracy(network, test_x, test_labels),
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()

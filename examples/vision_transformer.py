"""Cut torchvision's ViT, attention included, to half of its parameters, on real digits.

Needs the extras: pip install 'rankopt[demo,vision]'
"""

import torch

import rankopt
from rankopt._commands import demo
from rankopt.vision import import_torchvision


def main() -> None:
    """Train, search, apply, recover without labels, compare."""
    vision = import_torchvision()
    x, y, test_x, test_y = demo.load_digits()
    x, test_x = x.expand(-1, 3, -1, -1), test_x.expand(-1, 3, -1, -1)
    torch.manual_seed(0)
    model = vision.models.VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128,
        num_classes=10,
    )  # fmt: skip
    demo.train(model, x, y, epochs=20)
    model.eval()
    inputs = list(x[:512].split(64))
    plan = rankopt.search(model, "params<=50%", example_inputs=x[:64], calibration=inputs)
    print(plan)
    small = rankopt.apply(model, plan, calibration=inputs)
    print(rankopt.recover(small, teacher=model, calibration=inputs, seconds=10))
    print(
        rankopt.compare(
            model, small, example_inputs=x[:64], rounds=5,
            evaluate=lambda network: demo.accuracy(network, test_x, test_y),
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()

"""Cut the parameters of torchvision's ViT-shaped model to 60%, attention included."""

import torch

import rankopt
from rankopt.vision import import_torchvision


def main() -> None:
    """Search, apply, compare and list what was kept."""
    vision = import_torchvision()
    model = vision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128
    ).eval()
    x = torch.randn(4, 3, 32, 32)
    plan = rankopt.search(model, "params<=60%", example_inputs=x)
    for decision in plan:
        print(decision.targets[0], decision.method, decision.ranks, decision.reason)
    print(rankopt.compare(model, rankopt.apply(model, plan), example_inputs=x, rounds=5))


if __name__ == "__main__":
    main()

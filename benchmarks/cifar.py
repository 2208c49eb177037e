"""The trained ResNet-20 and the CIFAR-10 JPEG data of the development folder."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankopt._model import measure

__all__ = ["CLASSES", "ResNet20", "accuracy", "correct", "data_folder", "images", "resnet20"]

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def data_folder() -> Path:
    """`RANKOPT_DATA`, or the folder shared/data beside the checkout."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("RANKOPT_DATA", default)) / "cifar10-jpeg"


def images(split: str, start: int, per_class: int) -> tuple[Tensor, Tensor]:
    """Normalised images [n, 3, 32, 32] and labels: `per_class` of each class from `start`."""
    from PIL import Image

    pixels, labels = [], []
    with zipfile.ZipFile(data_folder() / f"{split}.zip") as archive:
        names: dict[str, list[str]] = {name: [] for name in CLASSES}
        for entry in sorted(archive.namelist()):
            names[entry.split("/")[0]].append(entry)
        for label, name in enumerate(CLASSES):
            for entry in names[name][start : start + per_class]:
                with Image.open(io.BytesIO(archive.read(entry))) as image:
                    pixels.append(np.asarray(image.convert("RGB")))
                labels.append(label)
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    return x[order], torch.tensor(labels)[order]


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """Option A of arXiv 1512.03385: subsampling and zero channels as the shortcut."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            x = x[:, :, :: self.stride, :: self.stride]
            x = F.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra // 2))
        return F.relu(out + x)


class ResNet20(nn.Module):
    """He et al. 2015, section 4.2, widths 16, 32, 64."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        for stage in (1, 2, 3):
            blocks = [
                _Block(widths[stage - (not i)], widths[stage], 2 if stage > 1 and not i else 1)
                for i in range(3)
            ]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, 10]."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in (1, 2, 3):
            x = self.get_submodule(f"layer{stage}")(x)
        out: Tensor = self.linear(x.mean(dim=(2, 3)))
        return out


def resnet20() -> nn.Module:
    """The trained network, in eval mode."""
    from safetensors.torch import load_file

    model = ResNet20()
    model.load_state_dict(load_file(data_folder() / "resnet20.safetensors"))
    return model.eval()


def correct(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Which images the model classifies rightly, [n] of bool."""
    with measure.evaluation(model), torch.no_grad():
        return torch.cat([model(part).argmax(dim=1) for part in torch.split(x, 500)]) == y


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent right."""
    return 100 * correct(model, x, y).double().mean().item()

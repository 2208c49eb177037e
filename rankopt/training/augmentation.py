"""Random changes of a batch of inputs that a teacher and its student both see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from rankopt._model import measure
from rankopt._model.inputs import tensors_in

__all__ = ["Augment", "augmentation", "shift_and_mirror"]

Augment = Callable[[Any, torch.Generator], Any]

# How far images are shifted, as a share of their side.
SHIFT: Final = 1 / 8


def augmentation(augment: Any) -> Augment:
    """The function that ``auto``, ``none`` or a function of (inputs, generator) means.

    Raises:
        ValueError: Anything else.
    """
    if callable(augment):
        chosen: Augment = augment
        return chosen
    if augment == "none":
        return lambda inputs, generator: inputs
    if augment == "auto":
        return shift_and_mirror
    raise ValueError(f"augment={augment!r}: expected 'auto', 'none' or a function")


def shift_and_mirror(inputs: Any, generator: torch.Generator) -> Any:
    """The inputs with their images [n, c, h, w] moved and half of the images mirrored.

    They move by up to `SHIFT` of their side. Inputs without such a tensor of floats, or with
    several, which may belong together, stay as they are.
    """
    found = [t for t in tensors_in(inputs) if t.dim() == 4 and t.is_floating_point()]
    if len(found) != 1:
        return inputs
    moved = _moved(found[0], generator)
    return measure.with_tensors(inputs, lambda t: moved if t is found[0] else t)


def _moved(images: Tensor, generator: torch.Generator) -> Tensor:
    count, _, height, width = images.shape
    down, across = round(height * SHIFT), round(width * SHIFT)
    padded = F.pad(images, (across, across, down, down))
    rows = torch.randint(0, 2 * down + 1, (count,), generator=generator)
    columns = torch.randint(0, 2 * across + 1, (count,), generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5
    moved = torch.stack(
        [
            padded[i, :, row : row + height, column : column + width]
            for i, (row, column) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True))
        ]
    )
    mirrored = mirrored.to(images.device)
    return torch.where(mirrored[:, None, None, None], moved.flip(-1), moved)

"""Normal equations of a layer: rows of patches and outputs, and the ridge estimate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rankopt._calibration.collect import channel_rows, patches, split_batch
from rankopt._model import measure
from rankopt._model.hooks import hooked
from rankopt._model.inputs import run
from rankopt._model.layers import Layer
from rankopt._utils.progress import progress_bar
from rankopt.errors import LayerError

__all__ = ["Sums", "batched", "paired_rows", "put", "run_watched"]

# Ridge, as a share of the mean eigenvalue, towards the map that moments alone give;
# it grows with the number of unknowns per position.
RIDGE: Final = 1e-3


class Sums:
    """Normal equations of one map, summed in float64."""

    def __init__(self) -> None:
        self.gram: Any = 0.0
        self.cross: Any = 0.0
        self.count = 0

    @measure.no_autocast()
    def add(self, rows: Tensor, wanted: Tensor) -> None:
        """Count rows [groups, positions, in] and what they map to, [groups, positions, out]."""
        self.gram = self.gram + (rows.mT @ rows).double()
        self.cross = self.cross + (wanted.mT @ rows).double()
        self.count += rows.shape[1]

    def solve(self, prior: Tensor) -> Tensor:
        """The ridge estimate [groups, out, in], drawn towards `prior`."""
        gram, cross = (value.cpu() / self.count for value in (self.gram, self.cross))
        size = gram.shape[-1]
        mean = gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1).clamp_min(1e-30)[:, None, None]
        ridge = RIDGE * (1 + size / self.count * 10) * mean
        eye = torch.eye(size, dtype=gram.dtype, device=gram.device)
        solved: Tensor = torch.linalg.solve(gram + ridge * eye, (cross + ridge * prior).mT).mT
        return solved


def paired_rows(layer: Layer, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of patches of the input and of the output, a part of the batch at a time."""
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    parts = split_batch(layer, x)
    for part, wanted in zip(parts, y.split([len(p) for p in parts]), strict=True):
        yield patches(layer, part.to(dtype)), channel_rows(wanted.to(dtype), layer.groups)


def batched(layer: Layer, x: Tensor) -> Tensor:
    """`x` with a batch dimension."""
    return x if x.dim() == len(layer.kernel) + 2 else x.unsqueeze(0)


def put(weight: Tensor, values: Tensor, layer: Layer) -> None:
    """Set a weight of `layer` from values [groups, out, in * pixels], or its bias from [1, out].

    Raises:
        LayerError: The values overflow the weight's dtype.
    """
    cast = values.reshape(weight.shape).to(device=weight.device, dtype=weight.dtype)
    if not bool(cast.isfinite().all()):
        raise LayerError(
            f"layer {layer.name}: its merged weight overflows {layer.dtype}; "
            "merge in float32 and convert afterwards"
        )
    with torch.no_grad():
        weight.copy_(cast)


def run_watched(
    view: nn.Module,
    held: Sequence[Any],
    handles: Iterable[RemovableHandle],
    *,
    progress: bool | None = None,
) -> None:
    """Run calibration batches through a model whose hooks do the sums; then remove these."""
    with (
        hooked(handles),
        torch.no_grad(),
        measure.preserve_rng(),
        measure.evaluation(view),
        progress_bar("fitting merges", len(held), enabled=progress) as advance,
    ):
        for inputs in held:
            run(view, inputs)
            advance()

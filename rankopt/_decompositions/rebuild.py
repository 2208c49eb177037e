"""The dense weight that a chain's factors multiply out to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rankopt._decompositions.base import Decomposition
from rankopt._model.layers import Layer

__all__ = ["rebuild"]


def rebuild(
    method: Decomposition, layer: Layer, ranks: Sequence[int], factors: Mapping[str, Tensor]
) -> Tensor:
    """The canonical weight [groups, out, in, *kernel] of a chain, differentiable.

    Impulses are sent through the chain, so any decomposition will do.

    Args:
        method: The decomposition.
        layer: The layer it treats.
        ranks: Its ranks.
        factors: As `Basis.factors` gives them.
    """
    plain = replace(
        layer,
        stride=tuple(1 for _ in layer.kernel),
        dilation=tuple(1 for _ in layer.kernel),
        padding=tuple(size - 1 for size in layer.kernel),
        padding_mode="zeros",
        bias=False,
    )
    first = next(iter(factors.values()))
    impulses = torch.eye(layer.in_channels, dtype=first.dtype, device=first.device)
    if layer.is_conv:
        impulses = impulses[(...,) + (None,) * len(layer.kernel)]
    chain = method.build(plain, ranks)
    # [in, out, *kernel], the kernel reversed
    out: Tensor = torch.func.functional_call(chain, dict(factors), (impulses,))
    out = out.flip(tuple(range(2, out.dim()))).transpose(0, 1)
    inputs = layer.group_shape[0]
    return torch.stack(
        [
            rows[:, index * inputs : (index + 1) * inputs]
            for index, rows in enumerate(out.unflatten(0, (layer.groups, -1)))
        ]
    )

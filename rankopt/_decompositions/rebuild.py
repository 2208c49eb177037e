"""What a chain's factors amount to: its dense weight, or its answer to one patch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rankopt._decompositions.base import Decomposition
from rankopt._model.layers import Layer

__all__ = ["rebuild", "response"]


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
    plain = _plain(layer, padding=tuple(size - 1 for size in layer.kernel))
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


def response(
    method: Decomposition,
    layer: Layer,
    ranks: Sequence[int],
    factors: Mapping[str, Tensor],
    patch: Tensor,
) -> Tensor:
    """The product [out] of a chain's weight with one patch, without a bias.

    Args:
        method: The decomposition.
        layer: The layer it treats.
        ranks: Its ranks.
        factors: As `Basis.factors` gives them.
        patch: [groups, in/groups · pixels], of the factors' dtype.
    """
    chain = method.build(_plain(layer, padding=tuple(0 for _ in layer.kernel)), ranks)
    inputs = patch.reshape(1, layer.in_channels, *layer.kernel)
    out: Tensor = torch.func.functional_call(chain, dict(factors), (inputs,))
    return out.flatten()


def _plain(layer: Layer, *, padding: tuple[int, ...]) -> Layer:
    """The layer meeting every pixel once, without a bias."""
    ones = tuple(1 for _ in layer.kernel)
    return replace(
        layer, stride=ones, dilation=ones, padding=padding, padding_mode="zeros", bias=False
    )

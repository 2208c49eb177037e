"""The dense weight that a chain of factors amounts to."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["effective_weight"]

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def effective_weight(chain: Iterable[nn.Module]) -> Tensor:
    """The product of a chain's factors as one weight, differentiably.

    Args:
        chain: `nn.Linear` or `nn.ConvNd` modules in order of application, with
            nothing between them.

    Returns:
        The weight as [groups, out / groups, in / groups, *kernel].

    Example:
        >>> chain = nn.Sequential(nn.Conv2d(4, 2, (3, 1)), nn.Conv2d(2, 6, (1, 3), bias=False))
        >>> tuple(effective_weight(chain).shape)
        (1, 6, 4, 3, 3)
    """
    modules: list[Any] = list(chain)
    groups = math.gcd(*(getattr(module, "groups", 1) for module in modules))
    weight = _grouped(modules[0], groups)
    for module in modules[1:]:
        weight = _composed(weight, _grouped(module, groups))
    return weight


def _grouped(module: Any, groups: int) -> Tensor:
    """The weight for fewer groups than the module has, as block diagonals."""
    blocks = getattr(module, "groups", 1) // groups
    weight: Tensor = module.weight.unflatten(0, (groups, blocks, -1))
    if blocks == 1:
        return weight.squeeze(1)
    eye = torch.eye(blocks, dtype=weight.dtype, device=weight.device)
    spread = torch.einsum("gboi...,bn->gboni...", weight, eye)
    blocked: Tensor = spread.flatten(3, 4).flatten(1, 2)
    return blocked


def _composed(before: Tensor, after: Tensor) -> Tensor:
    """The weight of `after` applied to the output of `before`, both [groups, out, in, *kernel]."""
    kernel = before.shape[3:]
    if math.prod(after.shape[3:]) == 1:
        product = after.flatten(2) @ before.flatten(2)
        shaped: Tensor = product.unflatten(2, (before.shape[2], *kernel))
        return shaped
    if math.prod(kernel) == 1:
        mixed: Tensor = torch.einsum("gom...,gmi->goi...", after, before.flatten(2))
        return mixed
    # Correlating twice is correlating once with the convolution of both kernels.
    dims = len(kernel)
    spatial = tuple(range(-dims, 0))
    inputs = before.movedim(2, 0).flatten(1, 2)
    kernels = after.flatten(0, 1).flip(spatial)
    padding = [size - 1 for size in after.shape[3:]]
    out = _CONVOLVE[dims](inputs, kernels, padding=padding, groups=len(before))
    composed: Tensor = out.unflatten(1, (len(before), -1)).movedim(0, 2)
    return composed

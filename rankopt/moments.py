"""Moments: what is known of a layer's inputs, and the metric that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from rankopt.measure import tensor_digest

__all__ = ["DAMPING", "Moments", "damped_root", "pool"]

# Share of the mean eigenvalue added to a moment matrix, so that it can be inverted.
DAMPING: Final = 1e-6


@dataclass(frozen=True)
class Moments:
    """Second moments E[x xᵀ] of what a layer's weight is multiplied with.

    The output error of an approximate weight is ‖(W − Ŵ)S‖ for any root S of the
    moments, E[x xᵀ] = SSᵀ (arXiv 2403.07378).

    Args:
        second: [groups, n, n] in float64. n is in/groups times the kernel's
            pixels (patches, channel-major) or in/groups alone (channels).
        pixels: Kernel pixels a patch spans; 1 where only channels are known.
        count: Positions averaged over.
    """

    second: Tensor
    pixels: int
    count: int

    @cached_property
    def channels(self) -> Tensor:
        """[groups, in/groups, in/groups], averaged over the kernel's pixels."""
        size = self.second.shape[-1] // self.pixels
        blocks = self.second.reshape(-1, size, self.pixels, size, self.pixels)
        averaged: Tensor = blocks.diagonal(dim1=2, dim2=4).mean(dim=-1)
        return averaged

    @cached_property
    def channel_root(self) -> Tensor:
        """Lower root of `channels`, damped."""
        return damped_root(self.channels)

    @cached_property
    def damped(self) -> Tensor:
        """`second`, damped so that it has an inverse."""
        root = damped_root(self.second)
        return root @ root.mT

    @property
    def nbytes(self) -> int:
        """Bytes held once all the derived matrices have been asked for."""
        channels = self.second.shape[-1] // self.pixels
        return 16 * len(self.second) * (self.second.shape[-1] ** 2 + channels**2)

    @cached_property
    def key(self) -> bytes:
        """Identifies the moments in a cache."""
        return tensor_digest(self.second)


def pool(parts: Sequence[Moments]) -> Moments:
    """The moments over all the inputs that several layers with one weight see."""
    count = sum(part.count for part in parts)
    second = sum((part.second * (part.count / count) for part in parts[1:]),
                 start=parts[0].second * (parts[0].count / count))  # fmt: skip
    return Moments(second, parts[0].pixels, count)


def damped_root(second: Tensor) -> Tensor:
    """Lower Cholesky factor [groups, n, n] of a moment matrix, damped by `DAMPING`.

    Damping makes rank-deficient moments (constant or dead channels) invertible;
    it is raised tenfold for as long as rounding defeats it.
    """
    size = second.shape[-1]
    scale = second.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    # Inputs that are all zero: any positive scale will do.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    eye = torch.eye(size, dtype=second.dtype, device=second.device)
    damping = DAMPING
    while True:
        root, info = torch.linalg.cholesky_ex(second + damping * scale[:, None, None] * eye)
        if not bool(info.any()):
            lower: Tensor = root
            return lower
        damping *= 10

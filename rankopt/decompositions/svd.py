"""Truncated SVD of linear layers and 1x1 convolutions: C→r, r→S."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rankopt.decompositions import base
from rankopt.layers import Layer

__all__ = ["SVD"]

# Directions whose singular value is below this share of the largest are rounding
# noise of the Gram matrix (its eigenvalues are exact to about 1e-16).
NUMERICAL_RANK = 1e-8


class _Basis(base.Basis):
    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        matrix = base.float64_ready(weight.flatten(2))
        self.on_input = matrix.shape[2] <= matrix.shape[1]
        gram = matrix.mT @ matrix if self.on_input else matrix @ matrix.mT
        energies, self.vectors = base.symmetric_eigh(gram)
        self.sigma = energies.sqrt()
        self.spectra = (energies.cpu().numpy(),)
        total = self.spectra[0].sum()
        # Tails summed from the small end keep their relative precision.
        tails = self.spectra[0].sum(axis=0)[::-1].cumsum()[::-1]
        self._errors = np.sqrt(np.append(tails[1:], 0.0) / total) if total else np.zeros(len(tails))

    def error(self, ranks: Sequence[Any]) -> Any:
        (rank,) = ranks
        return self._errors[np.asarray(rank) - 1]

    def factors(self, ranks: Sequence[int]) -> dict[str, Tensor]:
        (rank,) = ranks
        matrix = base.float64_ready(self.weight.flatten(2))
        vectors, sigma = self.vectors[..., :rank], self.sigma[..., :rank]
        floor = NUMERICAL_RANK * self.sigma[..., :1]
        # √σ on both sides: factors of equal size train and quantise best.
        root = torch.where(sigma > floor, sigma, torch.ones_like(sigma)).sqrt()
        if self.on_input:
            first, last = root[..., None] * vectors.mT, (matrix @ vectors) / root[..., None, :]
        else:
            first, last = (vectors.mT @ matrix) / root[..., None], vectors * root[..., None, :]
        kernel = self.weight.dim() - 3
        return {
            "first.weight": first.flatten(0, 1)[(...,) + (None,) * kernel],
            "last.weight": last.flatten(0, 1)[(...,) + (None,) * kernel],
        }

    @property
    def nbytes(self) -> int:
        return self.vectors.numel() * 8


@dataclass(frozen=True)
class SVD(base.Decomposition):
    """W ≈ (U√Σ)(√ΣVᵀ), the best approximation of each rank (Eckart-Young).

    Args:
        stride_on: Which factor of a strided 1x1 convolution strides. ``first``
            computes the same function with fewer MACs; ``last`` reproduces
            the published tables of arXiv 2407.20266.

    Example:
        >>> basis = SVD().prepare(torch.eye(4)[None])
        >>> round(float(basis.error([3])), 6)
        0.5
    """

    name: ClassVar[str] = "svd"
    roles: ClassVar[Mapping[str, str]] = {"first": "first", "last": "last"}
    soft: ClassVar[bool] = True
    stride_on: Literal["first", "last"] = "first"

    def __post_init__(self) -> None:
        if self.stride_on not in ("first", "last"):
            raise ValueError(f"stride_on={self.stride_on!r}: expected 'first' or 'last'")

    def refusal(self, layer: Layer) -> str | None:
        if layer.pointwise:
            return None
        return f"svd takes linear layers and 1x1 convolutions, not a kernel of {layer.kernel}"

    def rank_axes(self, layer: Layer) -> tuple[base.RankAxis, ...]:
        return (base.RankAxis("svd", min(layer.group_shape)),)

    def params(self, layer: Layer, ranks: Sequence[Any]) -> Any:
        (rank,) = ranks
        return layer.groups * rank * sum(layer.group_shape)

    def macs(self, layer: Layer, ranks: Sequence[Any]) -> Any:
        (rank,) = ranks
        entering, leaving = base.positions(layer)
        inputs, outputs = layer.group_shape
        first = leaving if self.stride_on == "first" else entering
        return layer.groups * rank * (inputs * first + outputs * leaving)

    def prepare(self, weight: Tensor, moments: None = None) -> base.Basis:
        return _Basis(weight)

    def build(self, layer: Layer, ranks: Sequence[int]) -> nn.Sequential:
        (rank,) = ranks
        hidden = layer.groups * rank
        place = base.geometry(layer) if layer.is_conv else {}
        stride = {"stride": place.pop("stride")} if self.stride_on == "last" and place else {}
        return base.chain(
            first=base.conv(layer, layer.in_channels, hidden, groups=layer.groups, place=place),
            last=base.conv(
                layer,
                hidden,
                layer.out_channels,
                groups=layer.groups,
                bias=layer.bias,
                place=stride,
            ),
        )

"""Truncated SVD of linear layers and 1x1 convolutions: C→r, r→S."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rankopt._calibration.moments import Moments
from rankopt._decompositions import base
from rankopt._decompositions.projection import Projection
from rankopt._model.layers import Layer

__all__ = ["SVD"]

# Directions whose singular value is below this share of the largest are zero to
# rounding; they are left unscaled.
NUMERICAL_RANK = 1e-8


class _Basis(base.Basis):
    """Singular vectors of the smaller side, shared by copies of the basis.

    With moments the matrix is W·S, whose discarded energy is the output error.
    """

    def __init__(self, weight: Tensor, moments: Moments | None = None) -> None:
        self.weight: Tensor | None = weight
        self._moments = moments
        self._parts: dict[str, Any] = {}
        _, outputs, inputs = weight.flatten(2).shape
        self._on_input = inputs <= outputs
        vectors = self._parts["vectors"] = self._factorised()
        self._bytes = vectors.numel() * vectors.element_size()

    @property
    def _vectors(self) -> Tensor:
        """Singular vectors of the smaller side as columns, [groups, n, n]."""
        found: Tensor | None = self._parts.get("vectors")
        if found is None:
            found = self._parts["vectors"] = self._factorised()
        return found

    def _factorised(self) -> Tensor:
        """The vectors, and with moments the spectrum, whose matrices are at hand here."""
        dense, moments = self._dense, self._moments
        if moments is None:
            gram = dense.mT @ dense if self._on_input else dense @ dense.mT
            return base.principal_vectors(gram)
        if self._on_input:
            matrix = self._matrix
            vectors = base.principal_vectors(matrix.mT @ matrix)
            self._parts["spectrum"] = base.energy(matrix @ vectors, (1,))
            return vectors
        outputs = moments.output(dense)  # no root of the larger side is needed
        vectors = base.principal_vectors(outputs)
        energies = (vectors * (outputs @ vectors)).sum(dim=-2).clamp_min(0)
        self._parts["spectrum"] = energies.cpu().numpy()
        return vectors.to(dense.dtype)

    def release(self) -> None:
        self._parts.pop("vectors", None)

    @property
    def _dense(self) -> Tensor:
        assert self.weight is not None
        return base.working_copy(self.weight.flatten(2))  # [groups, S, C]

    @property
    def _root(self) -> Tensor | None:
        return None if self._moments is None else self._moments.channel_root.to(self._dense.dtype)

    @property
    def _matrix(self) -> Tensor:
        root = self._root
        return self._dense if root is None else self._dense @ root

    def _projected(self, rank: int | None = None) -> Tensor:
        """The matrix in the leading directions: [groups, larger side, rank], columns u·σ."""
        matrix = self._matrix if self._on_input else self._matrix.mT
        return matrix @ self._vectors[..., :rank]

    @property
    def spectra(self) -> tuple[base.FloatArray, ...]:
        if "spectrum" not in self._parts:
            self._parts["spectrum"] = base.energy(self._projected(), (1,))
        return (self._parts["spectrum"],)

    def error(self, ranks: Sequence[Any]) -> Any:
        (rank,) = ranks
        if "errors" not in self._parts:
            energies = self.spectra[0].sum(axis=0)
            self._parts["errors"] = np.sqrt(base.tails(energies) / (energies.sum() or 1.0))
        return self._parts["errors"][np.asarray(rank) - 1]

    def factors(self, ranks: Sequence[int]) -> dict[str, Tensor]:
        (rank,) = ranks
        vectors = self._vectors[..., :rank]
        if self._on_input:
            root = self._root
            first, last = vectors.mT, self._projected(rank)
            if root is not None:  # back from whitened inputs: Vᵀ S⁻¹
                first = torch.linalg.solve_triangular(root, first, upper=False, left=False)
        else:
            first, last = vectors.mT @ self._dense, vectors
        # Factors of equal size train and quantise best.
        left = torch.linalg.vector_norm(first, dim=-1, keepdim=True)
        right = torch.linalg.vector_norm(last, dim=-2, keepdim=True).mT
        floor = NUMERICAL_RANK * (left * right).amax(dim=-2, keepdim=True)
        scale = torch.where(left * right > floor, right / left, torch.ones_like(left)).sqrt()
        assert self.weight is not None
        ones = (...,) + (None,) * (self.weight.dim() - 3)
        return {
            "first.weight": (first * scale).flatten(0, 1)[ones],
            "last.weight": (last / scale.mT).flatten(0, 1)[ones],
        }

    def projection(self) -> Projection:
        assert self.weight is not None
        vectors, root, kernel = self._vectors, self._root, self.weight.shape[3:]
        rows = columns = None
        if self._on_input:
            back = vectors.mT
            if root is not None:
                back = torch.linalg.solve_triangular(root, back, upper=False, left=False)
            columns = (vectors if root is None else root @ vectors, back)
        else:
            rows = (vectors.mT, vectors)
        return Projection(
            lambda weight: weight.flatten(3) if kernel else weight[..., None],
            lambda x: x.unflatten(-1, kernel) if kernel else x[..., 0],
            rows,
            columns,
            dtype=self.weight.dtype,
        )

    @property
    def nbytes(self) -> int:
        return self._bytes + (0 if self._moments is None else self._moments.nbytes)


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

    def prepare(self, weight: Tensor, moments: Moments | None = None) -> base.Basis:
        return _Basis(weight, moments)

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

"""Spatial SVD of k×k convolutions: kh×1 C→r, then 1×kw r→S (arXiv 1405.3866)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from rankopt._calibration.moments import Moments
from rankopt._decompositions import base
from rankopt._decompositions.projection import Projection
from rankopt._decompositions.refining import follows, last_factor, refined_groups
from rankopt._model.layers import Layer

__all__ = ["SpatialSVD"]


class _Basis(base.Basis):
    """SVD of the unfolding (C, kh) × (S, kw).

    With moments the rows are whitened by the moments of the channels, and with
    moments of whole patches the second factor is the least squares fit to the
    layer's output, nested in the rank like the Cholesky factor it comes from. Errors
    are of those; factors, where there are enough patches, have a first factor that follows
    them too, and lose no more.
    """

    def __init__(self, weight: Tensor, moments: Moments | None) -> None:
        self.weight: Tensor | None = weight
        self._moments = moments
        self._parts: dict[str, Any] = {}
        groups, _, inputs, high = weight.shape[:4]
        self._size = groups * (inputs * high) ** 2

    @property
    def _tensor(self) -> Tensor:
        """The weight as [groups, S, C, kh, kw]."""
        assert self.weight is not None
        return base.working_copy(self.weight)

    @property
    def _whitened(self) -> Tensor:
        """[groups, S, C, kh, kw], whitened along C."""
        tensor = self._tensor
        if self._moments is None:
            return tensor
        root = self._moments.channel_root.to(tensor.dtype)
        return torch.einsum("gscij,gcd->gsdij", tensor, root)

    @property
    def _matrix(self) -> Tensor:
        """[groups, C·kh, S·kw], whitened along C."""
        matrix: Tensor = self._whitened.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)
        return matrix

    @property
    def _vectors(self) -> Tensor:
        """Left singular vectors [groups, C·kh, n], n the smaller side."""
        vectors: Tensor | None = self._parts.get("vectors")
        if vectors is None:
            matrix = self._matrix
            if matrix.shape[1] <= matrix.shape[2]:
                vectors = base.principal_vectors(matrix @ matrix.mT)
            else:
                right = base.principal_vectors(matrix.mT @ matrix)
                left = matrix @ right
                # Orthonormal even where a singular value vanishes.
                vectors, upper = torch.linalg.qr(left)
                signs = upper.diagonal(dim1=-2, dim2=-1).sign()
                vectors = vectors * torch.where(signs == 0, 1.0, signs)[:, None, :]
            self._parts["vectors"] = vectors
        return vectors

    def _regression(self) -> tuple[Tensor, Tensor, Tensor]:
        """(first factor [g, n, C, kh], lower root of its features' moments, predictions)."""
        found: tuple[Tensor, Tensor, Tensor] | None = self._parts.get("regression")
        if found is None:
            assert self._moments is not None
            high, wide = self._tensor.shape[3:]
            rows = self._rows(self._vectors).double()
            second = self._moments.damped.double()
            channels = rows.shape[2]
            blocks = second.reshape(len(second), channels, high, wide, -1)
            half = torch.einsum("grci,gcijm->grjm", rows, blocks).flatten(1, 2)
            blocks = half.mT.reshape(len(second), channels, high, wide, -1)
            features = torch.einsum("grci,gcijm->grjm", rows, blocks).flatten(1, 2)
            features = 0.5 * (features + features.mT)
            scale = features.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
            eye = torch.eye(features.shape[-1], dtype=features.dtype, device=features.device)
            root = torch.linalg.cholesky(features + 1e-10 * scale[:, None, None] * eye)
            cross = self._tensor.double().flatten(2) @ half.mT
            predictions = torch.linalg.solve_triangular(root.mT, cross, upper=True, left=False)
            energy = float((self._tensor.double().flatten(2) @ second
                            * self._tensor.double().flatten(2)).sum())  # fmt: skip
            self._parts["energy"] = energy
            found = self._parts["regression"] = (rows, root, predictions)
        return found

    def release(self) -> None:
        for name in ("vectors", "regression"):
            self._parts.pop(name, None)

    def _rows(self, vectors: Tensor) -> Tensor:
        """First factor [groups, r, C, kh] that takes raw inputs."""
        channels, high = self._tensor.shape[2:4]
        rows: Tensor = vectors.mT.unflatten(-1, (channels, high))
        if self._moments is not None:
            root = self._moments.channel_root.to(rows.dtype)
            flat = rows.transpose(2, 3)
            rows = torch.linalg.solve_triangular(
                root[:, None], flat, upper=False, left=False
            ).transpose(2, 3)
        return rows

    @property
    def _fits_patches(self) -> bool:
        return self._moments is not None and self._moments.pixels > 1

    @property
    def spectra(self) -> tuple[base.FloatArray, ...]:
        return (base.energy(self._vectors.mT @ self._matrix, (2,)),)

    def error(self, ranks: Sequence[Any]) -> Any:
        (rank,) = ranks
        if "errors" not in self._parts:
            if self._fits_patches:
                _, _, predictions = self._regression()
                wide = self._tensor.shape[4]
                blocks = predictions.unflatten(-1, (-1, wide))
                kept = base.energy(blocks, (0, 1, 3)).cumsum()
                energy = self._parts["energy"]
                lost = np.clip(energy - kept, 0.0, None) / (energy or 1.0)
            else:
                energies = self.spectra[0].sum(axis=0)
                lost = base.tails(energies) / (energies.sum() or 1.0)
            self._parts["errors"] = np.sqrt(lost)
        return self._parts["errors"][np.asarray(rank) - 1]

    def fitted_error(self, ranks: Sequence[int]) -> float:
        if follows(self._moments):
            return self._refined(*ranks)[2]
        return super().fitted_error(ranks)

    def factors(self, ranks: Sequence[int]) -> dict[str, Tensor]:
        (rank,) = ranks
        if self._fits_patches:
            refines = follows(self._moments)
            rows, last = self._refined(rank)[:2] if refines else self._nested(rank)
        else:
            outputs, wide = self._tensor.shape[1], self._tensor.shape[4]
            vectors = self._vectors[..., :rank]
            rows = self._rows(vectors)
            last = (vectors.mT @ self._matrix).unflatten(-1, (outputs, wide)).transpose(1, 2)
        return {
            "first.weight": rows.flatten(0, 1)[..., None],
            "last.weight": last.flatten(0, 1)[..., None, :],
        }

    def _nested(self, rank: int) -> tuple[Tensor, Tensor]:
        """(first [groups, r, C, kh], last [groups, S, r, kw]) whose error `error` states."""
        rows, root, predictions = self._regression()
        wide = self._tensor.shape[4]
        width = rank * wide
        last = torch.linalg.solve_triangular(
            root[..., :width, :width], predictions[..., :width], upper=False, left=False
        )
        return rows[:, :rank], last.unflatten(-1, (rank, wide))

    def _refined(self, rank: int) -> tuple[Tensor, Tensor, float]:
        """As `_nested`, with a first factor that follows the patches, and their error."""
        moments, wide = self._moments, self._tensor.shape[4]
        assert moments is not None
        start = self._vectors[..., :rank].mT
        (first,) = refined_groups([start], self._whitened, moments, self._features)
        rows = self._rows(first.mT).double()
        features = torch.stack([self._features([part]) for part in rows.flatten(2)])
        weight, second = self._tensor.flatten(2), moments.damped.to(torch.float64)
        last, error = last_factor(features.flatten(2), weight, lambda x: x @ second)
        if error > (stated := float(self.error([rank]))):  # by rounding
            return *self._nested(rank), stated
        return rows, last.unflatten(-1, (rank, wide)), error

    def _features(self, leading: Sequence[Tensor]) -> Tensor:
        """What a first factor [r, C·kh] amounts to at each of kw places: [r·kw, C, kh·kw]."""
        (rows,) = leading
        channels, high, wide = self._tensor.shape[2:]
        place = torch.eye(wide, dtype=rows.dtype, device=rows.device)
        split = torch.einsum("rci,jk->rjcik", rows.unflatten(1, (channels, high)), place)
        return split.flatten(3).flatten(0, 1)

    def projection(self) -> Projection:
        _, outputs, inputs, high, wide = self._tensor.shape
        if self._fits_patches:
            assert self._moments is not None
            assert self.weight is not None
            rows, root, _ = self._regression()
            second = self._moments.damped.double()
            blocks = second.reshape(len(second), inputs, high, wide, -1)
            half = torch.einsum("grci,gcijm->grjm", rows, blocks).flatten(1, 2)
            raw = torch.linalg.solve_triangular(root.mT, half.mT, upper=True, left=False)
            eye = torch.eye(wide, dtype=rows.dtype, device=rows.device)
            features = torch.einsum("grci,jk->grjcik", rows, eye).flatten(3).flatten(1, 2)
            back = torch.linalg.solve_triangular(root, features, upper=False)
            return Projection(
                lambda weight: weight.flatten(2)[..., None],
                lambda x: x[..., 0].unflatten(2, (inputs, high, wide)),
                None,
                (raw, back),
                repeat=wide,
                dtype=self.weight.dtype,
            )
        assert self.weight is not None
        raw = vectors = self._vectors
        if self._moments is not None:
            root = self._moments.channel_root.to(vectors.dtype)
            grouped = vectors.unflatten(1, (inputs, high))
            raw = torch.einsum("gcd,gdin->gcin", root, grouped).flatten(1, 2)
        return Projection(
            # Columns are (C, kh), rows (S, kw).
            lambda weight: weight.permute(0, 1, 4, 2, 3).flatten(3).flatten(1, 2)[..., None],
            lambda x: (
                x[..., 0].unflatten(2, (inputs, high)).unflatten(1, (outputs, wide))
            ).permute(0, 1, 3, 4, 2),
            None,
            (raw, self._rows(vectors).flatten(2)),
            dtype=self.weight.dtype,
        )

    @property
    def nbytes(self) -> int:
        return 8 * self._size + (0 if self._moments is None else 2 * self._moments.nbytes)


@dataclass(frozen=True)
class SpatialSVD(base.Decomposition):
    """A vertical and a horizontal convolution with r channels between them.

    The best rank-r separable approximation of the kernel. With moments of enough patches
    both factors follow the layer's output, and `Basis.error` is an upper bound of what they
    lose; with those of fewer the horizontal one does.
    """

    name: ClassVar[str] = "spatial_svd"
    roles: ClassVar[Mapping[str, str]] = {"first": "first", "last": "last"}
    soft: ClassVar[bool] = True

    def refusal(self, layer: Layer) -> str | None:
        if len(layer.kernel) == 2 and min(layer.kernel) > 1:
            return None
        return "spatial_svd takes 2d convolutions with both kernel sides above one pixel"

    def rank_axes(self, layer: Layer) -> tuple[base.RankAxis, ...]:
        inputs, outputs = layer.group_shape
        high, wide = layer.kernel
        return (base.RankAxis("spatial", min(inputs * high, outputs * wide)),)

    def params(self, layer: Layer, ranks: Sequence[Any]) -> Any:
        (rank,) = ranks
        inputs, outputs = layer.group_shape
        high, wide = layer.kernel
        return layer.groups * rank * (inputs * high + outputs * wide)

    def macs(self, layer: Layer, ranks: Sequence[Any]) -> Any:
        (rank,) = ranks
        _, leaving = base.positions(layer)
        inputs, outputs = layer.group_shape
        high, wide = layer.kernel
        # The vertical factor strides down only: its map is still wide.
        (between,) = base.positions_between(layer)
        return layer.groups * rank * (inputs * high * between + outputs * wide * leaving)

    def prepare(self, weight: Tensor, moments: Moments | None = None) -> base.Basis:
        return _Basis(weight, moments)

    def factors_kind(self, moments: Moments) -> str:
        return "whitened+output" if moments.pixels > 1 else "whitened"

    def build(self, layer: Layer, ranks: Sequence[int]) -> nn.Sequential:
        (rank,) = ranks
        hidden = layer.groups * rank
        high, wide = layer.kernel
        return base.chain(
            first=base.conv(
                layer,
                layer.in_channels,
                hidden,
                kernel=(high, 1),
                groups=layer.groups,
                place=base.side_geometry(layer, 0),
            ),
            last=base.conv(
                layer,
                hidden,
                layer.out_channels,
                kernel=(1, wide),
                groups=layer.groups,
                bias=layer.bias,
                place=base.side_geometry(layer, 1),
            ),
        )

"""Bases whose errors weigh the directions of a layer's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rankopt.decompositions import base
from rankopt.decompositions.projection import Projection

__all__ = ["WeighedBasis", "weighed"]


class WeighedBasis(base.Basis):
    """The basis of R·W for a layer with weight W: R is taken back in the last factor.

    Errors are ‖R(W − Ŵ)S‖/‖RWS‖, see `rankopt.fisher`.

    Args:
        inner: Basis of the weighed weight.
        weight: Canonical weight [groups, S, C, *kernel].
        root: R, [groups, S, S], upper triangular.
    """

    def __init__(self, inner: base.Basis, weight: Tensor, root: Tensor) -> None:
        self.weight: Tensor | None = weight
        self._inner, self._root = inner, root

    @property
    def spectra(self) -> tuple[base.FloatArray, ...]:
        return self._inner.spectra

    def error(self, ranks: Sequence[Any]) -> Any:
        return self._inner.error(ranks)

    def fitted_error(self, ranks: Sequence[int]) -> float:
        return self._inner.fitted_error(ranks)

    def factors(self, ranks: Sequence[int]) -> dict[str, Tensor]:
        found = dict(self._inner.factors(ranks))
        last = next(reversed(found))
        rows = found[last].unflatten(0, (len(self._root), -1))
        found[last] = _plain(rows, self._root).flatten(0, 1)
        return found

    def release(self) -> None:
        self._inner.release()

    @property
    def nbytes(self) -> int:
        return self._inner.nbytes + self._root.numel() * self._root.element_size()

    def projection(self) -> Projection:
        found = self._inner.projection()
        unfold, fold = found.unfold, found.fold
        found.unfold = lambda weight: unfold(weighed(weight, self._root))
        found.fold = lambda x: _plain(fold(x), self._root)
        return found


def _plain(weight: Tensor, root: Tensor) -> Tensor:
    """R⁻¹·W of a weight [groups, S, ...]."""
    rows: Tensor = torch.linalg.solve_triangular(root.to(weight), weight.flatten(2), upper=True)
    return rows.reshape(weight.shape)


def weighed(weight: Tensor, root: Tensor | None) -> Tensor:
    """R·W of a canonical weight; the weight itself without a root."""
    if root is None:
        return weight
    product: Tensor = torch.einsum("gts,gs...->gt...", root.to(weight), weight)
    return product

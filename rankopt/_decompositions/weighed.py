"""Bases whose errors weigh the directions of a layer's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rankopt._calibration.moments import Moments
from rankopt._decompositions import base
from rankopt._decompositions.projection import Projection

__all__ = ["WeighedBasis", "weighed"]


class WeighedBasis(base.Basis):
    """The basis of R·W for a layer with weight W: R is taken back in the last factor.

    Errors are ‖R(W − Ŵ)S‖/‖RWS‖, see `rankopt._calibration.fisher`.

    Args:
        inner: Basis of the weighed weight.
        weight: Canonical weight [groups, S, C, *kernel].
        moments: Have R, [groups, S, S], upper triangular; it is read whenever needed.
    """

    def __init__(self, inner: base.Basis, weight: Tensor, moments: Moments) -> None:
        self.weight: Tensor | None = weight
        self._inner, self._moments = inner, moments

    @property
    def _root(self) -> Tensor:
        root = self._moments.output_root
        assert root is not None
        return root

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
        root = self._root
        rows = found[last].unflatten(0, (len(root), -1))
        found[last] = _plain(rows, root).flatten(0, 1)
        return found

    def fitting(self, features: Tensor) -> Tensor:
        return self._inner.fitting(features)  # each output is fitted by itself

    def release(self) -> None:
        self._inner.release()

    @property
    def nbytes(self) -> int:
        return self._inner.nbytes

    def projection(self) -> Projection:
        assert self.weight is not None
        found, root = self._inner.projection().to(self.weight.dtype), self._root
        unfold, fold = found.unfold, found.fold
        found.unfold = lambda weight: unfold(weighed(weight, root).to(weight.dtype))
        found.fold = lambda x: _plain(fold(x), root)
        return found


def _plain(weight: Tensor, root: Tensor) -> Tensor:
    """R⁻¹·W of a weight [groups, S, ...]."""
    rows = _precise(weight).flatten(2)
    solved: Tensor = torch.linalg.solve_triangular(root.to(rows), rows, upper=True)
    return solved.reshape(weight.shape).to(weight.dtype)


def _precise(weight: Tensor) -> Tensor:
    """The weight in a precision that triangular systems are solved in."""
    return weight.float() if weight.element_size() < 4 else weight


def weighed(weight: Tensor, root: Tensor | None) -> Tensor:
    """R·W of a canonical weight, not rounded to half precision; the weight without a root."""
    if root is None:
        return weight
    precise = _precise(weight)
    product: Tensor = torch.einsum("gts,gs...->gt...", root.to(precise), precise)
    return product

"""Bases whose factors are found by iteration, so that errors are known only where fitted."""

from __future__ import annotations

import math
import threading
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Final

import numpy as np
import torch
from torch import Tensor

from rankopt._calibration.moments import Moments
from rankopt._decompositions import base
from rankopt._decompositions.refining import (
    EVALUATIONS,
    QUICK_EVALUATIONS,
    Penalty,
    follows,
    last_factor,
    least_squares,
    refined,
    whitened_patches,
)

__all__ = ["FittedBasis", "FittedDecomposition"]

# Loads, as shares of the dense weight's, at which errors are fitted: from the least ranks on.
ANCHORS: Final = (0.0, 0.03, 0.1, 0.3, 0.7)
# Between two anchors whose corrections are further apart than this (in logarithms of squared
# errors) there is a further one, as long as there are not too many.
FAR_APART: Final = 1.0
MOST_ANCHORS: Final = 8
# Chains that are held, in float64, each about half the weight's size.
KEPT_FITS: Final = 4


class FittedBasis(base.Basis):
    """A closed-form estimate of the error, corrected by fits at a few ranks.

    The ratio of fitted to estimated squared error is interpolated over the size
    of the chain, on logarithmic scales, so that `error` costs at most
    `MOST_ANCHORS` fits whatever is asked. `fitted_error` is the truth for
    one choice of ranks.

    Factors are fitted to the weight, whitened along its input mode if moments of
    the channels are known; where those of whole patches are, from enough positions, all
    of them then follow the layer's output (`refined`). The last factor is in any case the
    least squares fit to the weight, or with moments to the layer's output, given all the others.

    Args:
        weight: Canonical weight [groups, S, C, *kernel].
        moments: Moments of the layer's inputs.
    """

    def __init__(self, weight: Tensor, moments: Moments | None) -> None:
        self.weight: Tensor | None = weight
        self._moments = moments
        self._parts: dict[str, Any] = {}
        self._fits: dict[tuple[int, ...], tuple[dict[str, Tensor], float]] = {}
        self._held = weight.numel()
        self._lock = threading.Lock()

    # What a method provides

    @property
    def _ends_fixed(self) -> bool:
        return False

    @abstractmethod
    def _estimate(self, ranks: Sequence[Any]) -> Any:
        """Estimated squared relative error; integers, or arrays that broadcast."""

    @abstractmethod
    def _size(self, ranks: Sequence[Any]) -> Any:
        """Weight elements of the chain for one group."""

    @abstractmethod
    def _anchor(self, elements: float) -> tuple[int, ...]:
        """Ranks of a chain with about so many weight elements per group."""

    @abstractmethod
    def _fit(self, tensor: Tensor, ranks: Sequence[int], *, thorough: bool) -> list[Tensor]:
        """All factors but the last, in order, for the whitened weight of one group.

        If `_ends_fixed`, the last one too, [S, r], which is then not fitted again.

        Args:
            tensor: [S, C, *kernel].
            ranks: One per axis.
            thorough: Whether the factors will be used; otherwise a few sweeps do.
        """

    def _penalty(self, tensor: Tensor, ranks: Sequence[int]) -> Penalty | None:
        """What refined factors for this whitened weight pay for beside the error."""
        return None

    @abstractmethod
    def _features(self, leading: Sequence[Tensor]) -> Tensor:
        """What the leading factors of one group amount to, [r, C, pixels]."""

    @abstractmethod
    def _name(self, leading: Sequence[Tensor], last: Tensor) -> dict[str, Tensor]:
        """Parameters of the chain.

        Args:
            leading: Each factor stacked over groups, [groups, ...].
            last: [groups, S, r].
        """

    # Errors

    def error(self, ranks: Sequence[Any]) -> Any:
        squared = np.asarray(self._estimate(ranks)) * self._correction(ranks)
        return np.sqrt(np.clip(squared, 0.0, 1.0))

    def _correction(self, ranks: Sequence[Any]) -> Any:
        sizes, ratios = self._ratios()
        if not len(sizes):
            return 1.0
        return np.exp(np.interp(np.log(np.asarray(self._size(ranks))), sizes, ratios))

    def _ratios(self) -> tuple[base.FloatArray, base.FloatArray]:
        """Logarithms of anchors' sizes and of fitted over estimated squared errors."""
        with self._lock:
            if "ratios" not in self._parts:
                self._parts["ratios"] = self._measured_ratios()
            sizes, ratios = self._parts["ratios"]
        return sizes, ratios

    def _measured_ratios(self) -> tuple[base.FloatArray, base.FloatArray]:
        found: dict[tuple[int, ...], tuple[float, float] | None] = {}
        for share in ANCHORS:
            self._add_ratio(found, share * self._elements)
        while len(found) < MOST_ANCHORS:
            points = sorted(point for point in found.values() if point)
            gaps = [(abs(b[1] - a[1]), a[0], b[0]) for a, b in pairwise(points)]
            gap, low, high = max(gaps, default=(0.0, 0.0, 0.0))
            if gap <= FAR_APART or not self._add_ratio(found, math.exp((low + high) / 2)):
                break
        pairs = np.array(sorted(point for point in found.values() if point)).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    def _add_ratio(
        self, found: dict[tuple[int, ...], tuple[float, float] | None], elements: float
    ) -> bool:
        """Fit at the ranks of about so many elements; False if they are among those `found`."""
        ranks = self._anchor(elements)
        if ranks in found:
            return False
        found[ranks] = None
        estimate = float(self._estimate(ranks))
        if estimate > 1e-12:
            fitted = self._solve(ranks, thorough=False)[1] ** 2
            size = math.log(float(self._size(ranks)))
            found[ranks] = size, math.log(max(fitted / estimate, 1e-12))
        return True

    def fitted_error(self, ranks: Sequence[int]) -> float:
        return self._solved(ranks)[1]

    # Factors

    def factors(self, ranks: Sequence[int]) -> dict[str, Tensor]:
        return self._solved(ranks)[0]

    def _solved(self, ranks: Sequence[int]) -> tuple[dict[str, Tensor], float]:
        key = tuple(int(rank) for rank in ranks)
        with self._lock:
            # The latest last: a search may ask for many.
            found = self._fits.pop(key, None) or self._solve(key, thorough=True)
            self._fits[key] = found
            if len(self._fits) > KEPT_FITS:
                del self._fits[next(iter(self._fits))]
        return found

    def _solve(self, ranks: Sequence[int], *, thorough: bool) -> tuple[dict[str, Tensor], float]:
        groups, tensors = [], self._tensor
        patches = self._whitened_patches(tensors) if self._refines else None
        for group, tensor in enumerate(tensors):
            factors = self._fit(tensor, ranks, thorough=thorough)
            if patches is not None:
                factors = refined(
                    factors,
                    tensor.flatten(1),
                    patches[group],
                    self._features,
                    self._penalty(tensor, ranks),
                    evaluations=EVALUATIONS if thorough else QUICK_EVALUATIONS,
                )
            first, *rest = factors
            groups.append([self._unwhitened(group, first), *rest])
        stacked = [torch.stack(factors) for factors in zip(*groups, strict=True)]
        given = stacked.pop() if self._ends_fixed else None
        count = len(stacked)
        features = torch.stack([self._features(leading[:count]) for leading in groups])
        last, error = self._last(features, given)
        return self._name(stacked, last), error

    def _last(self, features: Tensor, given: Tensor | None) -> tuple[Tensor, float]:
        """`last_factor` of features [groups, r, C, pixels]."""
        return last_factor(features.flatten(2), self._dense.flatten(2), self._metric, given)

    def fitting(self, features: Tensor) -> Tensor:
        rows = features.double().flatten(2)
        seen = self._metric(rows)
        return least_squares(seen @ rows.mT, seen.mT)

    def _metric(self, rows: Tensor) -> Tensor:
        """Rows [groups, n, C·pixels] times the second moments of their patches."""
        if self._moments is None:
            return rows
        if self._knows_patches or self._pixels == 1:
            return rows @ self._moments.damped.to(rows)
        root = self._moments.channel_root.to(rows)
        split = rows.unflatten(-1, (-1, self._pixels))
        product: Tensor = torch.einsum("gncp,gcd->gndp", split, root @ root.mT).flatten(2)
        return product

    @property
    def _knows_patches(self) -> bool:
        return self._moments is not None and self._moments.pixels > 1

    @property
    def _refines(self) -> bool:
        return follows(self._moments) and not self._ends_fixed

    def _whitened_patches(self, like: Tensor) -> Tensor:
        """Moments [groups, C·pixels, C·pixels] of what the whitened weight is applied to."""
        assert self._moments is not None
        return whitened_patches(self._moments, like)

    def _unwhitened(self, group: int, first: Tensor) -> Tensor:
        """Rows [r, C] of the first factor, for raw inputs."""
        if self._moments is None:
            return first
        root = self._moments.channel_root[group].to(first)
        rows: Tensor = torch.linalg.solve_triangular(root, first, upper=False, left=False)
        return rows

    # The weight

    @property
    def _dense(self) -> Tensor:
        """[groups, S, C, *kernel]."""
        assert self.weight is not None
        return base.working_copy(self.weight)

    @property
    def _tensor(self) -> Tensor:
        """[groups, S, C, *kernel], whitened along C."""
        dense = self._dense
        if self._moments is None:
            return dense
        root = self._moments.channel_root.to(dense)
        return torch.einsum("gsc...,gcd->gsd...", dense, root)

    @property
    def _pixels(self) -> int:
        assert self.weight is not None
        return math.prod(self.weight.shape[3:])

    @property
    def _elements(self) -> int:
        assert self.weight is not None
        return math.prod(self.weight.shape[1:])

    def release(self) -> None:
        with self._lock:
            self._fits.clear()

    @property
    def nbytes(self) -> int:
        return KEPT_FITS * 8 * self._held // 2


@dataclass(frozen=True)
class FittedDecomposition(base.Decomposition):
    """A decomposition whose basis is a `FittedBasis`."""

    exact_error: ClassVar[bool] = False

    @property
    def refits(self) -> bool:
        return True

    def factors_kind(self, moments: Moments) -> str:
        return "whitened+output"

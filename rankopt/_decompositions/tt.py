"""Tensor train of k×k convolutions: 1x1 C→r1, kh×1 r1→r2, 1×kw r2→r3, 1x1 r3→S."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from rankopt._calibration.moments import Moments
from rankopt._decompositions import base
from rankopt._decompositions.fitted import FittedBasis, FittedDecomposition
from rankopt._model.layers import Layer

__all__ = ["TT"]


class _Basis(FittedBasis):
    """Estimates are the bound of TT-SVD, the sum of what each unfolding discards."""

    @property
    def _unfoldings(self) -> list[Tensor]:
        """[groups, C·k1..kj, kj+1..kd·S] for j = 0..d."""
        tensor = self._tensor.movedim(1, -1)  # [groups, C, k1, ..., kd, S]
        cuts = range(1, tensor.dim() - 1)
        return [tensor.flatten(cut + 1).flatten(1, cut) for cut in cuts]

    @property
    def spectra(self) -> tuple[base.FloatArray, ...]:
        if "spectra" not in self._parts:
            self._parts["spectra"] = tuple(_spectrum(rows) for rows in self._unfoldings)
        found: tuple[base.FloatArray, ...] = self._parts["spectra"]
        return found

    def _estimate(self, ranks: Sequence[Any]) -> Any:
        if "tails" not in self._parts:
            summed = [energies.sum(axis=0) for energies in self.spectra]
            self._parts["tails"] = [base.tails(e) / (e.sum() or 1.0) for e in summed]
        lost = sum(
            tail[np.asarray(rank) - 1]
            for tail, rank in zip(self._parts["tails"], ranks, strict=True)
        )
        return np.clip(lost, 0.0, 1.0)

    def _size(self, ranks: Sequence[Any]) -> Any:
        assert self.weight is not None
        return _elements(self.weight.shape[1:], ranks)

    def _anchor(self, elements: float) -> tuple[int, ...]:
        """Every rank the same share of its maximum."""
        assert self.weight is not None
        tops = _maxima(self.weight.shape[1:])
        low, high = 0.0, 1.0
        for _ in range(20):
            share = (low + high) / 2
            ranks = [max(1, round(share * top)) for top in tops]
            low, high = (share, high) if self._size(ranks) <= elements else (low, share)
        return tuple(max(1, round(low * top)) for top in tops)

    def _fit(self, tensor: Tensor, ranks: Sequence[int], *, thorough: bool) -> list[Tensor]:
        rest = tensor.movedim(0, -1).flatten(1)  # [C, pixels·S]
        kernel = tensor.shape[2:]
        leading = []
        for rank, side in zip(ranks, (*kernel, tensor.shape[0]), strict=True):
            vectors = _left_vectors(rest, rank)  # [rank before·side, rank]
            leading.append(vectors)
            rest = (vectors.mT @ rest).unflatten(1, (side, -1)).flatten(0, 1)
        first, *cores = leading
        sizes = zip(cores, ranks, kernel, strict=False)
        return [first.mT, *(core.mT.unflatten(1, (rank, side)) for core, rank, side in sizes)]

    def _features(self, leading: Sequence[Tensor]) -> Tensor:
        first, *cores = leading
        features = first[..., None]  # [r, C, pixels so far]
        for core in cores:
            features = torch.einsum("qrk,rcp->qcpk", core, features).flatten(2)
        return features

    def _name(self, leading: Sequence[Tensor], last: Tensor) -> dict[str, Tensor]:
        assert self.weight is not None
        dims = self.weight.dim() - 3
        ones = (...,) + (None,) * dims
        first, *cores = (factor.flatten(0, 1) for factor in leading)
        named = {"first.weight": first[ones]}
        for index, core in enumerate(cores):
            sides = [1] * dims
            sides[index] = core.shape[-1]
            named[f"core{index + 1}.weight"] = core.reshape(*core.shape[:2], *sides)
        named["last.weight"] = last.flatten(0, 1)[ones]
        return named


def _spectrum(rows: Tensor) -> base.FloatArray:
    """Squared singular values [groups, min(n, m)] of [groups, n, m], descending."""
    gram = rows @ rows.mT if rows.shape[1] <= rows.shape[2] else rows.mT @ rows
    values = torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0)
    found: base.FloatArray = values.double().cpu().numpy()
    return found


def _left_vectors(rows: Tensor, rank: int) -> Tensor:
    """Principal left vectors [n, rank] of [n, m]; zeros beyond the n there are."""
    found = base.principal_vectors((rows @ rows.mT)[None])[0][:, :rank]
    return nn.functional.pad(found, (0, rank - found.shape[1]))


def _maxima(shape: Sequence[int]) -> list[int]:
    """Largest useful rank of each unfolding of [S, C, *kernel]."""
    _, inputs, *kernel = shape
    total = math.prod(shape)
    left = [inputs * math.prod(kernel[:cut]) for cut in range(len(kernel) + 1)]
    return [min(size, total // size) for size in left]


def _elements(shape: Sequence[int], ranks: Sequence[Any]) -> Any:
    """Weight elements of the chain for one group of [S, C, *kernel]."""
    outputs, inputs, *kernel = shape
    cores = sum(
        before * side * after
        for before, side, after in zip(ranks[:-1], kernel, ranks[1:], strict=True)
    )
    return inputs * ranks[0] + cores + ranks[-1] * outputs


@dataclass(frozen=True)
class TT(FittedDecomposition):
    """Mix channels, convolve along each side of the kernel in turn, mix channels.

    Cores come from TT-SVD, left to right; with moments the input mode is
    whitened and the last factor fitted to the layer's output, and with those of
    enough patches all of them. The train of order
    three, (S, k², C), is another name for Tucker-2.

    References:
        Oseledets, Tensor-Train Decomposition, SIAM J. Sci. Comput. 33 (2011).
    """

    name: ClassVar[str] = "tt"
    roles: ClassVar[Mapping[str, str]] = {
        "first": "first", "core1": "core", "core2": "core", "core3": "core", "last": "last"
    }  # fmt: skip

    def refusal(self, layer: Layer) -> str | None:
        if len(layer.kernel) >= 2 and min(layer.kernel) > 1:
            return None
        return "tt takes 2d and 3d convolutions with every kernel side above one pixel"

    def rank_axes(self, layer: Layer) -> tuple[base.RankAxis, ...]:
        inputs, outputs = layer.group_shape
        tops = _maxima((outputs, inputs, *layer.kernel))
        return tuple(base.RankAxis(f"tt{i + 1}", top) for i, top in enumerate(tops))

    def params(self, layer: Layer, ranks: Sequence[Any]) -> Any:
        inputs, outputs = layer.group_shape
        return layer.groups * _elements((outputs, inputs, *layer.kernel), ranks)

    def macs(self, layer: Layer, ranks: Sequence[Any]) -> Any:
        entering, leaving = base.positions(layer)
        inputs, outputs = layer.group_shape
        positions = (*base.positions_between(layer), leaving)
        cores = sum(
            before * side * after * there
            for before, side, after, there in zip(
                ranks[:-1], layer.kernel, ranks[1:], positions, strict=True
            )
        )
        ends = inputs * ranks[0] * entering + ranks[-1] * outputs * leaving
        return layer.groups * (ends + cores)

    def prepare(self, weight: Tensor, moments: Moments | None = None) -> base.Basis:
        return _Basis(weight, moments)

    def build(self, layer: Layer, ranks: Sequence[int]) -> nn.Sequential:
        hidden = [layer.groups * rank for rank in ranks]
        factors = {"first": base.conv(layer, layer.in_channels, hidden[0], groups=layer.groups)}
        for index, side in enumerate(layer.kernel):
            sides = [1] * len(layer.kernel)
            sides[index] = side
            factors[f"core{index + 1}"] = base.conv(
                layer,
                hidden[index],
                hidden[index + 1],
                kernel=sides,
                groups=layer.groups,
                place=base.side_geometry(layer, index),
            )
        factors["last"] = base.conv(
            layer, hidden[-1], layer.out_channels, groups=layer.groups, bias=layer.bias
        )
        return base.chain(**factors)

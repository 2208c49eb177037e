"""Branched Tucker-2: a sum of N small Tucker-2 terms, as one chain with a grouped core."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rankopt._calibration.moments import Moments
from rankopt._decompositions import base
from rankopt._decompositions.fitted import FittedBasis, FittedDecomposition
from rankopt._decompositions.tucker2 import Tucker2
from rankopt._model.layers import Layer

__all__ = ["BranchedTucker"]

# Sweeps of a fit that only tells the error.
QUICK_SWEEPS: Final = 5

# (input vectors [C, p], core [p, q, K], output vectors [S, q])
Term = tuple[Tensor, Tensor, Tensor]


class _Basis(FittedBasis):
    """Estimates lie between plain Tucker-2 at the full ranks and at one branch's ranks."""

    def __init__(self, weight: Tensor, moments: Moments | None, settings: BranchedTucker) -> None:
        super().__init__(weight, moments)
        self.settings = settings

    @property
    def _plain(self) -> base.Basis:
        """Plain Tucker-2 of the whitened weight."""
        if "plain" not in self._parts:
            self._parts["plain"] = Tucker2().prepare(self._tensor)
        found: base.Basis = self._parts["plain"]
        return found

    @property
    def spectra(self) -> tuple[base.FloatArray, ...]:
        return self._plain.spectra

    def _estimate(self, ranks: Sequence[Any]) -> Any:
        assert self.weight is not None
        branches = self.settings.branches
        tops = self.weight.shape[2], self.weight.shape[1]
        ends = []
        for share in (1, branches):
            inside = [
                np.clip(np.asarray(rank) // share, 1, top)
                for rank, top in zip(ranks, tops, strict=True)
            ]
            ends.append(np.asarray(self._plain.error(inside)) ** 2)
        return 0.5 * (ends[0] + ends[1])

    def release(self) -> None:
        super().release()
        if "plain" in self._parts:
            self._plain.release()

    def _size(self, ranks: Sequence[Any]) -> Any:
        assert self.weight is not None
        first, second = ranks
        outputs, inputs = self.weight.shape[1:3]
        core = self._pixels * first * second // self.settings.branches
        return inputs * first + core + second * outputs

    def _anchor(self, elements: float) -> tuple[int, ...]:
        assert self.weight is not None
        branches = self.settings.branches
        outputs, inputs = self.weight.shape[1:3]
        beta = outputs / inputs
        quadratic, linear = beta * self._pixels / branches, inputs + beta * outputs
        first = (math.sqrt(linear**2 + 4 * quadratic * elements) - linear) / (2 * quadratic)
        tops = inputs, outputs
        return tuple(
            branches * min(top, max(1, round(rank / branches)))
            for rank, top in zip((first, beta * first), tops, strict=True)
        )

    def _fit(self, tensor: Tensor, ranks: Sequence[int], *, thorough: bool) -> list[Tensor]:
        branches, sweeps = self.settings.branches, self.settings.sweeps
        first, second = (rank // branches for rank in ranks)
        flat = tensor.flatten(2)
        if self.settings.init == "truncate":
            terms = _truncated(flat, first, second, branches)
        else:
            sweeps = sweeps if thorough else min(sweeps, QUICK_SWEEPS)
            terms = _deflated(flat, first, second, branches, sweeps)
        inputs = torch.cat([right for right, _, _ in terms], dim=1)
        cores = torch.cat([core.transpose(0, 1) for _, core, _ in terms])
        last = [torch.cat([left for _, _, left in terms], dim=1)] if self._ends_fixed else []
        return [inputs.mT, cores, *last]

    @property
    def _ends_fixed(self) -> bool:
        # As published, nothing is fitted after the blocks are cut out.
        return self.settings.init == "truncate"

    def _features(self, leading: Sequence[Tensor]) -> Tensor:
        inputs, cores = leading
        branches = self.settings.branches
        rows, kernels = (factor.unflatten(0, (branches, -1)) for factor in (inputs, cores))
        features: Tensor = torch.einsum("bpc,bqpk->bqck", rows, kernels).flatten(0, 1)
        return features

    def _name(self, leading: Sequence[Tensor], last: Tensor) -> dict[str, Tensor]:
        assert self.weight is not None
        inputs, cores = (factor.flatten(0, 1) for factor in leading)
        size = self.weight.shape[3:]
        ones = (...,) + (None,) * len(size)
        return {
            "first.weight": inputs[ones],
            "core.weight": cores.unflatten(-1, size),
            "last.weight": last.flatten(0, 1)[ones],
        }


def _truncated(tensor: Tensor, first: int, second: int, branches: int) -> list[Term]:
    """The diagonal blocks of the core of a plain Tucker-2 (arXiv 2407.20266, eq. 17).

    Directions beyond full rank are zero.
    """
    outputs, inputs = tensor.shape[:2]
    left = _vectors(tensor, 0, min(second * branches, outputs))
    right = _vectors(_along(tensor, left, 0), 1, min(first * branches, inputs))
    terms = []
    for branch in range(branches):
        rows = _padded(right[:, branch * first : (branch + 1) * first], first)
        columns = _padded(left[:, branch * second : (branch + 1) * second], second)
        core = _along(_along(tensor, columns, 0), rows, 1).transpose(0, 1)
        terms.append((rows, core, columns))
    return terms


def _deflated(tensor: Tensor, first: int, second: int, branches: int, sweeps: int) -> list[Term]:
    """Block terms, each refined in turn on what the others leave; the error never grows."""
    outputs = tensor.shape[0]
    rest, terms = tensor, []
    for _ in range(branches):
        left = _vectors(rest, 0, min(second, outputs))
        right = _vectors(_along(rest, left, 0), 1, first)
        term = _refined(rest, right, left)
        terms.append(term)
        rest = rest - _dense(term)
    for _ in range(sweeps):
        for index, term in enumerate(terms):
            rest = rest + _dense(term)
            terms[index] = _refined(rest, term[0], term[2])
            rest = rest - _dense(terms[index])
    return terms


def _refined(tensor: Tensor, right: Tensor, left: Tensor) -> Term:
    """One step of orthogonal iteration in each mode, and the core that goes with them."""
    rows = _along(tensor, left, 0).movedim(1, 0).flatten(1)
    right = torch.linalg.qr(rows @ (rows.mT @ right))[0]
    reduced = _along(tensor, right, 1)
    rows = reduced.flatten(1)
    left = torch.linalg.qr(rows @ (rows.mT @ left))[0]
    return right, _along(reduced, left, 0).transpose(0, 1), left


def _vectors(tensor: Tensor, mode: int, count: int) -> Tensor:
    """Principal vectors [n, count] of one mode of [S, C, K]."""
    rows = tensor.movedim(mode, 0).flatten(1)
    return base.principal_vectors((rows @ rows.mT)[None])[0][:, :count]


def _along(tensor: Tensor, vectors: Tensor, mode: int) -> Tensor:
    """Contract one mode of [S, C, K] with the columns of [n, r]."""
    moved = tensor.movedim(mode, 0)
    product = vectors.mT @ moved.flatten(1)
    contracted: Tensor = product.unflatten(1, moved.shape[1:]).movedim(0, mode)
    return contracted


def _dense(term: Term) -> Tensor:
    right, core, left = term
    product: Tensor = torch.einsum("sq,pqk,cp->sck", left, core, right)
    return product


def _padded(columns: Tensor, width: int) -> Tensor:
    return nn.functional.pad(columns, (0, width - columns.shape[1]))


@dataclass(frozen=True)
class BranchedTucker(FittedDecomposition):
    """Tucker-2 whose core is split into N groups: 1x1 C→r1, k×k in N groups, 1x1 r2→S.

    Each branch spans its own r1/N inputs and r2/N outputs, so ranks may exceed the
    channels. At equal parameters it loses less than one plain core if the branches
    are fitted together.

    Args:
        branches: N; ranks are its multiples.
        init: ``deflate`` fits the branches in turn on what the others leave.
            ``truncate`` keeps the diagonal blocks of a plain core, as published;
            its error is larger than that of a plain Tucker-2 of the same size.
        sweeps: Rounds over the branches.

    References:
        arXiv 2407.20266, section 2.4, eq. 17 for ``truncate``.
    """

    name: ClassVar[str] = "branched_tucker"
    roles: ClassVar[Mapping[str, str]] = {"first": "first", "core": "core", "last": "last"}
    branches: int = 2
    init: Literal["deflate", "truncate"] = "deflate"
    sweeps: int = 20

    def __post_init__(self) -> None:
        for field, least in (("branches", 2), ("sweeps", 0)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{field}={value!r}: expected a whole number, {least} or more")
        if self.init not in ("deflate", "truncate"):
            raise ValueError(f"init={self.init!r}: expected 'deflate' or 'truncate'")

    def refusal(self, layer: Layer) -> str | None:
        if layer.is_conv and not layer.pointwise:
            return None
        return "branched_tucker takes convolutions with a kernel above one pixel"

    def rank_axes(self, layer: Layer) -> tuple[base.RankAxis, ...]:
        inputs, outputs = layer.group_shape
        size = base.kernel_size(layer)
        return (
            base.RankAxis("input", self.branches * min(inputs, outputs * size), self.branches),
            base.RankAxis("output", self.branches * min(outputs, inputs * size), self.branches),
        )

    def params(self, layer: Layer, ranks: Sequence[Any]) -> Any:
        first, second = ranks
        inputs, outputs = layer.group_shape
        core = base.kernel_size(layer) * first * second // self.branches
        return layer.groups * (inputs * first + core + second * outputs)

    def macs(self, layer: Layer, ranks: Sequence[Any]) -> Any:
        first, second = ranks
        entering, leaving = base.positions(layer)
        inputs, outputs = layer.group_shape
        core = base.kernel_size(layer) * first * second // self.branches
        return layer.groups * (inputs * first * entering + (core + second * outputs) * leaving)

    @property
    def refits(self) -> bool:
        return self.init != "truncate"  # as published, nothing is fitted

    def prepare(self, weight: Tensor, moments: Moments | None = None) -> base.Basis:
        return _Basis(weight, moments, self)

    def build(self, layer: Layer, ranks: Sequence[int]) -> nn.Sequential:
        first, second = (layer.groups * rank for rank in ranks)
        return base.chain(
            first=base.conv(layer, layer.in_channels, first, groups=layer.groups),
            core=base.conv(
                layer,
                first,
                second,
                kernel=layer.kernel,
                groups=layer.groups * self.branches,
                place=base.geometry(layer),
            ),
            last=base.conv(layer, second, layer.out_channels, groups=layer.groups, bias=layer.bias),
        )

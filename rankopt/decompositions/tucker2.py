"""Tucker-2 of k×k convolutions: 1x1 C→r1, k×k r1→r2, 1x1 r2→S (arXiv 1511.06530)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from rankopt.decompositions import base
from rankopt.layers import Layer

__all__ = ["Tucker2"]


class _Basis(base.Basis):
    """HOSVD vectors of both channel modes; the core's energies give every error."""

    def __init__(self, weight: Tensor, hooi: int) -> None:
        self.weight = weight
        self.hooi = hooi
        tensor = base.float64_ready(weight.flatten(3))  # [groups, S, C, k]
        outputs, self.outputs = base.symmetric_eigh(_gram(tensor, 1))
        inputs, self.inputs = base.symmetric_eigh(_gram(tensor, 2))
        self.spectra = (inputs.cpu().numpy(), outputs.cpu().numpy())
        core = _project(_project(tensor, self.outputs, 1), self.inputs, 2)
        energy = core.square().sum(dim=(0, 3)).cpu().numpy()  # [S, C]
        # Prefix sums over both modes: the energy every rank pair retains.
        retained = energy.cumsum(axis=0).cumsum(axis=1).T  # [r1 - 1, r2 - 1]
        total = retained[-1, -1]
        self._errors = base.fractions(retained, total) if total else np.zeros_like(retained)

    def error(self, ranks: Sequence[Any]) -> Any:
        first, second = ranks
        return self._errors[np.asarray(first) - 1, np.asarray(second) - 1]

    def factors(self, ranks: Sequence[int]) -> dict[str, Tensor]:
        first, second = ranks
        tensor = base.float64_ready(self.weight.flatten(3))
        inputs, outputs = self.inputs[..., :first], self.outputs[..., :second]
        for _ in range(self.hooi):
            if first < tensor.shape[2]:
                outputs = base.symmetric_eigh(_gram(_project(tensor, inputs, 2), 1))[1]
                outputs = outputs[..., :second]
            if second < tensor.shape[1]:
                inputs = base.symmetric_eigh(_gram(_project(tensor, outputs, 1), 2))[1]
                inputs = inputs[..., :first]
        core = _project(_project(tensor, outputs, 1), inputs, 2)
        kernel = self.weight.shape[3:]
        ones = (...,) + (None,) * len(kernel)
        return {
            "first.weight": inputs.mT.flatten(0, 1)[ones],
            "core.weight": core.flatten(0, 1).unflatten(-1, kernel),
            "last.weight": outputs.flatten(0, 1)[ones],
        }

    @property
    def nbytes(self) -> int:
        return (self.inputs.numel() + self.outputs.numel() + self._errors.size) * 8


def _gram(tensor: Tensor, mode: int) -> Tensor:
    """Gram matrix [groups, n, n] of the unfolding of [groups, S, C, k] along `mode`."""
    rows = tensor.movedim(mode, 1).flatten(2)
    return rows @ rows.mT


def _project(tensor: Tensor, vectors: Tensor, mode: int) -> Tensor:
    """Contract `mode` of [groups, S, C, k] with the columns of [groups, n, r]."""
    moved = tensor.movedim(mode, 1)
    shape = (len(tensor), vectors.shape[-1], *moved.shape[2:])
    return (vectors.mT @ moved.flatten(2)).reshape(shape).movedim(1, mode)


@dataclass(frozen=True)
class Tucker2(base.Decomposition):
    """Both channel modes compressed, the kernel kept in a small core.

    Args:
        hooi: Sweeps of higher-order orthogonal iteration when factors are
            made; one recovers nearly all of its gain. `Basis.error` is that of the
            plain truncation, so an upper bound.
    """

    name: ClassVar[str] = "tucker2"
    roles: ClassVar[Mapping[str, str]] = {"first": "first", "core": "core", "last": "last"}
    soft: ClassVar[bool] = True
    hooi: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.hooi, bool) or not isinstance(self.hooi, int) or self.hooi < 0:
            raise ValueError(f"hooi={self.hooi!r}: expected a number of sweeps, 0 or more")

    def refusal(self, layer: Layer) -> str | None:
        if layer.is_conv and not layer.pointwise:
            return None
        return "tucker2 takes convolutions with a kernel above one pixel"

    def rank_axes(self, layer: Layer) -> tuple[base.RankAxis, ...]:
        inputs, outputs = layer.group_shape
        size = base.kernel_size(layer)
        return (
            base.RankAxis("input", min(inputs, outputs * size)),
            base.RankAxis("output", min(outputs, inputs * size)),
        )

    def params(self, layer: Layer, ranks: Sequence[Any]) -> Any:
        first, second = ranks
        inputs, outputs = layer.group_shape
        core = base.kernel_size(layer) * first * second
        return layer.groups * (inputs * first + core + second * outputs)

    def macs(self, layer: Layer, ranks: Sequence[Any]) -> Any:
        first, second = ranks
        entering, leaving = base.positions(layer)
        inputs, outputs = layer.group_shape
        core = base.kernel_size(layer) * first * second
        return layer.groups * (inputs * first * entering + (core + second * outputs) * leaving)

    def prepare(self, weight: Tensor, moments: None = None) -> base.Basis:
        return _Basis(weight, self.hooi)

    def build(self, layer: Layer, ranks: Sequence[int]) -> nn.Sequential:
        first, second = (layer.groups * rank for rank in ranks)
        groups = layer.groups
        return base.chain(
            first=base.conv(layer, layer.in_channels, first, groups=groups),
            core=base.conv(
                layer,
                first,
                second,
                kernel=layer.kernel,
                groups=groups,
                place=base.geometry(layer),
            ),
            last=base.conv(layer, second, layer.out_channels, groups=groups, bias=layer.bias),
        )

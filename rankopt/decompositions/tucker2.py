"""Tucker-2 of k×k convolutions: 1x1 C→r1, k×k r1→r2, 1x1 r2→S (arXiv 1511.06530)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
from torch import Tensor, nn

from rankopt.decompositions import base
from rankopt.layers import Layer

__all__ = ["Tucker2"]

# Modes of a canonical weight [groups, S, C, k], in the order of the ranks.
_MODES: Final = {"input": 2, "output": 1}


class _Basis(base.Basis):
    """HOSVD vectors of both channel modes; the core's energies give every error.

    Each part is computed when first asked for and shared by copies of the basis.
    """

    def __init__(self, weight: Tensor, hooi: int) -> None:
        self.weight: Tensor | None = weight
        self.hooi = hooi
        self._parts: dict[str, Any] = {}
        groups, outputs, inputs = weight.shape[:3]
        self._size = groups * (outputs**2 + inputs**2) + inputs * outputs

    @property
    def _tensor(self) -> Tensor:
        assert self.weight is not None
        return base.working_copy(self.weight.flatten(3))  # [groups, S, C, k]

    def _vectors(self, side: str) -> Tensor:
        """Orthonormal columns [groups, n, n] of the ``input`` or ``output`` mode."""
        if side not in self._parts:
            gram = _gram(self._tensor, _MODES[side])
            self._parts[side] = base.principal_vectors(gram)
        found: Tensor = self._parts[side]
        return found

    @property
    def spectra(self) -> tuple[base.FloatArray, ...]:
        tensor = self._tensor
        return tuple(
            base.energy(_project(tensor, self._vectors(side), mode), (3 - mode, 3))
            for side, mode in _MODES.items()
        )

    @property
    def _errors(self) -> base.FloatArray:
        """Error of every (input, output) rank pair, indexed from rank 1."""
        if "errors" not in self._parts:
            core = _project(_project(self._tensor, self._vectors("output"), 1),
                            self._vectors("input"), 2)  # fmt: skip
            energy = base.energy(core, (0, 3)).T  # [C, S]
            # What lies outside the kept block, as sums of positive terms only.
            below = base.tails(energy.sum(axis=1))[:, None]
            beside = np.cumsum(base.tails(energy.T).T, axis=0)
            total = energy.sum()
            self._parts["errors"] = np.sqrt((below + beside) / (total or 1.0))
        found: base.FloatArray = self._parts["errors"]
        return found

    def error(self, ranks: Sequence[Any]) -> Any:
        first, second = ranks
        return self._errors[np.asarray(first) - 1, np.asarray(second) - 1]

    def factors(self, ranks: Sequence[int]) -> dict[str, Tensor]:
        first, second = ranks
        tensor = self._tensor
        inputs = self._vectors("input")[..., :first]
        # Sequential truncation: the best output vectors once the input is truncated.
        reduced = _project(tensor, inputs, 2)
        outputs = base.principal_vectors(_gram(reduced, 1))[..., :second]
        for _ in range(self.hooi):
            inputs = base.principal_vectors(_gram(_project(tensor, outputs, 1), 2))[..., :first]
            reduced = _project(tensor, inputs, 2)
            outputs = base.principal_vectors(_gram(reduced, 1))[..., :second]
        core = _project(reduced, outputs, 1)
        assert self.weight is not None
        kernel = self.weight.shape[3:]
        ones = (...,) + (None,) * len(kernel)
        return {
            "first.weight": inputs.mT.flatten(0, 1)[ones],
            "core.weight": core.flatten(0, 1).unflatten(-1, kernel),
            "last.weight": outputs.flatten(0, 1)[ones],
        }

    @property
    def nbytes(self) -> int:
        return 8 * self._size


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
        hooi: Sweeps of higher-order orthogonal iteration after the sequentially
            truncated HOSVD that factors are made by. They cost a factorisation
            each and lower the error by well under 1%. `Basis.error` is that of the
            nested truncation, so an upper bound for any number of sweeps.
    """

    name: ClassVar[str] = "tucker2"
    roles: ClassVar[Mapping[str, str]] = {"first": "first", "core": "core", "last": "last"}
    soft: ClassVar[bool] = True
    hooi: int = 0

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

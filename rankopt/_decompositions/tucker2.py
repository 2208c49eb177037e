"""Tucker-2 of k×k convolutions: 1x1 C→r1, k×k r1→r2, 1x1 r2→S (arXiv 1511.06530)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import torch
from torch import Tensor, nn

from rankopt._calibration.moments import Moments
from rankopt._decompositions import base
from rankopt._decompositions.projection import Projection
from rankopt._decompositions.refining import follows, last_factor, refined_groups
from rankopt._model.layers import Layer

__all__ = ["Tucker2"]

# Modes of a canonical weight [groups, S, C, k], in the order of the ranks.
_MODES: Final = {"input": 2, "output": 1}

# Inputs [groups, r1, C], core [groups, r2, r1, k], outputs [groups, S, r2].
_Factors = tuple[Tensor, Tensor, Tensor]


class _Basis(base.Basis):
    """HOSVD vectors of both channel modes, whose core's energies bound every error.

    Truncating that core loses what its energies say; the factors, whose second mode
    is fitted to the truncated first, lose no more. Each part is computed when first
    asked for and shared by copies of the basis. With moments of the channels the tensor
    is whitened along its input mode.
    """

    def __init__(self, weight: Tensor, hooi: int, moments: Moments | None = None) -> None:
        self.weight: Tensor | None = weight
        self.hooi = hooi
        self._moments = moments
        self._parts: dict[str, Any] = {}
        groups, outputs, inputs = weight.shape[:3]
        self._size = groups * (outputs**2 + inputs**2) + inputs * outputs

    @property
    def _dense(self) -> Tensor:
        assert self.weight is not None
        return base.working_copy(self.weight.flatten(3))  # [groups, S, C, k]

    @property
    def _tensor(self) -> Tensor:
        dense = self._dense
        if self._moments is None:
            return dense
        return _project(dense, self._moments.channel_root.to(dense.dtype), 2)

    def _vectors(self, side: str) -> Tensor:
        """Orthonormal columns [groups, n, n] of the ``input`` or ``output`` mode."""
        found: Tensor | None = self._parts.get(side)
        if found is None:
            gram = _gram(self._tensor, _MODES[side])
            found = self._parts[side] = base.principal_vectors(gram)
        return found

    def release(self) -> None:
        for name in (*_MODES, "regression"):
            self._parts.pop(name, None)

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
            self._parts["errors"] = self._error_table()
        found: base.FloatArray = self._parts["errors"]
        return found

    def _error_table(self) -> base.FloatArray:
        core = _project(self._tensor, self._vectors("output"), 1)
        energy = base.energy(_project(core, self._vectors("input"), 2), (0, 3)).T  # [C, S]
        # What lies outside the kept block, as sums of positive terms only.
        below = base.tails(energy.sum(axis=1))[:, None]
        beside = np.cumsum(base.tails(energy.T).T, axis=0)
        table: base.FloatArray = np.sqrt((below + beside) / (energy.sum() or 1.0))
        return table

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
        leading = self._unwhitened(inputs)
        return self._named(ranks, leading, _project(reduced, outputs, 1), outputs)

    def _unwhitened(self, vectors: Tensor) -> Tensor:
        """Rows [groups, r, C] that take raw inputs to the truncated whitened ones."""
        if self._moments is None:
            return vectors.mT
        root = self._moments.channel_root.to(vectors.dtype)
        rows: Tensor = torch.linalg.solve_triangular(root, vectors.mT, upper=False, left=False)
        return rows

    def _named(
        self, ranks: Sequence[int], inputs: Tensor, core: Tensor, outputs: Tensor
    ) -> dict[str, Tensor]:
        """Factors by name; a mode at full rank needs no factor and joins the core.

        Args:
            ranks: Input and output rank.
            inputs: [groups, r1, C].
            core: [groups, r2, r1, k].
            outputs: [groups, S, r2].
        """
        assert self.weight is not None
        kernel = self.weight.shape[3:]
        first, second = ranks
        named = {}
        ones = (...,) + (None,) * len(kernel)
        if first < self.weight.shape[2]:
            named["first.weight"] = inputs.flatten(0, 1)[ones]
        else:
            core = _project(core, inputs, 2)
        if second == self.weight.shape[1]:
            core = _project(core, outputs.mT, 1)
        named["core.weight"] = core.flatten(0, 1).unflatten(-1, kernel)
        if second < self.weight.shape[1]:
            named["last.weight"] = outputs.flatten(0, 1)[ones]
        return named

    def projection(self) -> Projection:
        """Truncations of the HOSVD's core: those whose error `error` states."""
        assert self.weight is not None
        kernel = self.weight.shape[3:]
        outputs, inputs = self._leading("output"), self._leading("input")
        raw = inputs
        if self._moments is not None:
            raw = self._moments.channel_root.to(inputs.dtype) @ inputs
        return Projection(
            lambda weight: weight.flatten(3),
            lambda x: x.unflatten(-1, kernel),
            (outputs.mT, outputs),
            (raw, self._unwhitened(inputs)),
            dtype=self.weight.dtype,
        )

    def _leading(self, side: str) -> Tensor:
        """The vectors of a mode that a rank can reach: [groups, n, largest useful rank]."""
        assert self.weight is not None
        outputs, inputs = self.weight.shape[1:3]
        pixels = math.prod(self.weight.shape[3:])
        reach = inputs * pixels if side == "output" else outputs * pixels
        return self._vectors(side)[..., :reach]

    @property
    def nbytes(self) -> int:
        if self._moments is None:
            return 8 * self._size
        # With moments of patches the regression holds two more matrices of their size.
        return 8 * self._size + 2 * self._moments.nbytes


class _PatchBasis(_Basis):
    """With moments of whole patches, core and output mode by reduced-rank regression.

    The input vectors are those of the channel-whitened tensor. Given the first
    r1 of them, the best map from the reduced patches to the output is a least
    squares problem, and its best rank-r2 version follows from the covariance of
    its predictions. In the Cholesky basis of the reduced patches' moments both
    are nested in r1, so the error of every rank pair is exact. Where there are enough
    patches the input vectors of `factors` then follow them too, and these lose no more.
    """

    def _regression(self) -> tuple[Tensor, Tensor, Tensor]:
        """(rows A [g, C, C], lower root R of their moments, predictions Y [g, S, C·k])."""
        found: tuple[Tensor, Tensor, Tensor] | None = self._parts.get("regression")
        if found is None:
            assert self._moments is not None
            rows = self._unwhitened(self._vectors("input")).double()
            pixels = self._moments.pixels
            second = self._moments.damped.double()
            # (A ⊗ I) P (A ⊗ I)ᵀ and W P (A ⊗ I)ᵀ, channel-major.
            half = _apply_channels(rows, second, pixels)
            reduced = _apply_channels(rows, half.mT, pixels)
            root = torch.linalg.cholesky(0.5 * (reduced + reduced.mT))
            cross = self._dense.double().flatten(2) @ half.mT
            predictions = torch.linalg.solve_triangular(root.mT, cross, upper=True, left=False)
            found = self._parts["regression"] = (rows, root, predictions)
        return found

    def _error_table(self) -> base.FloatArray:
        """Errors from the spectrum of the predictions' covariance, one input rank at a time."""
        _, _, predictions = self._regression()
        assert self._moments is not None
        outputs, pixels = predictions.shape[1], self._moments.pixels
        retained = []
        for width in range(pixels, predictions.shape[2] + 1, pixels):
            part = predictions[..., :width]
            # Both sides have the same energies, the shorter one soonest.
            covariance = part.mT @ part if width < outputs else part @ part.mT
            energies = torch.linalg.eigvalsh(covariance).flip(-1).clamp_min(0)
            sums = energies.cumsum(dim=-1).sum(dim=0).cpu().numpy()
            retained.append(np.pad(sums, (0, outputs - len(sums)), mode="edge"))
        kept = np.stack(retained)  # [C, S]
        lost = np.clip(kept[-1, -1] - kept, 0.0, None) / (kept[-1, -1] or 1.0)
        table: base.FloatArray = np.sqrt(lost)
        return table

    def projection(self) -> Projection:
        """Truncations along fixed output directions, those of the full input rank.

        `factors` turns them anew for every input rank, and so loses a little less.
        """
        assert self.weight is not None
        assert self._moments is not None
        rows, root, predictions = self._regression()
        pixels, shape = self._moments.pixels, self.weight.shape
        turned = base.principal_vectors(predictions @ predictions.mT)
        outputs = turned[..., : shape[2] * pixels]
        half = _apply_channels(rows, self._moments.damped.double(), pixels)
        reach = min(shape[2], shape[1] * pixels)
        width = reach * pixels
        raw = torch.linalg.solve_triangular(root.mT, half.mT, upper=True, left=False)
        eye = torch.eye(rows.shape[-1] * pixels, dtype=rows.dtype, device=rows.device)
        features = _apply_channels(rows, eye.expand(len(rows), -1, -1), pixels)
        back = torch.linalg.solve_triangular(root, features, upper=False)
        return Projection(
            lambda weight: weight.flatten(2)[..., None],
            lambda x: x[..., 0].unflatten(2, (shape[2], *shape[3:])),
            (outputs.mT, outputs),
            (raw[..., :width], back[:, :width]),
            repeat=pixels,
            dtype=self.weight.dtype,
        )

    def fitted_error(self, ranks: Sequence[int]) -> float:
        if self._refines(ranks):
            return self._refined(ranks)[1]
        return super().fitted_error(ranks)

    def factors(self, ranks: Sequence[int]) -> dict[str, Tensor]:
        found = self._refined(ranks)[0] if self._refines(ranks) else self._nested(ranks)
        return self._named(ranks, *found)

    def _nested(self, ranks: Sequence[int]) -> _Factors:
        """Factors whose error `error` states."""
        first, second = ranks
        rows, root, predictions = self._regression()
        assert self._moments is not None
        width = first * self._moments.pixels
        kept = predictions[..., :width]
        outputs = base.principal_vectors(kept @ kept.mT)[..., :second]
        lower = root[..., :width, :width]
        solved = torch.linalg.solve_triangular(lower, outputs.mT @ kept, upper=False, left=False)
        core = solved.unflatten(-1, (first, self._moments.pixels))
        return rows[..., :first, :], core, outputs

    def _refines(self, ranks: Sequence[int]) -> bool:
        """Whether factors follow the patches; at full input rank the regression is the best."""
        assert self.weight is not None
        return follows(self._moments) and ranks[0] < self.weight.shape[2]

    def _refined(self, ranks: Sequence[int]) -> tuple[_Factors, float]:
        """As `_nested`, with leading factors that follow the patches, and their error.

        At full output rank the core is the last factor.
        """
        assert self._moments is not None
        nested, stated = self._nested(ranks), float(self.error(ranks))
        inputs, core, outputs = nested
        dense, root = self._dense.double(), self._moments.channel_root.double()
        full = outputs.shape[-1] == outputs.shape[-2]
        start = [inputs @ root] if full else [inputs @ root, core]
        found = refined_groups(start, _project(dense, root, 2), self._moments, self._features)
        raw = [torch.linalg.solve_triangular(root, found[0], upper=False, left=False), *found[1:]]
        features = torch.stack([self._features(leading) for leading in zip(*raw, strict=True)])
        second = self._moments.damped.double()
        last, error = last_factor(features.flatten(2), dense.flatten(2), lambda x: x @ second)
        if error > stated:  # by rounding
            return nested, stated
        if full:
            eye = torch.eye(outputs.shape[-1], dtype=last.dtype, device=last.device)
            return (raw[0], last.unflatten(-1, core.shape[2:]), eye.expand_as(outputs)), error
        # Columns of length one, as nested outputs have.
        lengths = last.norm(dim=1)
        lengths = lengths.where(lengths > 0, 1.0)
        return (raw[0], raw[1] * lengths[..., None, None], last / lengths[:, None]), error

    def _features(self, leading: Sequence[Tensor]) -> Tensor:
        """What inputs [r1, C] and a core [r2, r1, k], if any, amount to: [r2 or r1·k, C, k]."""
        inputs, *core = leading
        if core:
            return torch.einsum("pc,qpk->qck", inputs, core[0])
        assert self._moments is not None
        place = torch.eye(self._moments.pixels, dtype=inputs.dtype, device=inputs.device)
        return torch.einsum("pc,jk->pjck", inputs, place).flatten(0, 1)


def _apply_channels(rows: Tensor, matrix: Tensor, pixels: int) -> Tensor:
    """(A ⊗ I_pixels) @ matrix for rows A [g, r, C] and matrix [g, C·pixels, m]."""
    blocks = matrix.unflatten(1, (-1, pixels)).flatten(2)
    applied: Tensor = (rows @ blocks).unflatten(2, (pixels, -1)).flatten(1, 2)
    return applied


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

    A mode at full rank needs no factor: the chain then has two layers, or at
    full rank in both modes one.

    `Basis.error`, and with it the error in a plan, is that of truncating the HOSVD:
    an upper bound of what the factors lose, a few percent above it. With moments of
    whole patches the error is that of nested factors, from which those of the chain start.

    Args:
        hooi: Sweeps of higher-order orthogonal iteration after the sequentially
            truncated HOSVD that factors are made by. They cost a factorisation
            each and lower the error by well under 1%. `Basis.error` leaves them out
            of account. With moments of whole patches there is nothing to sweep.
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
        return layer.groups * (
            inputs * first * (first < inputs) + core + second * outputs * (second < outputs)
        )

    def macs(self, layer: Layer, ranks: Sequence[Any]) -> Any:
        first, second = ranks
        entering, leaving = base.positions(layer)
        inputs, outputs = layer.group_shape
        core = base.kernel_size(layer) * first * second
        last = second * outputs * (second < outputs)
        return layer.groups * (
            inputs * first * (first < inputs) * entering + (core + last) * leaving
        )

    def prepare(self, weight: Tensor, moments: Moments | None = None) -> base.Basis:
        if moments is not None and moments.pixels > 1:
            return _PatchBasis(weight, self.hooi, moments)
        return _Basis(weight, self.hooi, moments)

    def factors_kind(self, moments: Moments) -> str:
        return "whitened+output" if moments.pixels > 1 else "whitened"

    def build(self, layer: Layer, ranks: Sequence[int]) -> nn.Sequential:
        first, second = (layer.groups * rank for rank in ranks)
        factors: dict[str, nn.Module] = {}
        if first < layer.in_channels:
            factors["first"] = base.conv(layer, layer.in_channels, first, groups=layer.groups)
        ends = second == layer.out_channels
        factors["core"] = base.conv(
            layer,
            first,
            second,
            kernel=layer.kernel,
            groups=layer.groups,
            bias=layer.bias and ends,
            place=base.geometry(layer),
        )
        if not ends:
            factors["last"] = base.conv(
                layer, second, layer.out_channels, groups=layer.groups, bias=layer.bias
            )
        return base.chain(**factors)

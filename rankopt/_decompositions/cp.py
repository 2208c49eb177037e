"""CP of k×k convolutions: 1x1 C→r, depthwise k×k, 1x1 r→S (arXiv 1412.6553, 2008.05441)."""

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
from rankopt._decompositions.fitted import FittedBasis, FittedDecomposition
from rankopt._decompositions.refining import Penalty
from rankopt._model.layers import Layer

__all__ = ["CP"]

# Sweeps of a fit that only tells the error.
QUICK_SWEEPS: Final = 10
# Squared relative error below which a start is as good as exact.
EXACT: Final = 1e-14
# Share of ‖T‖² below which what one more sweep gains does not pay.
NEGLIGIBLE_GAIN: Final = 1e-4
MAX_DAMPINGS: Final = 12
# Relative ridge that keeps plain least squares solvable.
_JITTER: Final = {torch.float64: 1e-12, torch.float32: 1e-6}


class _Basis(FittedBasis):
    """Starts from an orthogonal decomposition in closed form, then alternates.

    Args:
        stability: Weight of the sensitivity, see `CP`.
        sweeps: Sweeps of a thorough fit.
    """

    def __init__(
        self, weight: Tensor, moments: Moments | None, stability: float, sweeps: int
    ) -> None:
        super().__init__(weight, moments)
        self.stability, self.sweeps = stability, sweeps

    @property
    def _shape(self) -> tuple[int, int, int]:
        assert self.weight is not None
        return self.weight.shape[1], self.weight.shape[2], self._pixels

    def _estimate(self, ranks: Sequence[Any]) -> Any:
        """What the better of the two orthogonal starts loses."""
        if "estimate" not in self._parts:
            modes = []
            for mode in (1, 0):
                found = [_orthogonal(tensor.flatten(2), mode)[0] for tensor in self._tensor]
                energies = torch.stack(found).sum(dim=0, dtype=torch.float64).cpu().numpy()
                lost = np.append(energies.sum(), base.tails(energies))
                modes.append(np.clip(lost / (energies.sum() or 1.0), 0.0, None))
            both = min(map(len, modes))
            self._parts["estimate"] = np.minimum(modes[0][:both], modes[1][:both])
        table = self._parts["estimate"]
        return table[np.minimum(np.asarray(ranks[0]), len(table) - 1)]

    def _size(self, ranks: Sequence[Any]) -> Any:
        return ranks[0] * sum(self._shape)

    def _anchor(self, elements: float) -> tuple[int, ...]:
        return (min(max(1, round(elements / sum(self._shape))), _maximum(*self._shape)),)

    def _fit(self, tensor: Tensor, ranks: Sequence[int], *, thorough: bool) -> list[Tensor]:
        sweeps = self.sweeps if thorough else min(self.sweeps, QUICK_SWEEPS)
        _, inputs, kernel = fit(tensor.flatten(2), ranks[0], self.stability, sweeps)
        return [inputs.mT, kernel.mT]

    def _penalty(self, tensor: Tensor, ranks: Sequence[int]) -> Penalty:
        outputs, inputs, pixels = tensor.flatten(2).shape
        total = tensor.square().sum()
        weight = float(_weight(total, ranks[0], (outputs, inputs, pixels), self.stability) / total)

        def penalty(leading: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
            rows, kernels = (factor.square().sum(dim=1) for factor in leading)
            ridge = weight * (pixels * rows + inputs * kernels)
            return ridge, weight * outputs * (rows * kernels).sum()

        return penalty

    def _features(self, leading: Sequence[Tensor]) -> Tensor:
        inputs, kernel = leading
        return inputs[:, :, None] * kernel[:, None, :]

    def _name(self, leading: Sequence[Tensor], last: Tensor) -> dict[str, Tensor]:
        assert self.weight is not None
        inputs, kernel = (factor.flatten(0, 1) for factor in leading)
        size = self.weight.shape[3:]
        ones = (...,) + (None,) * len(size)
        return {
            "first.weight": inputs[ones],
            "core.weight": kernel[:, None].unflatten(-1, size),
            "last.weight": last.flatten(0, 1)[ones],
        }


def fit(tensor: Tensor, rank: int, stability: float, sweeps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Alternating least squares with a penalty on the sensitivity, accelerated.

    Minimises ‖T − Σ a_r∘b_r∘c_r‖² + μ·Σ_r (K‖a_r‖²‖b_r‖² + S‖b_r‖²‖c_r‖² + C‖a_r‖²‖c_r‖²),
    the Lagrangian of the error-preserving correction of arXiv 2008.05441: without
    the second term components grow without bound and cancel each other. Each
    update is a ridge regression; sweeps start from extrapolated factors as long
    as that lowers the objective, which therefore never grows.

    Args:
        tensor: [S, C, K].
        rank: Components.
        stability: μ in units that make it independent of scale and shape.
        sweeps: Passes over the three factors.

    Returns:
        Factors [S, r], [C, r], [K, r].
    """
    starts = [_orthogonal(tensor, mode) for mode in (1, 0)]
    energies, full = max(starts, key=lambda start: float(start[0][:rank].sum()))
    factors = full[0][:, :rank], full[1][:, :rank], full[2][:, :rank]
    total = tensor.square().sum()
    if energies[rank:].sum() <= EXACT * total:
        return factors
    penalty = float(_weight(total, rank, tensor.shape, stability))
    previous, now, best = factors, factors, math.inf
    pull, ceiling = 0.5, 1.0
    for sweep in range(sweeps):
        moved, value = None, math.inf
        if sweep:
            ahead = [new + pull * (new - old) for new, old in zip(now, previous, strict=True)]
            moved, value = _sweep(tensor, ahead, penalty)
        if moved is not None and value <= best:
            pull, ceiling = min(ceiling, pull * 1.05), min(1.0, ceiling * 1.01)
        else:
            ceiling, pull = pull, pull / 1.5
            moved, value = _sweep(tensor, now, penalty)
        if not math.isfinite(value):
            break
        gained = best - value
        previous, now, best = now, moved, value
        if gained < NEGLIGIBLE_GAIN * float(total):
            break
    return now


def _weight(total: Tensor, rank: int, shape: Sequence[int], stability: float) -> Tensor:
    """μ for a tensor of this shape with ‖T‖² = `total`."""
    found: Tensor = stability * (total / rank) ** (1 / 3) / sum(shape)
    return found


def _sweep(
    tensor: Tensor, factors: Sequence[Tensor], penalty: float
) -> tuple[tuple[Tensor, Tensor, Tensor], float]:
    """One update of each factor and the objective after it, up to a constant."""
    outputs, inputs, pixels = tensor.shape
    _, right, kernel = factors
    half = torch.tensordot(tensor, right, dims=([1], [0]))  # [S, K, r]
    left = _ridge((half * kernel).sum(dim=1), right, kernel, (inputs, pixels), penalty)
    half = torch.tensordot(tensor, left, dims=([0], [0]))  # [C, K, r]
    right = _ridge((half * kernel).sum(dim=1), left, kernel, (outputs, pixels), penalty)
    target = (half * right[:, None]).sum(dim=0)
    kernel = _ridge(target, left, right, (outputs, inputs), penalty)
    # At the minimum of a ridge regression the terms with its solution amount to this;
    # the penalty's third term does not involve the kernel's factor.
    rest = penalty * pixels * (left.square().sum(dim=0) * right.square().sum(dim=0)).sum()
    return (left, right, kernel), float(rest - (kernel * target).sum())


def _ridge(
    target: Tensor, one: Tensor, other: Tensor, sides: tuple[int, int], penalty: float
) -> Tensor:
    """Best factor [n, r] given the two others.

    Args:
        target: The tensor contracted with both others, [n, r].
        one: [n1, r].
        other: [n2, r].
        sides: n1 and n2: the sensitivity weighs each pair by the third's side.
        penalty: μ.
    """
    gram = (one.mT @ one) * (other.mT @ other)
    weights = sides[1] * one.square().sum(dim=0) + sides[0] * other.square().sum(dim=0)
    jitter = (_JITTER[gram.dtype] * gram.diagonal().mean()).clamp_min(1e-30)
    for _ in range(MAX_DAMPINGS):
        ridge = torch.diag(penalty * weights + jitter)
        root, failed = torch.linalg.cholesky_ex(gram + ridge)
        if not failed:
            return torch.cholesky_solve(target.mT, root).mT
        jitter = jitter * 10
    return torch.full_like(target, math.nan)  # which `fit` takes as its cue to stop


def _orthogonal(tensor: Tensor, mode: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Components in closed form, mutually orthogonal, strongest first.

    One channel mode is rotated to its principal vectors and every slice along it
    is written by its SVD.

    Args:
        tensor: [S, C, K].
        mode: The mode to rotate: 0 for outputs, 1 for inputs.

    Returns:
        Energies of the components and their factors, norms balanced.
    """
    rows = tensor.movedim(mode, 0)
    vectors = base.principal_vectors((rows.flatten(1) @ rows.flatten(1).mT)[None])[0]
    slices = torch.tensordot(vectors, rows, dims=([0], [0]))  # [n, other, K]
    left, values, right = torch.linalg.svd(slices, full_matrices=False)
    order = values.flatten().argsort(descending=True, stable=True)
    index, place = order // values.shape[1], order % values.shape[1]
    strength = values.flatten()[order]
    scale = strength.clamp_min(1e-30) ** (1 / 3)
    own, other = vectors[:, index] * scale, left[index, :, place].mT * scale
    kernel = right[index, place].mT * scale
    return strength.square(), (other, own, kernel) if mode == 1 else (own, other, kernel)


def _maximum(outputs: int, inputs: int, pixels: int) -> int:
    """A rank that is enough for any kernel of this shape."""
    return min(inputs * min(outputs, pixels), outputs * min(inputs, pixels))


@dataclass(frozen=True)
class CP(FittedDecomposition):
    """A sum of r separable components: mix channels, filter each one, mix again.

    Ranks may exceed the channels. Factors are fitted, so errors before a choice
    are estimates, corrected by fits at a few ranks (up to eight, `MOST_ANCHORS`).

    Args:
        stability: Weight of the components' sensitivity against the error. At 0
            this is plain alternating least squares, whose components cancel each
            other and cannot be fine-tuned.
        sweeps: Sweeps of the fit that the factors come from; with moments of enough patches
            they are then refined.
    """

    name: ClassVar[str] = "cp"
    roles: ClassVar[Mapping[str, str]] = {"first": "first", "core": "core", "last": "last"}
    has_spectra: ClassVar[bool] = False
    stability: float = 0.02
    sweeps: int = 50

    def __post_init__(self) -> None:
        if not (isinstance(self.stability, (int, float)) and 0 <= self.stability < math.inf):
            raise ValueError(f"stability={self.stability!r}: expected a number, 0 or more")
        if isinstance(self.sweeps, bool) or not isinstance(self.sweeps, int) or self.sweeps < 1:
            raise ValueError(f"sweeps={self.sweeps!r}: expected a number of sweeps, 1 or more")

    def refusal(self, layer: Layer) -> str | None:
        if layer.is_conv and not layer.pointwise:
            return None
        return "cp takes convolutions with a kernel above one pixel"

    def rank_axes(self, layer: Layer) -> tuple[base.RankAxis, ...]:
        inputs, outputs = layer.group_shape
        return (base.RankAxis("cp", _maximum(outputs, inputs, base.kernel_size(layer))),)

    def params(self, layer: Layer, ranks: Sequence[Any]) -> Any:
        (rank,) = ranks
        inputs, outputs = layer.group_shape
        return layer.groups * rank * (inputs + outputs + base.kernel_size(layer))

    def macs(self, layer: Layer, ranks: Sequence[Any]) -> Any:
        (rank,) = ranks
        entering, leaving = base.positions(layer)
        inputs, outputs = layer.group_shape
        size = base.kernel_size(layer)
        return layer.groups * rank * (inputs * entering + (size + outputs) * leaving)

    def prepare(self, weight: Tensor, moments: Moments | None = None) -> base.Basis:
        return _Basis(weight, moments, self.stability, self.sweeps)

    def build(self, layer: Layer, ranks: Sequence[int]) -> nn.Sequential:
        hidden = layer.groups * ranks[0]
        return base.chain(
            first=base.conv(layer, layer.in_channels, hidden, groups=layer.groups),
            core=base.conv(
                layer,
                hidden,
                hidden,
                kernel=layer.kernel,
                groups=hidden,
                place=base.geometry(layer),
            ),
            last=base.conv(layer, hidden, layer.out_channels, groups=layer.groups, bias=layer.bias),
        )

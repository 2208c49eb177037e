"""Factors made better for whole patches of inputs, where their moments are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from rankopt._calibration.moments import Moments

__all__ = [
    "EVALUATIONS",
    "QUICK_EVALUATIONS",
    "Penalty",
    "follows",
    "last_factor",
    "least_squares",
    "refined",
    "refined_groups",
    "whitened_patches",
]

# Of leading factors: weights [r] of the last factor's squared columns, and a further term.
Penalty = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]

# With fewer positions for each feature of a patch, factors that follow the moments of patches
# do worse on other images.
POSITIONS_PER_FEATURE: Final = 3
# Of the objective: for fitted factors, for a glance at their error, and for factors that have
# a closed form to start from, where more than these would gain a few thousandths.
EVALUATIONS: Final = 100
QUICK_EVALUATIONS: Final = 10
FEW_EVALUATIONS: Final = 30
# Share of the energy below which what one more step gains does not pay.
NEGLIGIBLE_GAIN: Final = 1e-6
# Relative ridge that keeps the least squares problem solvable, raised as far as need be.
_JITTER: Final = {torch.float64: 1e-12, torch.float32: 1e-6}
_MOST_JITTER: Final = 1.0
# Relative ridge of the least squares problem for the last factor.
_RIDGE: Final = 1e-10


def follows(moments: Moments | None) -> bool:
    """Whether patches are known, and well enough that all factors may follow them."""
    if moments is None or moments.pixels == 1:
        return False
    return moments.count >= POSITIONS_PER_FEATURE * moments.shape[-1]


def whitened_patches(moments: Moments, like: Tensor) -> Tensor:
    """Moments [groups, C·pixels, C·pixels] of patches whose channels are whitened."""
    root = moments.channel_root.to(like)
    found = moments.damped.to(like)
    for _ in range(2):  # rows, then columns
        rows = found.unflatten(1, (root.shape[1], -1)).flatten(2)
        solved = torch.linalg.solve_triangular(root, rows, upper=False)
        found = solved.reshape(found.shape).mT
    return found


def refined_groups(
    leading: Sequence[Tensor],
    tensor: Tensor,
    moments: Moments,
    features: Callable[[Sequence[Tensor]], Tensor],
) -> list[Tensor]:
    """`refined`, from factors in closed form, for each group of a whitened weight.

    Args:
        leading: Factors that take whitened channels, [groups, ...].
        tensor: [groups, S, C, *kernel], whitened along C.
        moments: Of the layer's inputs, as they are.
        features: As in `refined`.
    """
    patches = whitened_patches(moments, tensor)
    groups = [
        refined(
            [factor[group] for factor in leading],
            part.flatten(1),
            patches[group],
            features,
            evaluations=FEW_EVALUATIONS,
        )
        for group, part in enumerate(tensor)
    ]
    return [torch.stack(factors) for factors in zip(*groups, strict=True)]


def last_factor(
    features: Tensor,
    weight: Tensor,
    metric: Callable[[Tensor], Tensor],
    given: Tensor | None = None,
) -> tuple[Tensor, float]:
    """(last factor [groups, S, r], relative error): the best fit unless one is given.

    Args:
        features: What the other factors amount to, [groups, r, n].
        weight: [groups, S, n].
        metric: Rows [groups, ..., n] times the second moments, in float64.
        given: [groups, S, r].
    """
    rows, dense = features.double(), weight.double()
    seen, target = metric(rows), metric(dense)
    gram, cross = seen @ rows.mT, dense @ seen.mT
    last = least_squares(gram, cross) if given is None else given.double()
    energy = (dense * target).sum()
    lost = energy - 2 * (last * cross).sum() + (last * (last @ gram)).sum()
    share = float((lost / energy).clamp_min(0)) if energy > 0 else 0.0
    return last, math.sqrt(share)


def least_squares(gram: Tensor, cross: Tensor) -> Tensor:
    """X [g, S, r] with X·gram = cross, for a positive semidefinite gram [g, r, r]."""
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1).clamp_min(1e-290)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    root = torch.linalg.cholesky(0.5 * (gram + gram.mT) + _RIDGE * scale[:, None, None] * eye)
    found: Tensor = torch.cholesky_solve(cross.mT, root).mT
    return found


def refined(
    leading: Sequence[Tensor],
    weight: Tensor,
    moments: Tensor,
    features: Callable[[Sequence[Tensor]], Tensor],
    penalty: Penalty | None = None,
    *,
    evaluations: int = EVALUATIONS,
) -> list[Tensor]:
    """Leading factors whose chain, with the best last factor, loses less of the output.

    Minimises over the leading factors, whose product is F, and for each of them exactly
    over the last factor B

        tr((W − BF)·M·(W − BF)ᵀ) / tr(WMWᵀ) + Σ_r p_r·‖b_r‖² + q

    by L-BFGS: variable projection, Golub and Pereyra, SIAM J. Numer. Anal. 10 (1973). The
    first term never ends above its value at the start.

    Args:
        leading: Where to start.
        weight: W [S, n], n = C·pixels.
        moments: M [n, n], positive definite.
        features: F [r, C, pixels] of leading factors, differentiable.
        penalty: p and q, differentiable; nothing if None.
        evaluations: Of the objective and its gradient, at most.

    Returns:
        The factors, shaped as `leading`.
    """
    problem = _Problem(leading, weight, moments, features, penalty)
    if problem.energy <= 0:
        return list(leading)
    options = {"maxfun": evaluations, "maxiter": evaluations, "ftol": NEGLIGIBLE_GAIN, "gtol": 0.0}
    with torch.inference_mode(False), torch.enable_grad():
        minimize(problem, problem.start, jac=True, method="L-BFGS-B", options=options)
    return problem.best()


class _Problem:
    """The objective and its gradient in one vector; remembers where it was lowest."""

    def __init__(
        self,
        leading: Sequence[Tensor],
        weight: Tensor,
        moments: Tensor,
        features: Callable[[Sequence[Tensor]], Tensor],
        penalty: Penalty | None,
    ) -> None:
        self._shapes = [factor.shape for factor in leading]
        self._moments, self._features, self._penalty = moments, features, penalty
        self._target = weight @ moments
        self.energy = float((self._target * weight).sum())
        # Steps are of coordinates of order one, whatever the scale of a factor.
        self._scales = [float(f.double().square().mean().sqrt()) or 1.0 for f in leading]
        self.start = self._joined(leading, [1 / scale for scale in self._scales])
        self._lowest, self._place = math.inf, self.start
        if self.energy > 0:
            self._first = self._fitted(features(leading).flatten(1), None)[1]

    def __call__(self, place: Any) -> tuple[float, Any]:
        leading = [factor.requires_grad_() for factor in self._factors(place)]
        rows = self._features(leading).flatten(1)  # [r, n]
        ridge, rest = self._penalty(leading) if self._penalty is not None else (None, None)
        with torch.no_grad():
            last, lost, slope = self._fitted(rows, ridge)
        outputs, slopes, value = [rows], [slope], lost
        if ridge is not None and rest is not None:
            term = (ridge * last.square().sum(dim=1)).sum() + rest
            value += float(term.detach())
            outputs.append(term)
            slopes.append(torch.ones_like(term))
        found = torch.autograd.grad(outputs, leading, slopes)
        if value < self._lowest and lost <= self._first:
            self._lowest, self._place = value, place.copy()
        return value, self._joined(found, self._scales)

    def best(self) -> list[Tensor]:
        return self._factors(self._place)

    def _fitted(self, rows: Tensor, ridge: Tensor | None) -> tuple[Tensor, float, Tensor]:
        """The last factor [r, S] that suits the rows best, what is lost, its slope in the rows.

        The last factor need not be differentiated: at its minimum the objective does not move
        with it.
        """
        seen = rows @ self._moments
        gram, cross = seen @ rows.mT, rows @ self._target.mT
        last = _solved(gram, cross, None if ridge is None else ridge * self.energy)
        kept = 2 * (last * cross).sum() - (last * (gram @ last)).sum()
        slope = 2 * (last @ (last.mT @ seen - self._target)) / self.energy
        return last, 1.0 - float(kept) / self.energy, slope

    def _factors(self, place: Any) -> list[Tensor]:
        parts = torch.from_numpy(place).to(self._moments).split([s.numel() for s in self._shapes])
        ways = zip(parts, self._scales, self._shapes, strict=True)
        return [(scale * part).reshape(shape) for part, scale, shape in ways]

    @staticmethod
    def _joined(parts: Sequence[Tensor], scales: Sequence[float]) -> Any:
        """Tensors, each times a number, as one vector."""
        pairs = zip(parts, scales, strict=True)
        return np.concatenate([(part.double() * by).cpu().numpy().ravel() for part, by in pairs])


def _solved(gram: Tensor, cross: Tensor, ridge: Tensor | None) -> Tensor:
    """X [r, S] with (gram + diag(ridge))·X = cross; NaN if that cannot be solved."""
    jitter, scale = _JITTER[gram.dtype], float(gram.diagonal().mean())
    whole = gram if ridge is None else gram + torch.diag(ridge)
    while jitter < _MOST_JITTER and math.isfinite(scale):
        diagonal = torch.full_like(gram[0], max(jitter * scale, 1e-30))
        root, failed = torch.linalg.cholesky_ex(whole + torch.diag(diagonal))
        if not failed:
            found: Tensor = torch.cholesky_solve(cross, root)
            return found
        jitter *= 10
    return torch.full_like(cross, math.nan)

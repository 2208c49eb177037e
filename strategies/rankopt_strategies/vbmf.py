"""`vbmf`: ranks from empirical variational Bayes matrix factorisation, weakened."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from torch import Tensor

from rankopt._decompositions.base import Decomposition, energy, working_copy
from rankopt._utils.arguments import check_choice, is_number
from rankopt.plan import RankPlan
from rankopt.strategy import Option, Problem, Site, Strategy, Tags

__all__ = ["VBMF", "evbmf_rank", "evbmf_rank_from_spectrum"]

Array = npt.NDArray[np.float64]
# Singular values below this share of the largest are numerical zeros of a Gram matrix.
NUMERICAL_ZERO = 1e-7
# Rows and columns whose norm is below this share of the average one are dead: they carry none
# of the noise, and so many small singular values would be taken for its floor.
DEAD: Final = 1e-2
GRID_POINTS = 200


def evbmf_rank(matrix: npt.ArrayLike) -> int:
    """Rank of the signal in a noisy matrix, by the global analytic EVBMF solution.

    Args:
        matrix: [L, M], any orientation, finite.

    Returns:
        The number of components above the noise, from 0 (pure noise) to
        min(L, M); for an exactly low-rank matrix its numerical rank. Rows and
        columns that are zero, or next to it, count for nothing.

    Raises:
        ValueError: Not a matrix, empty, or not finite.

    References:
        Nakajima et al., JMLR 14 (2013); NIPS 2012, theorem 2.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> signal = rng.normal(size=(60, 5)) @ rng.normal(size=(5, 90))
        >>> evbmf_rank(signal + 0.1 * rng.normal(size=(60, 90)))
        5
    """
    values = np.asarray(matrix, dtype=np.float64)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"evbmf_rank takes a non-empty matrix, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("evbmf_rank takes a finite matrix, got NaN or infinity")
    energies = np.square(values / (np.abs(values).max() or 1.0))
    values = values[_live(energies.sum(axis=1))][:, _live(energies.sum(axis=0))]
    if not values.size:
        return 0
    small, large = sorted(values.shape)
    gram = values @ values.T if values.shape[0] == small else values.T @ values
    return evbmf_rank_from_spectrum(np.linalg.eigvalsh(gram)[::-1], small, large)


def evbmf_rank_from_spectrum(energies: npt.ArrayLike, small: int, large: int) -> int:
    """`evbmf_rank` from squared singular values.

    Dead rows and columns cannot be told from a spectrum: `small` and `large` are
    best those of the matrix without them.

    Args:
        energies: Squared singular values, descending, [small].
        small: L, the shorter side.
        large: M, the longer side.
    """
    squared = np.clip(np.asarray(energies, dtype=np.float64), 0.0, None)
    total = squared.sum()
    if total == 0:
        return 0
    rank = int((squared > squared[0] * NUMERICAL_ZERO**2 * large).sum())
    if rank <= _first_noise(small, large):
        return rank  # so few singular values are no noise floor: exactly of low rank
    # What depends on other rows says nothing of the noise: without it the rank is full.
    small, squared = rank, squared[:rank]
    squared = squared * (small * large / squared.sum())  # RMS of the matrix is 1
    aspect = small / large
    tau_bar = 2.5129 * math.sqrt(aspect)
    x_bar = (1 + tau_bar) * (1 + aspect / tau_bar)
    upper = squared.sum() / (small * large)
    tail = squared[_first_noise(small, large) :]
    lower = max(tail[0] / (large * x_bar), tail.mean() / large)

    def objective(log_variance: float) -> float:
        return _free_energy(math.exp(log_variance), squared, large, aspect, x_bar)

    low, high = math.log(lower), math.log(max(upper, lower))
    grid = np.linspace(low, high, GRID_POINTS)
    best = int(np.argmin([objective(point) for point in grid]))
    bracket = (grid[max(best - 1, 0)], grid[min(best + 1, GRID_POINTS - 1)])
    log_variance = grid[best]
    if bracket[0] < bracket[1]:
        refined = minimize_scalar(objective, bounds=bracket, method="bounded")
        if refined.fun < objective(log_variance):
            log_variance = float(refined.x)
    return int((squared > large * math.exp(log_variance) * x_bar).sum())


def _free_energy(variance: float, squared: Array, large: int, aspect: float, x_bar: float) -> float:
    """The free energy of EVBMF as a function of the noise variance, up to a constant."""
    scaled = squared / (large * variance)
    noise, signal = scaled[scaled <= x_bar], scaled[scaled > x_bar]
    shifted = signal - (1 + aspect)
    tau = 0.5 * (shifted + np.sqrt(np.clip(shifted**2 - 4 * aspect, 0.0, None)))
    total = np.sum(noise - np.log(np.clip(noise, 1e-300, None)))
    total += np.sum(signal - tau + np.log((tau + 1) / signal) + aspect * np.log(tau / aspect + 1))
    return float(total)


def _first_noise(small: int, large: int) -> int:
    """Index of the first singular value that is noise whatever the matrix."""
    return math.ceil(small / (1 + small / large)) - 1


def _live(energies: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Which rows are not dead, by their squared norms."""
    squares = np.asarray(energies, dtype=np.float64)
    live: npt.NDArray[np.bool_] = (squares > 0) & (squares >= DEAD**2 * squares.mean())
    return live


@dataclass(frozen=True)
class VBMF(Strategy):
    """EVBMF ranks of the channel unfoldings, moved towards full rank by a weakening.

    r = max(⌊R − w(R − r_vbmf)⌋, 1) for full rank R: w = 1 is the VBMF rank, w = 0
    no compression. With a budget w is bisected, beyond 1 if need be.

    Args:
        weakening: w when there is no budget, in (0, 1].
        noise: What to do where EVBMF finds no component above the noise:
            ``keep`` the layer, or ``compress`` it from rank 1.

    References:
        arXiv 1903.09973 (weakened rank), 1511.06530 (VBMF on Tucker-2 unfoldings).
    """

    name: ClassVar[str] = "vbmf"
    tags: ClassVar[Tags] = Tags()
    weakening: float = 0.8
    noise: Literal["keep", "compress"] = "keep"

    def __post_init__(self) -> None:
        if not is_number(self.weakening) or not 0 < self.weakening <= 1:
            raise ValueError(f"weakening={self.weakening!r}: expected a number in (0, 1]")
        check_choice("noise", self.noise, ("keep", "compress"))

    def search(self, problem: Problem) -> RankPlan:
        """Bisect the weakening to the budget; see `Strategy.search`."""
        problem.prepare()
        found = [_ranked(problem, site) for site in problem.sites]

        def choose(weakening: float) -> list[Option]:
            return [
                self._option(problem, site, ranked, weakening)
                for site, ranked in zip(problem.sites, found, strict=True)
            ]

        if problem.budget is None:
            return problem.plan(self, choose(self.weakening))
        # The weakening at which every compressible rank has reached 1.
        spans = [
            (axis.maximum - 1) / (axis.maximum - rank)
            for site, ranked in zip(problem.sites, found, strict=True)
            if ranked is not None
            for axis, rank in zip(ranked[0].rank_axes(site.layer), ranked[1], strict=True)
            if rank < axis.maximum
        ]
        top = max(spans, default=1.0)
        _, options = problem.fit(lambda knob: choose(top * (1 - knob)))
        return problem.plan(self, options)

    def _option(
        self,
        problem: Problem,
        site: Site,
        ranked: tuple[Decomposition, Sequence[int]] | None,
        weakening: float,
    ) -> Option:
        if ranked is None:
            names = ", ".join(method.name for method in site.methods)
            return problem.keep(site, f"vbmf finds no ranks of {names}: allow svd or tucker2")
        method, found = ranked
        if min(found) == 0 and self.noise == "keep":
            return problem.keep(
                site, "EVBMF finds no component above the noise (noise='compress' overrides)"
            )
        full = [axis.maximum for axis in method.rank_axes(site.layer)]
        ranks = [
            max(1, math.floor(top - weakening * (top - rank) + 1e-9))
            for top, rank in zip(full, found, strict=True)
        ]
        named = " x ".join(map(str, found))
        return problem.option(site, method, ranks, f"VBMF rank {named}, weakening {weakening:.3g}")


def _ranked(problem: Problem, site: Site) -> tuple[Decomposition, list[int]] | None:
    """The first method whose ranks truncate unfoldings, and the ranks; None if there is none."""
    for method in site.methods:
        if method.has_spectra:
            return method, _vbmf_ranks(problem, site, method)
    return None


def _vbmf_ranks(problem: Problem, site: Site, method: Decomposition) -> list[int]:
    """EVBMF rank of each unfolding; the largest over the groups of a grouped layer."""
    # Noise is told from signal by the weight's own spectrum, whatever the inputs.
    weight = problem.weight(site.layer)
    groups = [_living(group) for group in weight.split(1)]
    if all(group.shape == weight[:1].shape for group in groups):
        spectra = problem.basis(site, method, data_aware=False).spectra
        split = [[rows[index] for rows in spectra] for index in range(len(groups))]
    else:
        problem.check_deadline()
        split = [
            [rows[0] for rows in method.prepare(group).spectra] if group.numel() else []
            for group in groups
        ]
    axes = method.rank_axes(site.layer)
    found = np.zeros((len(groups), len(axes)), dtype=int)
    for index, (group, spectra_of) in enumerate(zip(groups, split, strict=True)):
        for axis, energies in enumerate(spectra_of):
            small, large = sorted((len(energies), group.numel() // len(energies)))
            found[index, axis] = evbmf_rank_from_spectrum(energies[:small], small, large)
    return [
        min(axis.maximum, int(rank)) for axis, rank in zip(axes, found.max(axis=0), strict=True)
    ]


def _living(group: Tensor) -> Tensor:
    """The weight [1, out, in, *kernel] of a group without its dead channels."""
    squares = energy(working_copy(group)[..., None].flatten(3), (3,))[0]
    outputs, inputs = _live(squares.sum(axis=1)), _live(squares.sum(axis=0))
    if outputs.all() and inputs.all():
        return group
    return group[:, outputs.nonzero()[0]][:, :, inputs.nonzero()[0]]

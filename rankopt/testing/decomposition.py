"""The contract of a decomposition: costs, errors and exactness at full rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from rankopt._decompositions.base import Decomposition
from rankopt._decompositions.projection import survival
from rankopt._decompositions.rebuild import rebuild
from rankopt._model.layers import Layer, canonical_weight, find_layers
from rankopt.errors import RankoptError
from rankopt.testing.check import Check

__all__ = ["check_decomposition", "decomposition_checks", "dense_weight"]

# Rounding of Gram-based errors in float64: square roots of 1e-16 relative energies.
FLOAT64_ERROR: Final = 1e-6
# Errors found by subtracting energies, whose square is exact to rounding.
FITTED_ERROR: Final = 1e-5
# Truncations through projections in the weight's own precision, float32.
SOFT_ERROR: Final = 1e-5


def check_decomposition(decomposition: Decomposition, modules: Sequence[nn.Module]) -> None:
    """Run every check of the decomposition contract on each module.

    Args:
        decomposition: The method, with settings.
        modules: Layers it applies to.
    """
    for check in decomposition_checks(decomposition, modules):
        check()


def decomposition_checks(decomposition: Decomposition, modules: Sequence[nn.Module]) -> list[Check]:
    """The checks of a decomposition, one set per module."""
    made = []
    for index, module in enumerate(modules):
        suite = _DecompositionSuite(decomposition, module)
        made += [
            Check(f"{decomposition.name}[{index}]", check.__name__, check)
            for check in suite.checks()
        ]
    return made


class _DecompositionSuite:
    def __init__(self, decomposition: Decomposition, module: nn.Module) -> None:
        self.method = decomposition
        self.model = nn.Sequential(module)
        (self.layer,) = find_layers(self.model)
        self.weight = canonical_weight(module)

    def checks(self) -> Iterator[Callable[[], None]]:
        yield self.applies
        yield self.costs_are_those_of_the_chain
        yield self.infeasible_ranks_are_refused
        if self.method.exact_error:
            yield self.error_is_what_was_lost
            yield self.error_falls_with_rank
            yield self.full_rank_is_exact
        else:
            yield self.fitted_error_is_what_was_lost
            yield self.estimates_are_errors
        if self.method.has_spectra:
            yield self.spectra_are_energies
        if self.method.soft:
            yield self.mixes_ranks

    @property
    def full(self) -> list[int]:
        return [axis.maximum for axis in self.method.rank_axes(self.layer)]

    def applies(self) -> None:
        assert self.method.applies(self.layer), self.method.refusal(self.layer)

    def rank_choices(self) -> Iterator[tuple[int, ...]]:
        axes = self.method.rank_axes(self.layer)
        yield tuple(axis.step for axis in axes)
        yield tuple(max(1, axis.maximum // 2 // axis.step) * axis.step for axis in axes)
        yield tuple(self.full)

    def costs_are_those_of_the_chain(self) -> None:
        for ranks in self.rank_choices():
            built = self.method.build(self.layer, ranks)
            weights = sum(p.numel() for n, p in built.named_parameters() if n.endswith("weight"))
            assert self.method.params(self.layer, ranks) == weights, f"params at ranks {ranks}"
            shapes = {n: p.shape for n, p in built.named_parameters() if n.endswith("weight")}
            factors = self.method.prepare(self.weight).factors(ranks)
            found = {name: value.shape for name, value in factors.items()}
            assert found == shapes, f"factors at {ranks} have shapes {found}, modules {shapes}"
            assert list(found) == list(shapes), f"factors at {ranks} are not in order"
            assert set(dict(built.named_children())) <= set(self.method.roles), "roles"

    def infeasible_ranks_are_refused(self) -> None:
        for ranks in ([0] * len(self.full), [n + 1 for n in self.full], [1] * (len(self.full) + 1)):
            try:
                self.method.check_ranks(self.layer, ranks)
            except RankoptError:
                continue
            raise AssertionError(f"ranks {ranks} were accepted")

    def reconstruction(self, ranks: Sequence[int]) -> Tensor:
        """The dense weight the factors stand for, from impulses through the chain."""
        return dense_weight(self.method, self.layer, self.weight, ranks)

    def error_is_what_was_lost(self) -> None:
        basis = self.method.prepare(self.weight)
        exact = self.weight.to(torch.float64)
        for ranks in self.rank_choices():
            lost = (exact - self.reconstruction(ranks)).norm() / exact.norm()
            stated = float(basis.error(ranks))
            # Factors may be refined beyond the nested truncation the error is stated
            # for, never the other way; with a single rank both are the same.
            assert lost <= stated + FLOAT64_ERROR, f"ranks {ranks}: lost {lost}, stated {stated}"
            if len(ranks) == 1:
                assert lost >= stated - FLOAT64_ERROR, f"ranks {ranks}: stated {stated} > {lost}"

    def fitted_error_is_what_was_lost(self) -> None:
        basis = self.method.prepare(self.weight)
        exact = self.weight.to(torch.float64)
        for ranks in self.rank_choices():
            lost = float((exact - self.reconstruction(ranks)).norm() / exact.norm())
            stated = basis.fitted_error(ranks)
            assert abs(lost - stated) <= FITTED_ERROR, f"ranks {ranks}: lost {lost}, not {stated}"

    def estimates_are_errors(self) -> None:
        axes = self.method.rank_axes(self.layer)
        choices = [np.arange(axis.step, axis.maximum + 1, axis.step) for axis in axes]
        grids = np.meshgrid(*choices, indexing="ij")
        errors = np.asarray(self.method.prepare(self.weight).error(grids))
        assert errors.shape == grids[0].shape
        assert ((errors >= 0) & (errors <= 1)).all(), "relative errors lie in [0, 1]"

    def error_falls_with_rank(self) -> None:
        basis = self.method.prepare(self.weight)
        grids = np.meshgrid(*(np.arange(1, n + 1) for n in self.full), indexing="ij")
        errors = np.asarray(basis.error(grids))
        for axis in range(errors.ndim):
            assert (np.diff(errors, axis=axis) <= FLOAT64_ERROR).all(), f"axis {axis}"

    def spectra_are_energies(self) -> None:
        spectra = self.method.prepare(self.weight).spectra
        assert len(spectra) == len(self.full), "one spectrum per rank"
        energy = self.weight.to(torch.float64).square().flatten(1).sum(dim=1).numpy()
        for axis, found in enumerate(spectra):
            assert (np.diff(found) <= FLOAT64_ERROR * energy[:, None]).all(), f"axis {axis} rises"
            gap = np.abs(found.sum(axis=1) - energy)
            assert (gap <= FLOAT64_ERROR * energy).all(), f"axis {axis}: not the weight's energy"

    def mixes_ranks(self) -> None:
        basis, exact = self.method.prepare(self.weight), self.weight.to(torch.float64)
        project = basis.projection().double()
        for ranks in self.rank_choices():
            mass = torch.zeros(self.full, dtype=torch.float64)
            mass[tuple(rank - 1 for rank in ranks)] = 1.0
            soft = project(exact, survival(mass))
            error = float((exact - soft).norm() / exact.norm())
            stated = float(basis.error(ranks))
            assert abs(error - stated) <= SOFT_ERROR, f"{ranks}: {error}, stated {stated}"

    def full_rank_is_exact(self) -> None:
        exact = self.weight.to(torch.float64)
        error = (exact - self.reconstruction(self.full)).norm() / exact.norm()
        assert error <= FLOAT64_ERROR, f"relative error {error} at full rank"


def dense_weight(
    method: Decomposition, layer: Layer, weight: Tensor, ranks: Sequence[int]
) -> Tensor:
    """The canonical weight that a chain's factors multiply out to, in float64."""
    factors = method.prepare(weight).factors(ranks)
    return rebuild(method, layer, ranks, {name: f.double() for name, f in factors.items()})

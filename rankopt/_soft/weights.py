"""A layer's weight as a mixture of its options, differentiable in weight and probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rankopt._decompositions.base import Basis, Decomposition
from rankopt._decompositions.fitted import KEPT_FITS
from rankopt._decompositions.projection import Projection, survival
from rankopt._decompositions.rebuild import rebuild
from rankopt._model.layers import Layer, stored_weight
from rankopt.strategy.relaxation import Menu, Relaxation

__all__ = ["SoftSite", "named_parameters"]

T = TypeVar("T")

# Where among the options of a method, by cost, its factors are fitted beforehand.
ANCHORS: Final = (0.25, 0.75)
# Whole weights kept per method and site: that of the choice at hand, and of the one compared.
KEPT_WEIGHTS: Final = 2
# From this probability on, an option's own factors are worth making.
SURE: Final = 0.9


class SoftSite(nn.Module):
    """The options of one site as a function from probabilities to a weight.

    Args:
        model: Holds the layers.
        relaxation: Of all sites.
        menu: The options of this one.
        frozen: Whether weights never change: options that are nearly sure then have the
            factors a plan has, wherever no gradient is asked for.
    """

    mean: Tensor | None

    def __init__(
        self, model: nn.Module, relaxation: Relaxation, menu: Menu, *, frozen: bool
    ) -> None:
        super().__init__()
        self.layers = menu.site.layers
        known = relaxation.problem.known(menu.site)
        self.register_buffer("mean", None if known is None else known.mean, persistent=False)
        self.truncations = nn.ModuleList()
        problem = relaxation.problem
        for method in menu.site.methods:
            places = [i for i, found in enumerate(menu.methods) if found is method]
            if not places:
                continue
            basis = problem.basis(menu.site, method)
            ranks = np.array([menu.ranks[i] for i in places])
            if method.soft:
                maxima = [axis.maximum for axis in method.rank_axes(menu.site.layer)]
                own = _Own(method, menu.site.layer, basis) if frozen else None
                self.truncations.append(
                    _Truncations(basis.projection(), places, ranks, maxima, own)
                )
            else:
                weight = _canonical(
                    self.layers[0], _parameter(model, self.layers[0], "weight").detach()
                )
                fitted = _Fitted(method, menu.site.layer, basis, weight)
                self.truncations.append(_Interpolations(fitted, places, ranks))
        self.dense = menu.methods.index(None) if None in menu.methods else None

    def factors(
        self, model: nn.Module, method: Decomposition, ranks: Sequence[int]
    ) -> dict[str, Tensor] | None:
        """Factors of the weight as trained; None where any of its truncation will do."""
        for truncation in self.truncations:
            if isinstance(truncation, _Interpolations) and truncation.fitted.method == method:
                weight = _canonical(self.layers[0], _parameter(model, self.layers[0], "weight"))
                return truncation.fitted.factors(weight, ranks)
        return None

    def forward(self, model: nn.Module, probabilities: Tensor) -> dict[str, Tensor]:
        """Weights, and the biases that follow from them, by parameter name in the model."""
        dense = _canonical(self.layers[0], _parameter(model, self.layers[0], "weight"))
        mixed = torch.zeros_like(dense)
        if self.dense is not None:
            mixed = probabilities[self.dense].to(dense.dtype) * dense
        for truncation in self.truncations:
            mixed = mixed + truncation(dense, probabilities)
        return named_parameters(model, self.layers, dense, mixed, self.mean)


def named_parameters(
    model: nn.Module, layers: Sequence[Layer], dense: Tensor, weight: Tensor, mean: Tensor | None
) -> dict[str, Tensor]:
    """Values by parameter name with which a site's layers compute with another weight.

    Args:
        model: Holds the layers.
        layers: Of the site.
        dense: Their own canonical weight, [groups, out, in, *kernel].
        weight: The other.
        mean: Of their inputs, [groups, in·pixels], if biases make up for what becomes of it.
    """
    stored = stored_weight(layers[0], weight)
    named = {f"{layer.name}.weight".removeprefix("."): stored for layer in layers}
    if mean is not None:
        mean = mean.to(torch.promote_types(dense.dtype, torch.float32))
        lost = ((dense - weight).flatten(2).to(mean) @ mean[..., None]).flatten()
        for layer in layers:
            bias = _parameter(model, layer, "bias")
            named[f"{layer.name}.bias".removeprefix(".")] = bias + lost.to(bias)
    return named


class _Shared:
    """Made of what never trains: copies of a soft model need none of their own."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


@dataclass(frozen=True)
class _Own(_Shared):
    """The weights that a plan's factors of one method amount to."""

    method: Decomposition
    layer: Layer
    basis: Basis
    held: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def weight(self, ranks: Sequence[int]) -> Tensor:
        """[groups, out, in, *kernel]."""
        return _kept(self.held, ranks, self._rebuilt, KEPT_WEIGHTS)

    def _rebuilt(self, ranks: tuple[int, ...]) -> Tensor:
        return rebuild(self.method, self.layer, ranks, self.basis.factors(ranks))


class _Truncations(nn.Module):
    """Some options of a site that truncate one basis."""

    places: Tensor
    cells: Tensor

    def __init__(
        self,
        projection: Projection,
        places: list[int],
        ranks: npt.NDArray[np.int64],
        maxima: list[int],
        own: _Own | None,
    ) -> None:
        super().__init__()
        self.projection, self.own, self.ranks = projection, own, ranks
        # No option has a rank beyond these, so nothing beyond is ever open.
        self.maxima = tuple(maxima)
        flat = np.ravel_multi_index(tuple((ranks - 1).T), self.maxima)
        device = next(projection.buffers()).device
        self.register_buffer("places", torch.tensor(places).to(device), persistent=False)
        self.register_buffer("cells", torch.from_numpy(flat).to(device), persistent=False)

    def forward(self, weight: Tensor, probabilities: Tensor) -> Tensor:
        mine = probabilities[self.places]
        sure = None if self.own is None else _sure(mine)
        owned = torch.zeros_like(weight)
        if sure is not None:
            assert self.own is not None
            owned = mine[sure].to(weight) * self.own.weight(self.ranks[sure]).to(weight)
            mine = mine.clone()
            mine[sure] = 0.0
            if not mine.any():
                return owned
        mass = probabilities.new_zeros(math.prod(self.maxima)).index_add(0, self.cells, mine)
        soft: Tensor = self.projection(weight, survival(mass.reshape(self.maxima)))
        return owned + soft


@dataclass(frozen=True)
class _Fitted(_Shared):
    """Fits of one method to a canonical weight, which may train.

    Where the method `refits`, a weight W is seen as W·G·F: F is what the factors but the
    last amount to, as fitted to the weight at the beginning, and W·G the last factor that
    suits W best. Elsewhere W is seen less what the fit left out at the beginning.
    """

    method: Decomposition
    layer: Layer
    basis: Basis
    weight: Tensor
    held: dict[tuple[int, ...], tuple[Tensor, ...]] = field(default_factory=dict)

    def seen(self, ranks: Sequence[int]) -> tuple[Tensor, ...]:
        """What `residual` takes: (G [groups, C·pixels, r], F [groups, r, C·pixels]), or W − Ŵ."""
        return _kept(self.held, ranks, self._seen, KEPT_FITS)

    def _seen(self, ranks: tuple[int, ...]) -> tuple[Tensor, ...]:
        factors = self.basis.factors(ranks)
        if not self.method.refits:
            near = rebuild(self.method, self.layer, ranks, factors)
            return (self.weight - near.to(self.weight),)
        last = next(reversed(factors))
        width = factors[last].shape[1]
        eye = torch.eye(width).repeat(self.layer.groups, 1).to(factors[last])
        eye = eye.reshape(-1, width, *factors[last].shape[2:])
        narrow = replace(self.layer, out_channels=width * self.layer.groups)
        features = rebuild(self.method, narrow, ranks, {**factors, last: eye})
        solver = self.basis.fitting(features)
        return solver.to(self.weight), features.flatten(2).to(self.weight)

    @staticmethod
    def residual(weight: Tensor, seen: Sequence[Tensor]) -> Tensor:
        """What a fit leaves out of a weight, W − Ŵ, [groups, out, in, *kernel]."""
        if len(seen) == 1:
            return seen[0]
        solver, features = seen
        return weight - (weight.flatten(2) @ solver @ features).reshape(weight.shape)

    def factors(self, weight: Tensor, ranks: Sequence[int]) -> dict[str, Tensor] | None:
        """Factors of a weight as `residual` sees it; None for methods that do not refit."""
        if not self.method.refits:
            return None
        found = dict(self.basis.factors(ranks))
        solver, _ = self.seen(ranks)
        last = next(reversed(found))
        found[last] = (
            (weight.flatten(2) @ solver.to(weight)).flatten(0, 1).reshape(found[last].shape)
        )
        return found

    def interpolated(self, ranks: npt.NDArray[np.int64]) -> tuple[list[tuple[Tensor, ...]], Tensor]:
        """Fits at a few ranks and the shares [options, anchors] that options have of them.

        Anchors are two of the options; what they leave out is interpolated over the logarithm
        of the chain's size and scaled to each option's own error.

        Args:
            ranks: Of the options, [options, axes], by ascending cost.
        """
        places = sorted({round(share * (len(ranks) - 1)) for share in ANCHORS})
        anchors = [tuple(map(int, ranks[place])) for place in places]
        columns = tuple(ranks.T)
        counts: npt.NDArray[np.int64] = self.method.params(self.layer, columns)
        sizes = np.log(counts.astype(float))
        order = np.argsort(sizes[places])
        hats = np.stack(
            [np.interp(sizes, sizes[places][order], row[order]) for row in np.eye(len(places))], 1
        )
        lost = np.array([max(self.basis.fitted_error(anchor), 1e-12) for anchor in anchors])
        shares = np.asarray(self.basis.error(columns))[:, None] * hats / lost
        fits = [self.seen(anchor) for anchor in anchors]
        residuals = torch.stack([self.residual(self.weight, fit) for fit in fits])
        # They are not parallel: their mean is shorter than the mean of their lengths.
        flat = residuals.flatten(1).double()
        gram = (flat @ flat.mT).cpu().numpy()
        lengths = np.sqrt(np.einsum("oa,ab,ob->o", shares, gram, shares))
        shares *= (shares @ np.sqrt(gram.diagonal()) / np.maximum(lengths, 1e-30))[:, None]
        return fits, torch.from_numpy(shares).to(residuals)


class _Interpolations(nn.Module):
    """Some options of a site whose factors are fitted anew for every rank.

    Mixed, they are interpolated between a few fits. An option that is nearly sure has the
    factors of its own fit, so that the loss tends to that of the plan.
    """

    places: Tensor
    shares: Tensor

    def __init__(self, fitted: _Fitted, places: list[int], ranks: npt.NDArray[np.int64]) -> None:
        super().__init__()
        self.fitted, self.ranks = fitted, ranks
        fits, shares = fitted.interpolated(ranks)
        held = {"shares": shares, "places": torch.tensor(places)}
        self._names = []
        for index, fit in enumerate(fits):
            named = {f"fit{index}_{part}": value for part, value in enumerate(fit)}
            self._names.append(tuple(named))
            held |= named
        for name, value in held.items():
            self.register_buffer(name, value.to(shares.device), persistent=False)

    def forward(self, weight: Tensor, probabilities: Tensor) -> Tensor:
        mine = probabilities[self.places].to(weight)
        mixed = mine.sum() * weight
        sure = _sure(mine)
        if sure is not None:
            fit = tuple(part.to(weight) for part in self.fitted.seen(self.ranks[sure]))
            mixed = mixed - mine[sure] * self.fitted.residual(weight, fit)
            mine = mine.clone()
            mine[sure] = 0.0
        for share, names in zip(mine @ self.shares, self._names, strict=True):
            fit = tuple(getattr(self, name) for name in names)
            mixed = mixed - share * self.fitted.residual(weight, fit)
        return mixed


def _kept(
    held: dict[tuple[int, ...], T],
    ranks: Sequence[int],
    make: Callable[[tuple[int, ...]], T],
    most: int,
) -> T:
    """What was made for some ranks, the latest `most` of it kept."""
    key = tuple(map(int, ranks))
    found = held.pop(key) if key in held else make(key)
    held[key] = found  # the latest last
    if len(held) > most:
        del held[next(iter(held))]
    return found


def _sure(probabilities: Tensor) -> int | None:
    """The option that is nearly sure; None where there is none or a gradient is wanted."""
    if probabilities.requires_grad or not len(probabilities):
        return None
    most, index = probabilities.max(dim=0)
    return int(index) if float(most) >= SURE else None


def _parameter(model: nn.Module, layer: Layer, key: str) -> Tensor:
    found: Tensor = getattr(model.get_submodule(layer.name), key)
    return found


def _canonical(layer: Layer, weight: Tensor) -> Tensor:
    """`rankopt._model.layers.canonical_weight`, differentiable."""
    grouped: Tensor = (weight.T if layer.transposed else weight).unflatten(0, (layer.groups, -1))
    return grouped

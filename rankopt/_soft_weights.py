"""A layer's weight as a mixture of its options, differentiable in weight and probabilities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rankopt.decompositions.projection import Projection, survival
from rankopt.layers import Layer, stored_weight
from rankopt.relaxation import Menu, Relaxation

__all__ = ["SoftSite"]


class SoftSite(nn.Module):
    """The options of one site as a function from probabilities to a weight."""

    def __init__(self, model: nn.Module, relaxation: Relaxation, menu: Menu) -> None:
        super().__init__()
        self.layers = menu.site.layers
        self.truncations = nn.ModuleList()
        problem = relaxation.problem
        for method in menu.site.methods:
            places = [i for i, found in enumerate(menu.methods) if found is method]
            if not places:
                continue
            basis = problem.basis(menu.site, method)
            ranks = np.array([menu.ranks[i] for i in places])
            maxima = [axis.maximum for axis in method.rank_axes(menu.site.layer)]
            self.truncations.append(_Truncations(basis.projection(), places, ranks, maxima))
        self.dense = menu.methods.index(None) if None in menu.methods else None

    def forward(self, model: nn.Module, probabilities: Tensor) -> dict[str, Tensor]:
        module: Any = model.get_submodule(self.layers[0].name)
        dense = _canonical(self.layers[0], module.weight)
        mixed = torch.zeros_like(dense)
        if self.dense is not None:
            mixed = probabilities[self.dense].to(dense.dtype) * dense
        for truncation in self.truncations:
            mixed = mixed + truncation(dense, probabilities)
        stored = stored_weight(self.layers[0], mixed)
        return {f"{layer.name}.weight" if layer.name else "weight": stored for layer in self.layers}


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
    ) -> None:
        super().__init__()
        self.projection = projection
        # No option has a rank beyond these, so nothing beyond is ever open.
        self.maxima = tuple(maxima)
        flat = np.ravel_multi_index(tuple((ranks - 1).T), self.maxima)
        device = next(projection.buffers()).device
        self.register_buffer("places", torch.tensor(places).to(device), persistent=False)
        self.register_buffer("cells", torch.from_numpy(flat).to(device), persistent=False)

    def forward(self, weight: Tensor, probabilities: Tensor) -> Tensor:
        mass = probabilities.new_zeros(math.prod(self.maxima))
        mass = mass.index_add(0, self.cells, probabilities[self.places])
        soft: Tensor = self.projection(weight, survival(mass.reshape(self.maxima)))
        return soft


def _canonical(layer: Layer, weight: Tensor) -> Tensor:
    """`rankopt.layers.canonical_weight`, differentiable."""
    grouped: Tensor = (weight.T if layer.transposed else weight).unflatten(0, (layer.groups, -1))
    return grouped

"""Which channels of a bottleneck to keep, and how the others follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rankopt._calibration.moments import DAMPING, damped_root
from rankopt._merging.bottlenecks import Bottleneck
from rankopt._model.layers import canonical_weight, check_weight
from rankopt._model.measure import no_autocast

__all__ = [
    "MergeBasis",
    "Modules",
    "Side",
    "diagonal_blocks",
    "double_weight",
    "drawn_moments",
    "prepare",
]

Modules = Mapping[str, nn.Module]
# Activations drawn where there is no calibration, at least.
DRAWN: Final = 4096


@dataclass(frozen=True)
class Side:
    """The channels on one side of the middle convolution, best first.

    Args:
        order: Channels by how much their consumer gains from them, given the earlier
            ones; with groups, one of each group in turn.
        energy: [ranks + 1] share of the consumer's output energy that is lost when
            the first ``groups * i`` channels are kept.
        second: Second moments of the activations; block-diagonal where groups do not mix.
    """

    order: Tensor
    energy: npt.NDArray[np.float64]
    second: Tensor

    def chosen(self, rank: int) -> Tensor:
        """The kept channels, ascending, so that groups stay together."""
        return self.order[:rank].sort().values

    def rebuild(self, rank: int) -> Tensor:
        """T [channels, rank]: the least squares estimate of all channels from the kept ones."""
        kept = self.chosen(rank)
        root = damped_root(self.second[kept][:, kept].unsqueeze(0))[0]
        estimate: Tensor = torch.cholesky_solve(self.second[kept], root).mT
        return estimate


@dataclass(frozen=True)
class MergeBasis:
    """What every rank of one merge follows from.

    Args:
        bottleneck: The three convolutions.
        sides: Before and after the middle one.
    """

    bottleneck: Bottleneck
    sides: tuple[Side, Side]

    def energies(self, ranks: Sequence[Any]) -> tuple[Any, Any]:
        """Share of the energy lost on each side; arrays for arrays of ranks."""
        groups = self.bottleneck.groups
        first, second = (
            side.energy[np.asarray(rank) // groups]
            for side, rank in zip(self.sides, ranks, strict=True)
        )
        return first, second

    def error(self, ranks: Sequence[Any]) -> Any:
        """Relative error ‖W − Ŵ‖/‖W‖ in the metric of the activations, of both sides."""
        first, second = self.energies(ranks)
        return np.sqrt(np.minimum(first + second, 1.0))


def _order(second: Tensor, demand: Tensor, groups: int, *, mixed: bool) -> Side:
    """Greedy choice of the channels that leave least of the consumer's output unexplained.

    With residual moments R and the consumer's Gram M the output energy left is
    tr(M R); taking channel c lowers it by (R M R)_cc / R_cc. This is a pivoted
    Cholesky factorisation of the moments whose pivots are weighed by the consumer.

    Args:
        second: [channels, channels] moments.
        demand: [channels, channels] the consumer's Gram.
        groups: Groups of channels, one of each of which is chosen in turn.
        mixed: Whether the consumer mixes the groups; if not, a channel can be
            rebuilt from those of its own group alone.
    """
    parts = 1 if mixed else groups
    left, demand = (diagonal_blocks(matrix, parts).clone() for matrix in (second, demand))
    known = torch.block_diag(*left)
    size = len(second) // parts
    diagonal = left.diagonal(dim1=1, dim2=2)
    floor = DAMPING * diagonal.mean().clamp_min(1e-300)
    gains = ((left @ demand) * left).sum(dim=2)  # diagonal of R M R
    energy = [float((left * demand).sum())]
    free = torch.ones(parts, size, dtype=torch.bool, device=second.device)
    every = torch.arange(parts, device=second.device)
    order: list[int] = []
    turns = groups if mixed else 1
    for step in range(size):
        scores = torch.where(diagonal > floor, gains / diagonal.clamp_min(floor), 0.0)
        allowed = free
        if turns > 1:  # channels of the group whose turn it is
            width = size // turns
            allowed = free & (torch.arange(size, device=second.device) // width == step % turns)
        chosen = scores.masked_fill(~allowed, -torch.inf).argmax(dim=1)
        free[every, chosen] = False
        order += (chosen + size * every).tolist()
        pivots = diagonal[every, chosen]
        # Channels that are dead or explained in full take nothing away.
        scale = torch.where(pivots > floor, pivots.clamp_min(floor).rsqrt(), 0.0)
        column = left[every, :, chosen] * scale[:, None]
        weighed = (demand @ column[:, :, None])[:, :, 0]
        taken = (weighed * column).sum(dim=1, keepdim=True)
        gains += column * (column * taken - 2 * (left @ weighed[:, :, None])[:, :, 0])
        left.baddbmm_(column[:, :, None], column[:, None, :], alpha=-1)
        energy.append(energy[-1] - float(taken.sum()))
    shares = np.maximum(np.array(energy[::turns]), 0.0) / (energy[0] or 1.0)
    shares[-1] = 0.0
    return Side(torch.tensor(order), shares, known)


def diagonal_blocks(matrix: Tensor, parts: int) -> Tensor:
    """The blocks [parts, n, m] on the diagonal of a matrix cut into `parts` both ways."""
    split = matrix.unflatten(0, (parts, -1)).unflatten(2, (parts, -1))
    blocks: Tensor = split.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    return blocks


@no_autocast()
def prepare(
    modules: Modules, bottleneck: Bottleneck, moments: Mapping[str, Tensor] | None = None
) -> MergeBasis:
    """The basis of a merge.

    Args:
        modules: Of the model, by name.
        bottleneck: One that can be merged.
        moments: Layer name to second moments [channels, channels] of its input, for
            the second and the third convolution. Without, activations are drawn as
            the weights and norms alone suggest (see `drawn_moments`).

    Raises:
        LayerError: A weight holds NaN or infinity.
    """
    _, middle, last = bottleneck.targets
    for layer in bottleneck.layers:
        check_weight(layer, canonical_weight(modules[layer.name]))
    if moments is None:
        first, second = drawn_moments(modules, bottleneck)
    else:
        first, second = moments[middle].double(), moments[last].double()
    kernel = double_weight(modules[middle]).flatten(3)  # [groups, out, in, pixels]
    rows = kernel.transpose(1, 2).flatten(2)
    grams = rows @ rows.mT
    demand = torch.block_diag(*grams)
    outer = double_weight(modules[last])[0].flatten(1)
    groups = bottleneck.groups
    before = _order(first, demand, groups, mixed=False)
    after = _order(second, outer.mT @ outer, groups, mixed=True)
    return MergeBasis(bottleneck, (before, after))


def double_weight(module: nn.Module) -> Tensor:
    """The canonical weight on the CPU in float64."""
    return canonical_weight(module).to("cpu", torch.float64)


# Activations without data


def drawn_moments(modules: Modules, bottleneck: Bottleneck) -> tuple[Tensor, Tensor]:
    """Second moments of the activations around the middle, from weights and norms alone.

    The block's input is taken as white noise. Each norm then gives its channels the
    mean and the spread it was trained to give; their correlations are those of the
    weights' rows; Gaussian values with these moments are drawn and pass through the
    activation. Pixels are taken as independent.

    Returns:
        [in, in] and [out, out] for the second and third convolution, in float64.
    """
    names = bottleneck.targets
    first = double_weight(modules[names[0]])[0].flatten(1)
    second, mean, spread = _passed(
        modules, bottleneck, 0, first @ first.mT, torch.zeros(len(first), device="cpu").double()
    )
    kernel = double_weight(modules[names[1]]).flatten(3)
    groups = len(kernel)
    blocks = diagonal_blocks(spread, groups)
    leaving = sum(part @ blocks @ part.mT for part in kernel.unbind(3))
    shift = torch.einsum("gsck,gc->gs", kernel, mean.unflatten(0, (groups, -1))).flatten()
    after, _, _ = _passed(
        modules, bottleneck, 1, torch.block_diag(*torch.as_tensor(leaving)), shift
    )
    return second, after


def _passed(
    modules: Modules, bottleneck: Bottleneck, side: int, spread: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(second moments, mean, covariance) after norm and activation, of Gaussian channels."""
    conv: Any = modules[bottleneck.targets[side]]
    if conv.bias is not None:
        mean = mean + conv.bias.detach().cpu().double()
    deviation = spread.diagonal().clamp_min(0).sqrt()
    unit = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    correlation = spread / torch.outer(unit, unit)
    norm_name = bottleneck.norms[side]
    if norm_name is not None:
        norm: Any = modules[norm_name]
        ones = torch.ones_like(mean)
        deviation = ones if norm.weight is None else norm.weight.detach().cpu().double()
        mean = 0 * ones if norm.bias is None else norm.bias.detach().cpu().double()
    root = damped_root(correlation.unsqueeze(0))[0].float()
    generator = torch.Generator().manual_seed(0)
    size = (max(DRAWN, 4 * len(mean)), len(mean))
    noise = torch.randn(size, generator=generator, device="cpu")
    values = mean.float() + deviation.float() * (noise @ root.mT)
    activation = bottleneck.activations[side]
    if activation is not None:
        shape = (*values.shape, *(1,) * len(bottleneck.layers[1].kernel))
        values = activation(modules, values.reshape(shape)).flatten(1)
    second = (values.mT @ values).double() / len(values)
    average = values.double().mean(dim=0)
    return second, average, second - torch.outer(average, average)

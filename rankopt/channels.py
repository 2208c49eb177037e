"""Which channels of a bottleneck to keep, and how the others follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rankopt.bottlenecks import Bottleneck
from rankopt.layers import canonical_weight, check_weight
from rankopt.moments import DAMPING, damped_root

__all__ = ["MergeBasis", "Modules", "Side", "double_weight", "drawn_moments", "prepare"]

Modules = Mapping[str, nn.Module]
# Activations drawn where there is no calibration, at least and per channel.
DRAWN: Final = 4096
DRAWN_PER_CHANNEL: Final = 8


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
    size = len(second)
    if not mixed:
        blocks = [torch.ones(size // groups, size // groups)] * groups
        second = second * torch.block_diag(*blocks).to(second)
    left, weighed = second.clone(), demand @ second
    floor = DAMPING * second.diagonal().mean().clamp_min(1e-300)
    total = float(weighed.diagonal().sum()) or 1.0
    free = torch.ones(groups, size // groups, dtype=torch.bool, device=second.device)
    order: list[int] = []
    energy = [1.0]
    for _ in range(size // groups):
        for group in range(groups):
            part = slice(group * size // groups, (group + 1) * size // groups)
            pivots = left.diagonal()[part]
            gains = (left[part] * weighed[:, part].mT).sum(dim=1) / pivots.clamp_min(floor)
            gains[pivots <= floor] = 0.0  # explained in full, or dead
            gains[~free[group]] = -1.0
            local = int(gains.argmax())
            free[group, local] = False
            channel = part.start + local
            order.append(channel)
            if float(left[channel, channel]) > floor:
                column = left[:, channel] / left[channel, channel].sqrt()
                shadow = weighed[:, channel] / left[channel, channel].sqrt()
                left -= torch.outer(column, column)
                weighed -= torch.outer(shadow, column)
        energy.append(max(float(weighed.diagonal().sum()) / total, 0.0))
    energy[-1] = 0.0
    return Side(torch.tensor(order), np.minimum.accumulate(energy), second)


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
    grams = torch.einsum("gsck,gsdk->gcd", kernel, kernel)
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
        modules, bottleneck, 0, first @ first.mT, torch.zeros(len(first)).double()
    )
    kernel = double_weight(modules[names[1]]).flatten(3)
    groups, channels = len(kernel), kernel.shape[2]
    blocks = torch.stack(
        [
            spread[g * channels : (g + 1) * channels, g * channels : (g + 1) * channels]
            for g in range(groups)
        ]
    )
    leaving = torch.einsum("gsck,gcd,gtdk->gst", kernel, blocks, kernel)
    shift = torch.einsum("gsck,gc->gs", kernel, mean.unflatten(0, (groups, -1))).flatten()
    after, _, _ = _passed(modules, bottleneck, 1, torch.block_diag(*leaving), shift)
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
    root = damped_root(correlation.unsqueeze(0))[0]
    count = max(DRAWN, DRAWN_PER_CHANNEL * len(mean))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
    values = mean + deviation * (noise @ root.mT)
    activation = bottleneck.activations[side]
    if activation is not None:
        shape = (count, len(mean), *(1,) * len(bottleneck.layers[1].kernel))
        values = activation(modules, values.reshape(shape)).reshape(count, -1)
    second, average = values.mT @ values / count, values.mean(dim=0)
    return second, average, second - torch.outer(average, average)

"""Choosing the widths of bottlenecks: uniformly, or of least damage under a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from rankopt._merging import fit as merge_fit
from rankopt._merging.bottlenecks import Bottleneck
from rankopt._merging.channels import MergeBasis, prepare
from rankopt._model import measure, surgery
from rankopt._model.inputs import affordable, digest, divergence, hold, main_output, run
from rankopt._model.probe import Probe
from rankopt.budget import Budget
from rankopt.errors import BudgetInfeasible, CalibrationError
from rankopt.plan import Factors
from rankopt.strategy.allocation import allocate, limits

__all__ = ["Choice", "Widths"]

# Widths tried on each side of a middle convolution, and options kept of their pairs.
TRIED: Final = 16
MAX_OPTIONS: Final = 64
# Share of the width at which a block's sensitivity is measured, and samples it takes.
PROBE_RATIO: Final = 0.5
PROBE_SAMPLES: Final = 256
# Fitted factors come from ridge regression of each map on the dense model's activations.
_FITTED: Final = "whitened+output"

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """The widths of one bottleneck; None to keep it."""

    ranks: tuple[int, int] | None
    cost: Mapping[str, tuple[int, int]]
    error: float | None
    reason: str
    factors: Factors


class Widths:
    """The bottlenecks to decide, their prices, bases and sensitivities."""

    def __init__(
        self,
        view: nn.Module,
        blocks: Sequence[Bottleneck],
        seen: Probe | None,
        round_to: int,
        between: str,
        progress: bool | None,
    ) -> None:
        self.view, self.blocks, self.round_to, self.progress = view, blocks, round_to, progress
        self.between = between
        self.modules = dict(surgery.named_modules(view))
        self.before = {"params": measure.count_params(view), "memory": measure.count_memory(view)}
        if seen is not None:
            self.before["macs"] = seen.macs
        self.held: list[Any] | None = None
        self.factors = Factors()
        self.bases: dict[str, MergeBasis] = {}

    def calibrate(self, data: Any, samples: int | None) -> None:
        """Read the inputs; the moments of the activations follow when they are needed.

        Raises:
            CalibrationError: There are none, or the model fails on them.
        """
        self.held = hold(self.view, data, max_samples=samples)
        with measure.evaluation(self.view):  # or their fault would show as that of the result
            run(self.view, self.held[0])
        self.factors = Factors(_FITTED, digest(self.held))

    # Prices

    def dense(self, block: Bottleneck) -> dict[str, Any]:
        """Axis to figure of the block as it is."""
        return self.price(block, block.widths, "keep")

    def price(self, block: Bottleneck, ranks: Sequence[Any], between: str) -> dict[str, Any]:
        """Axis to figure of convolutions and norms; arrays for arrays of ranks."""
        first, middle, last = block.layers
        before, after = ranks
        pixels = math.prod(middle.kernel)
        weights = (
            first.in_channels * before,
            pixels * before * after // block.groups,
            last.out_channels * after,
        )
        cost = {"params": sum(weights), "memory": sum(weights) * first.itemsize}
        if between == "drop":  # a bias everywhere, and no norm
            biases = before + after + last.out_channels
            cost["params"] = cost["params"] + biases
            cost["memory"] = cost["memory"] + biases * first.itemsize
        else:
            for side, rank in enumerate(ranks):
                for tensor, trained in self._per_channel(block, side):
                    cost["params"] = cost["params"] + trained * rank
                    cost["memory"] = cost["memory"] + tensor.element_size() * rank
            cost["memory"] = cost["memory"] + self._counters(block)
            if last.bias:
                cost["params"] = cost["params"] + last.out_channels
                cost["memory"] = cost["memory"] + last.out_channels * last.itemsize
        if "macs" in self.before:
            cost["macs"] = sum(
                weight * (layer.positions_out or 0)
                for weight, layer in zip(weights, block.layers, strict=True)
            )
        return cost

    def _per_channel(self, block: Bottleneck, side: int) -> list[tuple[torch.Tensor, bool]]:
        """Tensors with one entry per channel, and whether they are parameters."""
        conv: Any = self.modules[block.targets[side]]
        found = [] if conv.bias is None else [(conv.bias, True)]
        name = block.norms[side]
        if name is not None:
            norm = self.modules[name]
            found += [(p, True) for p in norm._parameters.values() if p is not None]
            found += [(b, False) for b in norm._buffers.values() if b is not None and b.dim()]
        return found

    def _counters(self, block: Bottleneck) -> int:
        """Bytes of what norms hold besides their channels: the number of batches seen."""
        buffers = [
            buffer
            for name in block.norms
            if name is not None
            for buffer in self.modules[name]._buffers.values()
        ]
        return sum(b.element_size() for b in buffers if b is not None and not b.dim())

    def choice(self, block: Bottleneck, ranks: Sequence[int], reason: str) -> Choice:
        """The choice of `ranks`, or to keep the block where they are its widths."""
        dense = self.dense(block)
        first, second = (int(rank) for rank in ranks)
        keeps = (first, second) == block.widths
        after = dense if keeps else self.price(block, (first, second), self.between)
        basis = self.bases.get(block.name)
        return Choice(
            ranks=None if keeps else (first, second),
            cost={axis: (int(dense[axis]), int(after[axis])) for axis in self.before},
            error=0.0 if keeps else None if basis is None else float(basis.error((first, second))),
            reason=reason,
            factors=Factors() if keeps else self.factors,
        )

    def totals(self, chosen: Sequence[Choice]) -> dict[str, dict[str, float | None]]:
        """Whole-model figures before and after."""
        saved = {
            axis: sum(choice.cost[axis][0] - choice.cost[axis][1] for choice in chosen)
            for axis in self.before
        }
        return {
            axis: {"before": total, "predicted": total - saved[axis], "measured": None}
            for axis, total in self.before.items()
        }

    # Widths

    def steps(self, block: Bottleneck, width: int) -> int:
        """The step between allowed widths."""
        step = math.lcm(block.groups, self.round_to)
        return step if step <= width else block.groups

    def uniform(self, ratio: float) -> list[Choice]:
        """The same share of every width."""
        chosen = []
        for block in self.blocks:
            ranks = []
            for width in block.widths:
                step = self.steps(block, width)
                ranks.append(min(width, max(step, math.floor(width * ratio / step + 0.5) * step)))
            reason = f"{ratio:g} of the width"
            if tuple(ranks) == block.widths:
                reason = f"{reason} is the whole of it"
            chosen.append(self.choice(block, ranks, reason))
        return chosen

    def within(self, budget: Budget) -> list[Choice]:
        """The widths of least total damage within the budget."""
        self._prepare()
        axes = budget.axes
        whole = limits(budget.ratios, self.before)
        menus = [self._menu(block, axes, whole) for block in self.blocks]
        dense = [self.dense(block) for block in self.blocks]
        fixed = np.array([self.before[a] - sum(cost[a] for cost in dense) for a in axes])
        weights = self._sensitivities()
        damages = [w * menu[2] for w, menu in zip(weights, menus, strict=True)]
        found = None
        if (whole - fixed > 0).all():
            found = allocate(damages, [menu[1] for menu in menus], whole - fixed)
        if found is None:
            raise self._infeasible(budget, fixed, [menu[1] for menu in menus])
        reason = "least total damage within the budget"
        return [
            self.choice(
                block,
                menu[0][index],
                reason if index else "its full width is worth its cost here",
            )
            for block, menu, index in zip(self.blocks, menus, found.chosen, strict=True)
        ]

    def _prepare(self) -> None:
        moments = None
        if self.held is not None:
            moments = merge_fit.channel_moments(
                self.view, self.blocks, self.held, progress=self.progress
            )
        for block in self.blocks:
            self.bases[block.name] = prepare(self.modules, block, moments)

    def _menu(
        self, block: Bottleneck, axes: Sequence[str], whole: Array
    ) -> tuple[npt.NDArray[np.int64], Array, Array]:
        """(ranks, costs, energy lost) of the undominated widths, the full ones first."""
        choices = []
        for width in block.widths:
            step = self.steps(block, width)
            every = np.append(np.arange(step, width, step), width)
            places = np.linspace(0, len(every) - 1, min(TRIED, len(every)))
            choices.append(every[np.unique(np.round(places).astype(int))])
        first, second = (grid.ravel() for grid in np.meshgrid(*choices, indexing="ij"))
        cost, dense = self.price(block, (first, second), self.between), self.dense(block)
        costs = np.stack([np.asarray(cost[axis], dtype=np.float64) for axis in axes], axis=1)
        costs[-1] = [dense[axis] for axis in axes]  # the full widths: nothing is done
        energy = sum(self.bases[block.name].energies((first, second)))
        order = np.lexsort((energy, (costs / whole).mean(axis=1)))
        best = np.minimum.accumulate(energy[order])
        kept = order[np.append(True, energy[order][1:] < best[:-1])]
        full = len(first) - 1
        kept = kept[kept != full][::-1]
        if len(kept) > MAX_OPTIONS:
            kept = kept[np.linspace(0, len(kept) - 1, MAX_OPTIONS).round().astype(int)]
        chosen = np.append(full, kept)
        return np.stack([first, second], axis=1)[chosen], costs[chosen], energy[chosen]

    def _sensitivities(self) -> list[float]:
        """Damage per unit of energy lost, for each block: 1 without calibration inputs."""
        if self.held is None:
            return [1.0] * len(self.blocks)
        with measure.evaluation(self.view):
            probes = affordable(self.view, self.held, PROBE_SAMPLES)
            outputs = [main_output(run(self.view, inputs)) for inputs in probes]
        halved = self.uniform(PROBE_RATIO)
        weights = []
        for block, choice in zip(self.blocks, halved, strict=True):
            ranks = choice.ranks
            lost = 0.0 if ranks is None else float(sum(self.bases[block.name].energies(ranks)))
            if ranks is None or lost <= 0:
                weights.append(1.0)
                continue
            made = merge_fit.started(self.modules, self.bases[block.name], ranks)
            copy = surgery.clone(self.view, share=[*self.view.parameters(), *self.view.buffers()])
            own = dict(surgery.named_modules(copy))
            copy = surgery.replace(copy, {own[name]: module for name, module in made.items()})
            try:
                pairs = zip(probes, outputs, strict=True)
                moved = sum(divergence(y, run(copy.eval(), x)) for x, y in pairs) / len(probes)
            except CalibrationError:  # outputs whose shape depends on their values
                return [1.0] * len(self.blocks)
            weights.append(math.sqrt(max(moved, 1e-12) / lost))
        return weights

    def _infeasible(self, budget: Budget, fixed: Array, costs: Sequence[Array]) -> BudgetInfeasible:
        least = fixed + sum(cost.min(axis=0) for cost in costs)
        shares = {
            axis: float(figure) / self.before[axis]
            for axis, figure in zip(budget.axes, least, strict=True)
        }
        reached = ", ".join(f"{axis} {100 * share:.2f}%" for axis, share in shares.items())
        return BudgetInfeasible(
            f"{budget.explain()}: cannot be met; the smallest reachable by merging "
            f"{len(self.blocks)} bottlenecks is {reached}; loosen the budget, or use "
            "rankopt.search, which treats the other layers too",
            shares,
        )

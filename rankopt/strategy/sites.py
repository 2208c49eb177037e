"""What is decided together (Site), how it can be treated (Option), and at what price."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from rankopt._decompositions.base import Decomposition
from rankopt._model.layers import Layer
from rankopt.budget import Budget
from rankopt.errors import BudgetInfeasible
from rankopt.plan import KEEP, Decision, Factors
from rankopt.strategy.site_times import SiteTimes

__all__ = ["LATENCY", "Frontier", "Option", "Site", "decide", "figure", "infeasible", "kept"]

# The cost axis of measured time, in milliseconds.
LATENCY: Final = "latency"


@dataclass(frozen=True)
class Option:
    """One way to treat a site.

    Args:
        method: ``keep`` or a decomposition's name.
        args: As in `Decision.args`.
        cost: Axis to the site's figure under this option.
        error: Relative Frobenius error; None if unknown.
        reason: Why, in words.
        factors: How the factors are made.
    """

    method: str
    args: Mapping[str, Any]
    cost: Mapping[str, float]
    error: float | None
    reason: str = ""
    factors: Factors = field(default_factory=Factors)

    @property
    def keeps(self) -> bool:
        """Whether the site stays dense."""
        return self.method == KEEP

    def in_order(self) -> Option:
        """The same, fitted to what the compressed layers before pass on."""
        return replace(self, factors=self.factors.in_order())


@dataclass(frozen=True)
class Site:
    """Layers decided together: one layer, or several that share a weight.

    Args:
        layers: The layers; the first one stands for the weight they share.
        methods: The decompositions that apply to all of them.
        cost: Axis to the dense figure; ``macs`` only if the model was probed, and
            ``latency`` (milliseconds) only if the budget bounds it.
        times: Prices the axis ``latency``; None without it.
    """

    layers: tuple[Layer, ...]
    methods: tuple[Decomposition, ...]
    cost: Mapping[str, float]
    times: SiteTimes | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """Name of the first layer."""
        return self.layers[0].name

    @property
    def layer(self) -> Layer:
        """The first layer."""
        return self.layers[0]

    def price(self, method: Decomposition, ranks: Sequence[Any]) -> dict[str, Any]:
        """Axis to figure of the chain; integers, or arrays for arrays of ranks."""
        params = method.params(self.layer, ranks)
        cost = {"params": params, "memory": params * self.layer.itemsize}
        if "macs" in self.cost:
            cost["macs"] = sum(method.macs(layer, ranks) for layer in self.layers)
        if LATENCY in self.cost:
            assert self.times is not None
            cost[LATENCY] = self.times.price(self, method, ranks)
        return {axis: cost[axis] for axis in self.cost}


@dataclass(frozen=True)
class Frontier:
    """The options of one method that no other beats in both load and error.

    Args:
        ranks: [options, axes].
        load: [options], ascending: share of the budget the chain uses.
        error: [options], descending.
    """

    ranks: npt.NDArray[np.int64]
    load: npt.NDArray[np.float64]
    error: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.load)


def decide(site: Site, option: Option) -> Decision:
    """The decision that writes an option down."""
    return Decision(
        targets=tuple(layer.name for layer in site.layers),
        shapes=tuple(layer.shape for layer in site.layers),
        method=option.method,
        args=dict(option.args),
        reason=f"keep: {option.reason}" if option.keeps else option.reason,
        cost={
            axis: (figure(axis, before), figure(axis, option.cost[axis]))
            for axis, before in site.cost.items()
        },
        error=option.error,
        factors=option.factors,
    )


def figure(axis: str, value: float) -> float:
    """Counts are integers; milliseconds are written to a tenth of a microsecond."""
    return round(float(value), 4) if axis == LATENCY else int(value)


def kept(layer: Layer) -> Decision:
    """The decision of a layer that cannot be treated."""
    return Decision(
        targets=(layer.name,),
        shapes=(layer.shape,),
        method=KEEP,
        reason=f"keep: {layer.refusal}",
        error=0.0,
    )


def infeasible(
    budget: Budget,
    shares: Mapping[str, float],
    smallest: Sequence[Option],
    layers: Sequence[Layer],
) -> BudgetInfeasible:
    """The error for a budget that even the options `smallest` exceed.

    Args:
        budget: The budget.
        shares: Axis to share of the original model that these options reach.
        smallest: One for each site.
        layers: Every layer, refused ones included.
    """
    reached = ", ".join(f"{axis} {100 * share:.2f}%" for axis, share in shares.items())
    free = sum(not option.keeps for option in smallest)
    axis = "macs" if "macs" in budget.axes else "params"
    reasons: Counter[str] = Counter()  # by what stays for each
    for option in smallest:
        if option.keeps and option.reason:
            reasons[option.reason] += int(option.cost[axis])
    for layer in layers:
        if layer.refusal:
            reasons[layer.refusal] += getattr(layer, axis) or 0
    common = reasons.most_common(1)
    why = f", mostly for this reason: {common[0][0]}" if common else ""
    return BudgetInfeasible(
        f"{budget.explain()}: cannot be met; the smallest reachable is {reached}, with "
        f"{free} of {len(layers)} layers decomposed and the others kept (the plan of a "
        f"looser budget lists why){why}; loosen the budget or free more layers",
        shares,
    )

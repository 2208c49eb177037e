"""The model and budget at hand (Problem): what a strategy may ask, and how it answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, Protocol

from torch import Tensor, nn

from rankopt._calibration.moments import Moments
from rankopt._decompositions.base import Basis, Decomposition, RankAxis
from rankopt._decompositions.cache import BasisCache, shared
from rankopt._model.layers import Layer
from rankopt._timing.latency import Measured
from rankopt._utils.memory import give_back
from rankopt._utils.parallel import for_each, largest_first
from rankopt._utils.progress import progress_bar
from rankopt.budget import Budget
from rankopt.errors import BudgetInfeasible, DeadlineExceeded
from rankopt.plan import FISHER, KEEP, Decision, Factors, RankPlan
from rankopt.strategy.fitted_errors import fitted_errors
from rankopt.strategy.rank_choices import (
    allowed_ranks,
    rank_step,
    rounded_rank,
    thinned,
    undominated,
)
from rankopt.strategy.site_times import SiteTimes
from rankopt.strategy.sites import LATENCY, Frontier, Option, Site, decide, figure, infeasible, kept

__all__ = ["Problem"]

BISECTIONS: Final = 40


class _Described(Protocol):
    """A strategy, as far as a plan is concerned."""

    def describe(self, seed: int) -> dict[str, Any]: ...


@dataclass
class Problem:
    """Everything a strategy may ask about a model; nothing is computed twice.

    Args:
        layers: Every layer with a weight, in model order, refused ones included.
        sites: The sites to decide.
        budget: The budget; None leaves the amount to the strategy.
        totals: Axis to figure of the whole original model.
        weight: Gives the canonical weight of a layer.
        seed: For strategies that draw random numbers.
        deadline: `time.monotonic()` value after which to stop; None for never.
        moments: Layer name to the moments of its inputs; empty without calibration.
        weigh: Makes the moments that weigh outputs by the Fisher information, once; None
            without calibration.
        fisher: Whether bases and options are made with those.
        asymmetric: Whether the factors of the plan will be made in order, see
            `rankopt.plan.Factors`, or ``search`` where both are tried; bases and errors are those
            of dense inputs nevertheless.
        methods: The decompositions asked for, as text; a site has those that apply to it.
        variant: What tells this problem from the others of a search that tries several ways of
            making factors; empty for the first.
        calibration: Digest of the calibration inputs, for the plan.
        times: Measures layers, dense and decomposed; None without example inputs or
            where neither budget nor strategy asks for time.
        measure: Times the whole model, sites taking options (one each), against the
            dense model; None where `times` is.
        divergence: How far the outputs on calibration inputs move when some sites
            take options (by index) and the others stay dense; None without calibration.
        distance: How far the outputs on calibration inputs move under decisions, the model
            built and its BatchNorm settled as by `rankopt.apply`; None without calibration.
        inputs: Calibration batches, without labels; empty without calibration.
        copy: Makes an unpacked dense model to run and differentiate, its parameters its
            own; None if the model was never run.
        round_to: Ranks are multiples of this, or an axis's maximum; 1 for any rank, as where
            the maximum is smaller than this.
        rounding: Which multiple a strategy's rank becomes: ``down``, ``nearest``, ``up``.
        cache: Where bases are held.
        progress: Whether to show progress bars; None decides by the terminal.
        evaluate: Yields the user's metric of the model with some decisions carried out,
            as (value, weight) per batch, after BatchNorm recalibration and under saved
            generators and modes; None where the user gave none.
        model: Class and digests of the model, as in `RankPlan.model`.
    """

    layers: tuple[Layer, ...]
    sites: tuple[Site, ...]
    budget: Budget | None
    totals: Mapping[str, float]
    weight: Callable[[Layer], Tensor]
    seed: int = 0
    deadline: float | None = None
    moments: Mapping[str, Moments] = field(default_factory=dict)
    weigh: Callable[[], Mapping[str, Moments]] | None = None
    fisher: bool = False
    asymmetric: bool | str = False
    methods: tuple[str, ...] = ()
    variant: str = ""
    calibration: str | None = None
    times: SiteTimes | None = None
    measure: Callable[[Sequence[Option]], Measured] | None = None
    divergence: Callable[[Mapping[int, Option]], float] | None = None
    distance: Callable[[Iterable[Decision]], float] | None = None
    inputs: Sequence[Any] = ()
    copy: Callable[[], nn.Module] | None = None
    round_to: int = 1
    rounding: str = "down"
    cache: BasisCache = field(default_factory=lambda: shared)
    progress: bool | None = None
    evaluate: Callable[[Iterable[Decision]], Iterator[tuple[float, float]]] | None = None
    model: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._bases: dict[tuple[str, str, bool, bool], Basis] = {}
        self._frontiers: dict[tuple[str, str], Frontier] = {}

    def with_budget(self, budget: Budget | None) -> Problem:
        """The same problem under another budget; what is factorised already is shared."""
        other = replace(self, budget=budget)
        other._bases = self._bases
        return other

    def with_factors(
        self,
        *,
        fisher: bool | None = None,
        asymmetric: bool | str | None = None,
        variant: str | None = None,
    ) -> Problem:
        """The same problem with factors made in another way; None for what is said already."""
        changes = {"fisher": fisher, "asymmetric": asymmetric, "variant": variant}
        given = {name: value for name, value in changes.items() if value is not None}
        other: Problem = replace(self, **given)  # type: ignore[arg-type]
        other._bases = self._bases
        return other

    def close(self) -> None:
        """Let go of models and matrices; what was found stays in plans."""
        self._bases.clear()
        self._frontiers.clear()
        self.moments, self.weigh, self.inputs = {}, None, ()
        self.divergence = self.evaluate = self.copy = self.measure = self.distance = None
        give_back()

    # What an option costs and loses

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """The axes of `load`: those of the budget, or params without one.

        A bound on the metric is not one that options use up: what is minimised under it is.
        """
        if self.budget is None:
            return ("params",)
        counted = tuple(axis for axis in self.budget.axes if axis != "metric_drop")
        return counted or (self.budget.minimize or "params",)

    def load(self, cost: Mapping[str, Any]) -> Any:
        """Share of the budget that `cost` uses, the mean over its axes."""
        return sum(cost[axis] / (self._limit(axis) * len(self.axes)) for axis in self.axes)

    @property
    def load_name(self) -> str:
        """What `load` is of, in words."""
        return "time" if self.axes == (LATENCY,) else "cost"

    def _limit(self, axis: str) -> float:
        budget = self.budget
        ratio = budget.ratio(axis) if budget is not None and axis in budget.axes else 1.0
        return ratio * self.totals[axis]

    def known(self, site: Site, fisher: bool | None = None) -> Moments | None:
        """What is known of a site's inputs and, if they are weighed, of its outputs.

        Args:
            site: The site.
            fisher: Whether outputs are weighed; None for what the problem says.
        """
        weighed = self.fisher if fisher is None else fisher
        moments = self.weigh() if weighed and self.weigh is not None else self.moments
        return moments.get(site.name)

    def basis(
        self,
        site: Site,
        method: Decomposition,
        *,
        data_aware: bool = True,
        fisher: bool | None = None,
    ) -> Basis:
        """The basis of a site's weight, computed on first use.

        Args:
            site: The site.
            method: One of its methods.
            data_aware: Whether errors are those of the output, where moments of
                the inputs are known.
            fisher: As of `known`.

        Raises:
            DeadlineExceeded: The deadline has passed.
        """
        self.check_deadline()
        moments = self.known(site, fisher) if data_aware else None
        weighed = moments is not None and moments.weighs
        key = (site.name, repr(method), moments is not None, weighed)
        if key not in self._bases:
            self._bases[key] = self.cache.get(method, self.weight(site.layer), moments)
        return self._bases[key]

    def prepare(self) -> None:
        """Compute every basis now, under a progress bar."""
        pairs = largest_first(
            [(site, method) for site in self.sites for method in site.methods],
            lambda pair: pair[0].layer.params,
        )
        if not pairs:
            return
        device = self.weight(pairs[0][0].layer).device
        self.known(pairs[0][0])  # before there are threads: gradients are taken once

        def compute(pair: tuple[Site, Decomposition]) -> None:
            basis = self.basis(*pair)
            basis.error([1] * len(pair[1].rank_axes(pair[0].layer)))

        with progress_bar("factorising", len(pairs), enabled=self.progress) as advance:
            for _ in for_each(compute, pairs, device=device):
                advance()
        give_back()

    def frontier(self, site: Site, method: Decomposition) -> Frontier:
        """The undominated rank choices of `method` that cost less than dense."""
        key = (site.name, repr(method))
        if key not in self._frontiers:
            self._frontiers[key] = self._build_frontier(site, method)
        return self._frontiers[key]

    def _build_frontier(self, site: Site, method: Decomposition) -> Frontier:
        axes = method.rank_axes(site.layer)
        if site.times is not None and LATENCY in site.cost:  # only what was timed has a price
            choices = list(site.times.grid(site, method).values)
        else:
            choices = thinned([allowed_ranks(axis, self.round_to) for axis in axes])
        return undominated(
            choices,
            load=lambda ranks: self.load(site.price(method, ranks)),
            error=self.basis(site, method).error,
            dense=self.load(site.cost),
        )

    def step(self, axis: RankAxis) -> int:
        """What ranks along an axis are multiples of; its own where `round_to` is too large."""
        return rank_step(axis, self.round_to)

    def rounded(self, rank: int, axis: RankAxis) -> int:
        """`rank` as the feasible one that `round_to` and `rounding` ask for."""
        return rounded_rank(rank, axis, self.round_to, self.rounding)

    def keep(self, site: Site, reason: str) -> Option:
        """The option that leaves a site dense."""
        return Option(KEEP, {}, site.cost, 0.0, reason)

    def option(
        self,
        site: Site,
        method: Decomposition,
        ranks: Sequence[int],
        reason: str = "",
        *,
        latency_ms: float | None = None,
    ) -> Option:
        """The option that decomposes a site, or `keep` where that saves nothing.

        Args:
            site: One of the sites.
            method: One of its decompositions.
            ranks: On each axis of the method.
            reason: Why.
            latency_ms: What a strategy measured at these ranks. Without, under a budget on
                latency, the option has the nearest ranks below that were timed beforehand.

        Raises:
            LayerError: Infeasible ranks.
            ValueError: `method` is no decomposition, or `ranks` no sequence of integers.
        """
        if not isinstance(method, Decomposition):
            raise ValueError(f"method={method!r}: expected a decomposition, one of site.methods")
        given = tuple(ranks) if isinstance(ranks, Iterable) else ()
        if not isinstance(ranks, Iterable) or any(int(rank) != rank for rank in given):
            raise ValueError(
                f"layer {site.name}: ranks={ranks!r}: expected an integer for each axis of "
                f"{method.name}"
            )
        axes = method.rank_axes(site.layer)
        wanted = tuple(int(rank) for rank in given)
        chosen = tuple(
            self.rounded(rank, axis) if 1 <= rank <= axis.maximum else rank
            for rank, axis in zip(wanted, axes, strict=False)
        )
        method.check_ranks(site.layer, chosen if len(chosen) == len(wanted) else wanted)
        priced = site.times is not None and LATENCY in site.cost
        if priced and latency_ms is None:  # only what was timed has a price
            assert site.times is not None
            chosen = site.times.grid(site, method).snap(chosen)
        cost = site.price(method, chosen)
        if priced and latency_ms is not None:
            cost = {**cost, LATENCY: latency_ms}
        if self.load(cost) >= self.load(site.cost):
            named = " x ".join(map(str, chosen))
            return self.keep(site, f"{method.name} at rank {named} would save nothing")
        # A formula that never looked at the weights has no error to state.
        moments = self.known(site)
        weighed = moments is not None and moments.weighs
        known = self._bases.get((site.name, repr(method), moments is not None, weighed))
        error = None if known is None else float(known.error(chosen))
        args = {"ranks": list(chosen), **method.settings}
        factors = Factors()
        if moments is not None:
            kind = method.factors_kind(moments) + FISHER * weighed
            factors = Factors(kind, self.calibration)
        return Option(method.name, args, cost, error, reason, factors)

    def settled(self, options: Sequence[Option]) -> list[Option]:
        """The options with fitted errors in place of estimates."""
        return fitted_errors(
            self.sites, options, self.basis, lambda site: self.weight(site.layer).device,
            progress=self.progress,
        )  # fmt: skip

    # Whole choices

    def figures(self, options: Sequence[Option]) -> dict[str, float]:
        """Whole-model figures when each site takes its option."""
        saved = {
            axis: sum(
                site.cost[axis] - option.cost[axis]
                for site, option in zip(self.sites, options, strict=True)
            )
            for axis in self.totals
        }
        return {axis: total - saved[axis] for axis, total in self.totals.items()}

    def fits(self, options: Sequence[Option]) -> bool:
        """Whether the budget holds."""
        return self.budget is None or self.budget.fits(self.figures(options), self.totals)

    def fit(self, choose: Callable[[float], Sequence[Option]]) -> tuple[float, list[Option]]:
        """The mildest compression of a one-knob family that meets the budget.

        Args:
            choose: Options, one per site, for a knob in [0, 1]: 0 compresses
                most, 1 least, and cost grows with the knob.

        Returns:
            The knob and its options.

        Raises:
            BudgetInfeasible: Even knob 0 exceeds the budget.
        """
        mild = list(choose(1.0))
        if self.fits(mild):
            return 1.0, mild
        best = list(choose(0.0))
        if not self.fits(best):
            raise self.infeasible(best)
        low, high = 0.0, 1.0
        for _ in range(BISECTIONS):
            self.check_deadline()
            middle = (low + high) / 2
            options = list(choose(middle))
            if self.fits(options):
                low, best = middle, options
            else:
                high = middle
        return low, best

    def infeasible(self, smallest: Sequence[Option]) -> BudgetInfeasible:
        """The error for a budget that even the options `smallest` exceed."""
        assert self.budget is not None
        figures = self.figures(smallest)
        shares = {axis: figures[axis] / self.totals[axis] for axis in self.budget.axes}
        return infeasible(self.budget, shares, smallest, self.layers)

    def check_deadline(self) -> None:
        """Raise `DeadlineExceeded` once the deadline has passed."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise DeadlineExceeded(
                "the search ran into its deadline before it had a plan; allow more time"
            )

    @staticmethod
    def annotate(plan: RankPlan, facts: Mapping[str, Any]) -> RankPlan:
        """The plan with a strategy's own findings under ``extensions``."""
        return replace(plan, extensions={**plan.extensions, **facts})

    def decisions(self, options: Sequence[Option]) -> tuple[Decision, ...]:
        """The decisions that write options down, the layers that cannot be treated included."""
        if len(options) != len(self.sites):
            raise ValueError(f"{len(options)} options for {len(self.sites)} sites: give one each")
        options = self.settled(options)
        decided = {
            site.name: decide(site, option)
            for site, option in zip(self.sites, options, strict=True)
        }
        covered = {layer.name for site in self.sites for layer in site.layers}
        return tuple(
            decided[layer.name] if layer.name in decided else kept(layer)
            for layer in self.layers
            if layer.name in decided or layer.name not in covered
        )

    def plan(self, strategy: _Described, options: Sequence[Option]) -> RankPlan:
        """Write the options down; `search` adds what it knows of model and machine."""
        decisions = self.decisions(options)
        figures = self.figures(options)
        return RankPlan(
            model={},
            decisions=decisions,
            budget=self.budget,
            strategy=strategy.describe(self.seed),
            totals={
                axis: {
                    "before": figure(axis, total),
                    "predicted": figure(axis, figures[axis]),
                    "measured": None,
                }
                for axis, total in self.totals.items()
            },
        )

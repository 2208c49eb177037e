"""`profiled`: another strategy's ranks, moved to where the hardware is fast."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from rankopt._decompositions.base import Decomposition
from rankopt._timing.candidates import MULTIPLES, aligned_below, cliffs, line, lowest_on_line
from rankopt._timing.latency import Interval
from rankopt._timing.layer_time import Chain, LayerTime
from rankopt._timing.noise import warn_of_noise
from rankopt._utils.arguments import check_choice, is_number
from rankopt.errors import BudgetError, ModelError
from rankopt.plan import Decision, RankPlan
from rankopt.registry import decompositions, strategies
from rankopt.strategy import LATENCY, Option, Problem, Site, Strategy, Tags
from rankopt.strategy.allocation import choose
from rankopt.strategy.site_times import SiteTimes

__all__ = ["Profiled"]

# Cliffs whose neighbours are timed, the steepest first.
MAX_CLIFFS = 2
# Ranks whose times per MAC differ by less, and not for sure, count as alike.
ALIKE = 0.03
# A first look takes this many rounds; the ranks of least time per MAC then take them all.
LOOK_ROUNDS = 3
SHORTLIST = 3
# Whole-model measurements after which layers that do not pay are no longer looked for.
MAX_REVERTS = 4


@dataclass(frozen=True)
class _Timed:
    """One site with the base strategy's choice and the times around it.

    Args:
        option: The base strategy's.
        method: Its decomposition; None where the base keeps the site.
        ranks: Timed ranks, [0] the base strategy's own.
        times: Of each.
        work: MACs of each as a share of the dense layer's.
    """

    site: Site
    option: Option
    method: Decomposition | None = None
    ranks: tuple[tuple[int, ...], ...] = ()
    times: tuple[LayerTime, ...] = ()
    work: tuple[float, ...] = field(default=())

    @property
    def fastest(self) -> int:
        """The rank of least time against the dense layer."""
        return min(range(len(self.times)), key=lambda i: self.times[i].ratio.median)

    def faster(self) -> list[int]:
        """Ranks that beat the dense layer for sure: the upper bound of the ratio is below 1."""
        return [i for i, time in enumerate(self.times) if time.ratio.high < 1]


@dataclass(frozen=True)
class Profiled(Strategy):
    """Ranks of a base strategy, lowered to the fast side of a cliff as measured.

    Per layer, ranks between the base strategy's and those of a compression stronger by
    one (2x to 3x, say) are timed on the layer's real input beside the dense layer. Of
    those that surely beat dense, the rank with the least time per MAC is chosen, and
    among ranks that are alike the largest. A layer that no rank makes faster
    is kept, with the measured ratio as the reason. Then the whole model is measured, and
    layers that do not pay there are kept too.

    With a budget, the base meets it first; layers kept for speed are made up for by lower
    ranks of others, and only if that cannot do, by ranks that are slower than dense.

    Args:
        base: A strategy's name or instance, or a mapping of its ``name`` and ``settings`` as
            plans write it.
        mode: ``robust`` as above, or ``paper``: every rank is timed and the one after
            the largest single fall in time is taken, be it noise or not.
        candidates: Which ranks ``robust`` times: ``aligned`` (multiples of 8, 16, 32, 64,
            powers of two, and neighbours of cliffs), ``powers`` of two or ``every`` rank.
        tolerance: A rank is not worth keeping if a larger one takes at most this share
            longer.

    References:
        arXiv 2309.03824 and 2407.20266, algorithm 1, with Δt taken at the fast side of the
        fall, and the rank that was found installed.
    """

    name: ClassVar[str] = "profiled"
    tags: ClassVar[Tags] = Tags(monotone=False, needs=frozenset({"latency"}))
    base: str | Strategy | Mapping[str, Any] = "parameter_ratio"
    mode: Literal["robust", "paper"] = "robust"
    candidates: Literal["aligned", "powers", "every"] = "aligned"
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        if isinstance(self.base, Mapping) and "name" in self.base:
            settings = self.base.get("settings", {})
            if not isinstance(settings, Mapping):
                raise ValueError(f"base={self.base!r}: expected a mapping as its settings")
            made = strategies.create(self.base["name"], **settings)
            object.__setattr__(self, "base", made)
        if not isinstance(self.base, (str, Strategy)):
            raise ValueError(f"base={self.base!r}: expected a strategy's name or instance")
        check_choice("mode", self.mode, ("robust", "paper"))
        check_choice("candidates", self.candidates, ("aligned", "powers", "every"))
        if not is_number(self.tolerance) or not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance={self.tolerance!r}: expected a number in [0, 1)")

    def describe(self, seed: int) -> dict[str, Any]:
        """As every strategy's, with the base described in turn."""
        base: Any = self.base
        if isinstance(base, Strategy):
            base = {key: base.describe(seed)[key] for key in ("name", "settings")}
        settings = {
            "base": base,
            "mode": self.mode,
            "candidates": self.candidates,
            "tolerance": self.tolerance,
        }
        return {"name": self.name, "settings": settings, "seed": seed}

    def search(self, problem: Problem) -> RankPlan:
        """Run the base, time around its ranks, choose; see `Strategy.search`."""
        assert isinstance(self.base, (str, Strategy))
        base = strategies.create(self.base)
        if problem.budget is None and not base.promises.unbudgeted:
            raise BudgetError(
                f"base={base.name!r} needs a budget: it has no natural amount of compression"
            )
        missing = ", ".join(sorted(base.promises.needs - {"latency", "calibration"}))
        if missing:
            raise ModelError(f"base={base.name!r} needs {missing}, which profiled does not use")
        if "calibration" in base.promises.needs and problem.calibration is None:
            raise ModelError(f"base={base.name!r} needs calibration=")
        times, measure = problem.times, problem.measure
        if times is None or measure is None:
            raise ModelError("strategy 'profiled' needs example_inputs= to time the layers with")
        plan = base.search(problem)
        before = times.table.calls
        timed = [self._timed(problem, times, site, plan[site.name]) for site in problem.sites]
        if problem.budget is not None:
            options = _within_budget(problem, timed, [self._pick(entry) for entry in timed])
        else:
            options = [self._option(problem, entry, self._pick(entry)) for entry in timed]
            options = _paying(problem, timed, options)
        facts: dict[str, Any] = {"base": base.name, "runs": times.table.calls - before}
        if LATENCY not in problem.totals:  # else the search measures against the budget
            dense = all(option.keeps for option in options)
            ratio = Interval(1.0, 1.0, 1.0) if dense else measure(options).ratio
            facts |= {"ratio": ratio.median, "low": ratio.low, "high": ratio.high}
            _warn_of_noise(timed, options, ratio)
        return problem.annotate(problem.plan(self, options), {"profiled": facts})

    def _timed(self, problem: Problem, times: SiteTimes, site: Site, decision: Decision) -> _Timed:
        if decision.keeps:
            return _Timed(site, problem.keep(site, decision.reason.removeprefix("keep: ")))
        settings = {key: value for key, value in decision.args.items() if key != "ranks"}
        method = decompositions.create(decision.method, **settings)
        option = problem.option(site, method, decision.ranks, decision.reason)
        dense = float(site.cost["macs"])

        def work(ranks: Sequence[int]) -> float:
            return sum(float(method.macs(layer, ranks)) for layer in site.layers) / dense

        def run(
            wanted: Sequence[tuple[int, ...]], rounds: int | None = None
        ) -> dict[tuple[int, ...], LayerTime]:
            chains = [Chain(), *(Chain(method, ranks) for ranks in wanted)]
            found = times.time(site, chains, rounds=rounds)
            return {chain.ranks: time for chain, time in found.items() if chain.method is not None}

        axes, upper = method.rank_axes(site.layer), decision.ranks

        def feasible(choices: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
            rounded = [
                tuple(problem.rounded(r, axis) for r, axis in zip(ranks, axes, strict=True))
                for ranks in choices
            ]
            return list(dict.fromkeys(rounded))

        wanted = feasible(self._candidates(site, method, upper))
        if self.mode == "robust" and self.candidates != "every":
            looked = run(wanted, LOOK_ROUNDS)
            if self.candidates == "aligned":
                near = [r for r in feasible(_near_cliffs(looked, work, upper)) if r not in looked]
                looked |= run(near, LOOK_ROUNDS) if near else {}
            promising = sorted(looked, key=lambda r: looked[r].ratio.median / work(r))
            wanted = [upper, *(ranks for ranks in promising[:SHORTLIST] if ranks != upper)]
        found = run([upper, *wanted])
        if upper not in found:  # out of memory at the base's own rank
            return _Timed(site, problem.keep(site, "its chain could not be run"))
        ranks = (upper, *(other for other in found if other != upper))
        return _Timed(
            site,
            option,
            method,
            ranks,
            tuple(found[r] for r in ranks),
            tuple(work(r) for r in ranks),
        )

    def _candidates(
        self, site: Site, method: Decomposition, upper: tuple[int, ...]
    ) -> list[tuple[int, ...]]:
        """Ranks to time, from the base's down to those of a compression stronger by one."""

        def params(ranks: Sequence[int]) -> float:
            return float(method.params(site.layer, ranks))

        ratio = site.layer.params / params(upper)
        lower = lowest_on_line(upper, params, site.layer.params / (ratio + 1))
        if self.mode == "paper" or self.candidates == "every":
            every = [line(upper, rank) for rank in range(max(lower), max(upper) + 1)]
            return list(dict.fromkeys([upper, *reversed(every)]))
        multiples = MULTIPLES if self.candidates == "aligned" else ()
        return aligned_below(upper, lower, multiples)

    def _pick(self, entry: _Timed) -> int | None:
        """Index of the chosen ranks; None to keep the layer dense."""
        if entry.method is None:
            return None
        if self.mode == "paper":
            return _largest_fall(entry)
        allowed = _efficient(entry, entry.faster(), self.tolerance)
        if not allowed:
            return None
        per_mac = {i: entry.times[i].ratio.median / entry.work[i] for i in allowed}
        best = min(allowed, key=per_mac.__getitem__)

        def as_good(i: int) -> bool:
            versus, share = entry.times[i].versus(entry.times[best]), entry.work[i]
            near = per_mac[i] <= per_mac[best] * (1 + ALIKE)
            return near and versus.low * entry.work[best] / share <= 1

        return max((i for i in allowed if i == best or as_good(i)), key=lambda i: entry.work[i])

    def _option(self, problem: Problem, entry: _Timed, index: int | None) -> Option:
        if entry.method is None:
            return entry.option
        if index is None:
            return problem.keep(entry.site, _why_dense(entry))
        return _chain_option(problem, entry, index)


def _chain_option(problem: Problem, entry: _Timed, index: int, note: str = "") -> Option:
    assert entry.method is not None
    named = " x ".join(map(str, entry.ranks[0]))
    reason = f"{entry.times[index].ratio} of the dense time{note} (base rank {named})"
    dense = entry.site.cost.get(LATENCY)
    took = None if dense is None else float(dense) * entry.times[index].ratio.median
    return problem.option(entry.site, entry.method, entry.ranks[index], reason, latency_ms=took)


def _why_dense(entry: _Timed) -> str:
    fastest = entry.fastest
    named = " x ".join(map(str, entry.ranks[fastest]))
    ratio = entry.times[fastest].ratio
    if ratio.median < 1:
        return f"not surely faster than dense: at best {ratio} of its time, at rank {named}"
    return f"slower than dense: at best {ratio} of its time, at rank {named}"


def _efficient(entry: _Timed, allowed: Sequence[int], tolerance: float) -> list[int]:
    """Those than which no other is as large in every rank and about as fast."""

    def beaten(i: int) -> bool:
        return any(
            j != i
            and all(a >= b for a, b in zip(entry.ranks[j], entry.ranks[i], strict=True))
            and entry.times[j].ratio.median <= entry.times[i].ratio.median * (1 + tolerance)
            for j in allowed
        )

    return [i for i in allowed if not beaten(i)]


def _largest_fall(entry: _Timed) -> int | None:
    """Algorithm 1: the fast side of the largest fall between neighbours, if it beats dense."""
    order = sorted(range(len(entry.ranks)), key=lambda i: entry.work[i])
    medians = [entry.times[i].ratio.median for i in order]
    falls = np.diff(medians)
    chosen = order[int(np.argmax(falls))] if len(falls) else order[0]
    return chosen if entry.times[chosen].ratio.median < 1 else None


def _near_cliffs(
    found: dict[tuple[int, ...], LayerTime], work: Any, upper: tuple[int, ...]
) -> list[tuple[int, ...]]:
    """Ranks just above the fast and just below the slow side of the steepest falls."""
    on_line = sorted(
        (ranks for ranks in found if line(upper, max(ranks)) == ranks), key=lambda ranks: max(ranks)
    )
    firsts = [max(ranks) for ranks in on_line]
    medians = [found[ranks].ratio.median for ranks in on_line]
    jumps = cliffs(firsts, medians, [work(ranks) for ranks in on_line])[:MAX_CLIFFS]
    near = {first for fast, slow in jumps for first in (fast + 1, slow - 1) if fast < first < slow}
    return [line(upper, first) for first in sorted(near)]


def _paying(problem: Problem, timed: Sequence[_Timed], options: list[Option]) -> list[Option]:
    """Keep layers dense, those that save least first, until the whole model is surely faster."""
    assert problem.measure is not None
    for _ in range(MAX_REVERTS):
        changed = [i for i, option in enumerate(options) if not option.keeps]
        if not changed:
            break
        measured = problem.measure(options)
        if measured.ratio.high < 1:
            break
        saved = {i: _saved(timed[i], options[i]) for i in changed}
        ratio = measured.ratio
        for i in sorted(changed, key=saved.__getitem__)[: math.ceil(len(changed) / 2)]:
            options[i] = problem.keep(
                problem.sites[i],
                f"saves {saved[i]:.3g} ms by itself, but the whole model took {ratio} of dense",
            )
    else:
        if problem.measure(options).ratio.high >= 1:
            reason = "no plan made the whole model surely faster than dense"
            options = [
                option if option.keeps else problem.keep(site, reason)
                for site, option in zip(problem.sites, options, strict=True)
            ]
    return options


def _saved(entry: _Timed, option: Option) -> float:
    """Milliseconds that a layer's chain saves by itself."""
    time = entry.times[_index(entry, option)]
    return float(np.median(time.dense_ms) * (1 - time.ratio.median))


def _warn_of_noise(timed: Sequence[_Timed], options: Sequence[Option], whole: Interval) -> None:
    """Say so where the times that layers or the model were decided by vary too much."""
    pairs = zip(timed, options, strict=True)
    ratios = [entry.times[_index(entry, option)].ratio for entry, option in pairs if entry.method]
    noisy = sum(ratio.noisy for ratio in ratios)
    layers = f"the times that {noisy} of {len(ratios)} layers were decided by vary"
    warn_of_noise(ratios, what=layers)
    warn_of_noise([whole], what="the time of the whole model varies")


def _index(entry: _Timed, option: Option) -> int:
    """Of the ranks that an option has, of the fastest where it keeps the layer."""
    if option.keeps:
        return entry.fastest
    wanted = tuple(option.args["ranks"])
    return entry.ranks.index(wanted) if wanted in entry.ranks else 0


def _within_budget(
    problem: Problem, timed: Sequence[_Timed], picks: Sequence[int | None]
) -> list[Option]:
    """Least squared error within the budget, over ranks that beat dense where that can do."""
    assert problem.budget is not None
    for slow in (False, True):
        menus = [
            _menu(problem, entry, pick, slow=slow) for entry, pick in zip(timed, picks, strict=True)
        ]
        damages = [np.array([(option.error or 0.0) ** 2 for option in menu]) for menu in menus]
        found = choose(problem, menus, damages, problem.budget.ratios)
        if found is not None:
            return found[0]
    # The base met the budget with options that are all in the last menus.
    return [entry.option for entry in timed]


def _menu(problem: Problem, entry: _Timed, pick: int | None, *, slow: bool) -> list[Option]:
    """Dense, the picked ranks and lower ones that are faster, or any that were timed."""
    if entry.method is None:
        return [entry.option]
    problem.basis(entry.site, entry.method)  # errors are compared
    why = _why_dense(entry) if pick is None else "the budget is met without it"
    menu = [problem.keep(entry.site, why)]
    if slow:
        note = ", needed for the budget"
        menu += [_chain_option(problem, entry, i, note) for i in range(len(entry.ranks))]
    elif pick is not None:
        below = [i for i in entry.faster() if entry.work[i] <= entry.work[pick]]
        menu += [_chain_option(problem, entry, i) for i in {pick, *below}]
    return menu

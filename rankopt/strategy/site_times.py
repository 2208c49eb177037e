"""SiteTimes: what the sites of one model cost in milliseconds, dense and as chains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import torch

from rankopt._decompositions.base import Decomposition, RankAxis
from rankopt._model.probe import Call
from rankopt._timing.candidates import grid_values
from rankopt._timing.layer_time import Chain, LayerTime
from rankopt._timing.profile_table import ProfileTable
from rankopt._utils.progress import progress_bar

if TYPE_CHECKING:
    from rankopt.strategy.sites import Site

__all__ = ["RankGrid", "SiteTimes"]

# Ranks per axis of the grid that a latency budget chooses from.
GRID_COUNTS: Final = {1: 16, 2: 6, 3: 4}
# Rounds of each: the whole model is measured afterwards.
GRID_ROUNDS: Final = 5
# Of two ranks, how far their ratio may lie from that of their maxima.
MAX_ASPECT: Final = 2.0
# A chain with more of the dense MACs than this is not worth timing.
MAX_WORK: Final = 0.98


@dataclass(frozen=True)
class RankGrid:
    """Times of one method at the ranks of a grid.

    Args:
        values: Ascending ranks of each axis.
        latency_ms: [values of each axis]; infinite where it was not timed.
    """

    values: tuple[npt.NDArray[np.int64], ...]
    latency_ms: npt.NDArray[np.float64]

    def price(self, ranks: Sequence[Any]) -> Any:
        """Time of the next timed ranks at least as large, for integers or broadcasting arrays."""
        padded = np.pad(self.latency_ms, [(0, 1)] * len(self.values), constant_values=np.inf)
        places = [np.searchsorted(v, r, "left") for v, r in zip(self.values, ranks, strict=True)]
        found = padded[tuple(np.broadcast_arrays(*places))]
        return found if found.ndim else float(found)

    def snap(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """The largest timed ranks at most as large on each axis; `ranks` where there are none."""
        places = [
            int(np.searchsorted(v, r, "right")) - 1 for v, r in zip(self.values, ranks, strict=True)
        ]
        if min(places) < 0 or not np.isfinite(self.latency_ms[tuple(places)]):
            return tuple(ranks)
        return tuple(int(v[i]) for v, i in zip(self.values, places, strict=True))


class SiteTimes:
    """Times of sites for the inputs that a model was probed with.

    Args:
        table: Where times are measured and remembered.
        calls: Layer name to the inputs it was called with.
        device: Where the model runs.
        step: What the ranks along an axis are multiples of.
        check: Called between measurements; may raise to stop.
    """

    def __init__(
        self,
        table: ProfileTable,
        calls: Mapping[str, Sequence[Call]],
        *,
        device: torch.device,
        step: Callable[[RankAxis], int] = lambda axis: axis.step,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.table, self.calls, self.device, self.check = table, calls, device, check
        self.step = step
        self._grids: dict[tuple[str, str], RankGrid] = {}
        self._dense: dict[str, float] = {}

    def dense_ms(self, site: Site) -> float:
        """Median milliseconds of a site's dense layers, all their calls together."""
        if site.name not in self._dense:
            found = self.time(site, [Chain()], rounds=GRID_ROUNDS)[Chain()]
            self._dense[site.name] = found.latency_ms.median
        return self._dense[site.name]

    def to_dict(self, sites: Sequence[Site]) -> dict[str, Any]:
        """Every grid and dense time as JSON, for processes that are to price alike."""
        grids = [
            [site.name, repr(method), [v.tolist() for v in grid.values], _listed(grid.latency_ms)]
            for site in sites
            for method in site.methods
            for grid in [self.grid(site, method)]
        ]
        return {"dense": {site.name: self.dense_ms(site) for site in sites}, "grids": grids}

    def restore(self, times: Mapping[str, Any]) -> None:
        """Take the times of `to_dict` for one's own; what they hold is not measured here."""
        self._dense.update(times["dense"])
        for site, method, values, latency in times["grids"]:
            found = np.array([np.inf if x is None else x for x in latency])
            ranks = tuple(np.array(axis, dtype=np.int64) for axis in values)
            self._grids[site, method] = RankGrid(ranks, found.reshape([len(a) for a in ranks]))

    def time(
        self, site: Site, chains: Iterable[Chain], *, rounds: int | None = None
    ) -> dict[Chain, LayerTime]:
        """Times of chains of one site, all calls of all its layers together.

        Args:
            site: The site.
            chains: What to time; a chain without a method is the dense layer.
            rounds: Fewer than the table's own, for a first look.

        Returns:
            A time for every chain that could be run.
        """
        wanted = list(chains)
        total: dict[Chain, LayerTime] = {}
        gone: set[Chain] = set()
        for layer in site.layers:
            for call, times in Counter(self.calls.get(layer.name, ())).items():
                found = self.table.time(
                    layer,
                    call,
                    wanted,
                    device=self.device,
                    rounds=rounds,
                    between=self.check,
                )
                gone |= set(wanted) - set(found)
                for chain, measured in found.items():
                    for _ in range(times):
                        total[chain] = total[chain] + measured if chain in total else measured
        return {chain: measured for chain, measured in total.items() if chain not in gone}

    def price(self, site: Site, method: Decomposition, ranks: Sequence[Any]) -> Any:
        """Milliseconds at `ranks`: those of the next larger ranks of the method's grid."""
        return self.grid(site, method).price(ranks)

    def grid(self, site: Site, method: Decomposition) -> RankGrid:
        """The timed ranks of one method, measured on first use."""
        key = (site.name, repr(method))
        if key not in self._grids:
            self._grids[key] = self._measured(site, method)
        return self._grids[key]

    def prepare(self, sites: Sequence[Site], *, progress: bool | None = None) -> None:
        """Measure every grid now, under a progress bar; each layer's chains run interleaved."""
        with progress_bar("timing layers", len(sites), enabled=progress) as advance:
            for site in sites:
                chains = [Chain()]
                for method in site.methods:
                    chains += [chain for chain, _ in self._choices(site, method)[1]]
                self.time(site, chains, rounds=GRID_ROUNDS)
                for method in site.methods:
                    self.grid(site, method)
                advance()

    def _measured(self, site: Site, method: Decomposition) -> RankGrid:
        values, choices = self._choices(site, method)
        latency = np.full([len(axis) for axis in values], np.inf)
        wanted = [Chain(), *(chain for chain, _ in choices)]
        found = self.time(site, wanted, rounds=GRID_ROUNDS)
        dense = found[Chain()].latency_ms.median
        for chain, place in choices:
            if chain in found:  # against the dense time of the same rounds
                latency[place] = found[chain].ratio.median * dense
        return RankGrid(values, latency)

    def _choices(
        self, site: Site, method: Decomposition
    ) -> tuple[tuple[npt.NDArray[np.int64], ...], list[tuple[Chain, tuple[int, ...]]]]:
        """The values of each rank axis, and the chains worth timing with their places."""
        axes = method.rank_axes(site.layer)
        count = GRID_COUNTS.get(len(axes), 3)
        values = tuple(grid_values(axis.maximum, count, self.step(axis)) for axis in axes)
        choices = []
        for place in np.ndindex(*(len(axis) for axis in values)):
            ranks = tuple(int(axis[i]) for axis, i in zip(values, place, strict=True))
            shares = [rank / axis.maximum for rank, axis in zip(ranks, axes, strict=True)]
            work = sum(float(method.macs(layer, ranks)) for layer in site.layers)
            # A mode at full rank costs no factor, so any other rank may go with it.
            balanced = max(shares) == 1.0 or max(shares) <= MAX_ASPECT * min(shares)
            if balanced and work <= MAX_WORK * site.cost["macs"]:
                choices.append((Chain(method, ranks), place))
        return values, choices


def _listed(values: npt.NDArray[np.float64]) -> list[float | None]:
    """Flat, rounded to a tenth of a microsecond; JSON has no infinity."""
    return [round(x, 4) if np.isfinite(x) else None for x in values.ravel().tolist()]

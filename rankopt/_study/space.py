"""Search spaces of a study: a few numbers in, one option per site out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from rankopt._model.layers import Layer
from rankopt.budget import RATIO_AXES, Budget
from rankopt.errors import BudgetInfeasible, StudyError
from rankopt.strategy import LATENCY, Option, Problem
from rankopt.strategy.allocation import choose, damage, menu, sensitivities

__all__ = ["SIZE", "SIZE_INDEX", "SPACES", "LayerSpace", "Space", "StageSpace", "WarpSpace"]

Array = npt.NDArray[np.float64]
# How far below a budget, and down to which share without one, the warp looks.
LOOK_BELOW: Final = 1 / 3
SMALLEST_SHARE: Final = 0.1
# Largest weight of a feature, as a logarithm: damages move by up to e^2, seven times.
STRETCH: Final = 2.0
CURVES: Final = (0.5, 1.5)
SIZE: Final = "size"
# Instead of it, where plans end at given sizes: which of them.
SIZE_INDEX: Final = "size_index"


class Space(ABC):
    """Maps parameters of a trial to options and back.

    Args:
        problem: The model at hand.
        axis: The figure the study makes small.
        spec: As `describe` gave it when the study was made; None for a new study.
    """

    kind: ClassVar[str]
    # Shares of the original's figure at which all plans end; none for any share.
    sizes: tuple[float, ...] = ()
    # What trials choose about the making of factors, in words.
    switches: tuple[str, ...] = ()

    def __init__(self, problem: Problem, axis: str, spec: Mapping[str, Any] | None = None) -> None:
        self.axis = axis
        self.shares = _shares(problem)
        # Menus and loads count the study's axis, and every axis that is bounded.
        limits = Budget.from_dict({axis: 1.0, **self.shares})
        self.problem = problem.with_budget(limits)
        self.problem.prepare()
        self.menus = [menu(self.problem, site) for site in self.problem.sites]
        load = self.problem.load
        self._loads = [
            np.array([load(option.cost) / load(site.cost) for option in options])
            for site, options in zip(self.problem.sites, self.menus, strict=True)
        ]
        self._prepare(spec or {})
        names = [site.name for site in self.problem.sites]
        if spec is not None and list(spec.get("sites", names)) != names:
            raise StudyError(
                f"the study searches other layers ({', '.join(spec['sites'][:4])}, …) than this "
                f"request ({', '.join(names[:4])}, …): give the same only=, ignore= and methods="
            )

    @abstractmethod
    def _prepare(self, spec: Mapping[str, Any]) -> None:
        """Read or compute what the space needs beyond the menus."""

    @property
    @abstractmethod
    def bounds(self) -> dict[str, tuple[float, float]]:
        """Name to (low, high) of every parameter, all of them real numbers."""

    @abstractmethod
    def options(self, params: Mapping[str, float]) -> list[Option]:
        """One option per site."""

    @abstractmethod
    def encode(self, options: Sequence[Option]) -> dict[str, float]:
        """The parameters whose options are nearest to these."""

    def own(self, options: Sequence[Option]) -> list[Option]:
        """Options of another strategy as this space would make them."""
        return list(options)

    def switched_on(self, options: Sequence[Option]) -> list[Option]:
        """Options of another strategy with every choice of `switches` taken."""
        return list(options)

    def describe(self) -> dict[str, Any]:
        """JSON from which another process makes the same space."""
        return {"kind": self.kind, "sites": [site.name for site in self.problem.sites]}

    def nearest(self, site: int, share: float) -> Option:
        """The option of a site whose load is nearest to a share of the dense load."""
        return self.menus[site][int(np.argmin(np.abs(self._loads[site] - share)))]

    def share(self, site: int, option: Option) -> float:
        """Load of an option as a share of its site's dense load, at most 1."""
        load = self.problem.load
        return min(1.0, float(load(option.cost) / load(self.problem.sites[site].cost)))


class LayerSpace(Space):
    """One share per site: free, and as large as the model is deep."""

    kind: ClassVar[str] = "layer"

    def _groups(self) -> list[str]:
        return [site.name for site in self.problem.sites]

    def _prepare(self, spec: Mapping[str, Any]) -> None:
        self._names = [f"share:{group or 'root'}" for group in self._groups()]

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        return dict.fromkeys(self._names, (0.0, 1.0))

    def options(self, params: Mapping[str, float]) -> list[Option]:
        return [self.nearest(index, params[name]) for index, name in enumerate(self._names)]

    def encode(self, options: Sequence[Option]) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for index, (name, option) in enumerate(zip(self._names, options, strict=True)):
            found.setdefault(name, []).append(self.share(index, option))
        return {name: float(np.mean(shares)) for name, shares in found.items()}


class StageSpace(LayerSpace):
    """One share per stage, which is a part of the model with a name of its own."""

    kind: ClassVar[str] = "stage"

    def _groups(self) -> list[str]:
        return stages([site.name for site in self.problem.sites])


class WarpSpace(Space):
    """A warp of the knapsack: its size, and multipliers over the layers' sensitivities.

    The options are those of least total damage Σ s_i^power · exp(Σ_k a_k φ_k(i)) · d_i^curve
    within a share `size` of the original's figure. Here d_i is an option's damage, s_i the
    measured sensitivity of its site (with calibration inputs), and φ_k says where the
    layer is: depth, bend (middle against ends), cost and kernel. With all a_k = 0,
    power 1/2 and curve 1 it is the plan of `knapsack`.
    """

    kind: ClassVar[str] = "warp"

    def _prepare(self, spec: Mapping[str, Any]) -> None:
        known = spec.get("sensitivities", ...)
        found = sensitivities(self.problem, self.menus) if known is ... else known
        self.sensitivities = None if found is None else [float(value) for value in found]
        self._damages = [np.array([damage(o) for o in options]) for options in self.menus]
        self._features = _features([s.layer for s in self.problem.sites], self._dense())
        problem, axis = self.problem, self.axis
        self._cheapest = [min(menu, key=lambda o: problem.load(o.cost)) for menu in self.menus]
        least = problem.figures(self._cheapest)[axis] / problem.totals[axis]
        high = self.shares.get(axis, 1.0)
        floor = high * LOOK_BELOW if axis in self.shares else SMALLEST_SHARE
        low = max(least, floor)
        if least >= high >= 1:
            raise BudgetInfeasible(
                f"no decomposition makes this model's {axis} smaller, so there is nothing to "
                "search for: the dense model is the right answer",
                {axis: least},
            )
        if low >= high:
            raise problem.infeasible(self._cheapest)
        self._size = tuple(spec.get("size", (low, high)))

    def _dense(self) -> Array:
        return np.array([site.cost[self.axis] for site in self.problem.sites], dtype=np.float64)

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        made = {SIZE: (float(self._size[0]), float(self._size[1])), "curve": CURVES}
        if self.sensitivities is not None:
            made["power"] = (0.0, 1.0)
        return {**made, **dict.fromkeys(self._features, (-STRETCH, STRETCH))}

    def options(self, params: Mapping[str, float]) -> list[Option]:
        tilt = sum((params[name] * values for name, values in self._features.items()), np.zeros(1))
        weights = np.exp(np.broadcast_to(tilt, len(self.menus)))
        if self.sensitivities is not None:
            weights = weights * np.array(self.sensitivities) ** params["power"]
        damages = [w * d ** params["curve"] for w, d in zip(weights, self._damages, strict=True)]
        ratios = {**self.shares, self.axis: params[SIZE]}
        found = choose(self.problem, self.menus, damages, ratios, exact=False)
        return self._cheapest if found is None else found[0]

    def encode(self, options: Sequence[Option]) -> dict[str, float]:
        bounds = self.bounds
        share = self.problem.figures(options)[self.axis] / self.problem.totals[self.axis]
        params = dict.fromkeys(bounds, 0.0)
        params[SIZE] = min(max(share, bounds[SIZE][0]), bounds[SIZE][1])
        params["curve"] = 1.0
        powers = (0.5, 0.0, 1.0) if "power" in bounds else (0.0,)
        wanted = np.array([self.share(i, option) for i, option in enumerate(options)])

        def distance(power: float) -> float:
            made = self.options({**params, "power": power})
            found = np.array([self.share(i, option) for i, option in enumerate(made)])
            return float(np.abs(found - wanted).sum())

        if "power" in bounds:
            params["power"] = min(powers, key=distance)
        return params

    def describe(self) -> dict[str, Any]:
        return {
            **super().describe(),
            "size": list(self._size),
            "sensitivities": self.sensitivities,
        }


class TiltSpace(WarpSpace):
    """A warp with one more multiplier per site, for steps from plans that are good already.

    The options are those of least total damage Σ s_i^power · exp(t_i) · d_i^curve within a
    share `size`; every point uses up its size, whatever the t_i.
    """

    kind: ClassVar[str] = "tilt"

    def _prepare(self, spec: Mapping[str, Any]) -> None:
        super()._prepare(spec)
        sites = self.problem.sites
        self._features = {
            f"tilt:{site.name or 'root'}": np.eye(len(sites))[index]
            for index, site in enumerate(sites)
        }


SPACES: Final[dict[str, type[Space]]] = {
    space.kind: space for space in (WarpSpace, TiltSpace, StageSpace, LayerSpace)
}


def _shares(problem: Problem) -> dict[str, float]:
    """Axis to the bounded share; milliseconds as a share of the dense model's."""
    budget = problem.budget
    if budget is None:
        return {}
    found = {axis: budget.ratio(axis) for axis in budget.axes if axis in RATIO_AXES}
    if budget.latency_ms is not None:
        share = budget.latency_ms / problem.totals[LATENCY]
        found[LATENCY] = min(share, found.get(LATENCY, 1.0))
    return found


def stages(names: Sequence[str]) -> list[str]:
    """The stage of each layer: name prefixes, refined until none holds over half the layers.

    Example:
        >>> stages(["stem", "body.0.a", "body.0.b", "body.1.a", "head"])
        ['stem', 'body.0', 'body.0', 'body.1', 'head']
    """
    depth = dict.fromkeys(names, 1)
    while True:
        found = {name: ".".join(name.split(".")[: depth[name]]) for name in names}
        stage, size = Counter(found.values()).most_common(1)[0]
        members = [name for name in names if found[name] == stage]
        splits = any(len(name.split(".")) > depth[name] for name in members)
        if 2 * size <= len(names) or not splits:
            return [found[name] for name in names]
        for name in members:
            depth[name] += 1


def _features(layers: Sequence[Layer], dense: Array) -> dict[str, Array]:
    """Where each layer is, each feature within [-1, 1]; constant ones are left out."""
    depth = np.linspace(-1.0, 1.0, len(layers)) if len(layers) > 1 else np.zeros(1)
    sizes = np.log(np.maximum(dense, 1.0))
    spread = float(np.ptp(sizes))
    found = {
        "depth": depth,
        "bend": 2 * depth**2 - 1,
        "cost": (2 * (sizes - sizes.min()) / spread - 1) if spread > 0 else np.zeros(len(layers)),
        "kernel": np.array([1.0 if math.prod(x.kernel) > 1 else -1.0 for x in layers]),
    }
    return {name: values for name, values in found.items() if np.ptp(values) > 0}

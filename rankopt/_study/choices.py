"""Spaces around another one: trials that choose how factors are made, or end at given sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from rankopt._study.space import SIZE, SIZE_INDEX, SPACES, Space
from rankopt.errors import StudyError
from rankopt.strategy import Option, Problem

__all__ = ["InOrderSpace", "SizedSpace", "SwitchedSpace", "make_space"]

# The parameters that switch a choice on, where they do, and how near to that plans are put.
FISHER: Final = "fisher"
ASYMMETRIC: Final = "asymmetric"
SWITCH: Final = 0.5
NEAR_SWITCH: Final = 0.05


class SwitchedSpace(Space):
    """Another space, and whether factors weigh outputs by the Fisher information.

    Args:
        problem: The model at hand.
        axis: The figure the study makes small.
        spec: As `describe` gave it; for a new study the kind of the other space alone.
    """

    def __init__(self, problem: Problem, axis: str, spec: Mapping[str, Any]) -> None:
        kind = SPACES[spec["kind"]]
        weighed = spec.get(FISHER)
        made = spec if weighed is not None else None
        self._plain = kind(problem, axis, made)
        self._weighed = kind(problem.with_factors(fisher=True), axis, weighed)
        self.problem, self.axis, self.shares = self._plain.problem, axis, self._plain.shares
        self.switches = (FISHER,)

    def _prepare(self, spec: Mapping[str, Any]) -> None:
        """Both spaces have prepared what they need."""

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        return {**self._weighed.bounds, **self._plain.bounds, FISHER: (0.0, 1.0)}

    def options(self, params: Mapping[str, float]) -> list[Option]:
        space = self._weighed if params[FISHER] >= SWITCH else self._plain
        return space.options(params)

    def encode(self, options: Sequence[Option]) -> dict[str, float]:
        weighs = any(option.factors.fisher for option in options)
        space, side = (self._weighed, 1) if weighs else (self._plain, -1)
        # Near the switch: a small step may try the other side.
        return {**space.encode(options), FISHER: SWITCH + side * NEAR_SWITCH}

    def describe(self) -> dict[str, Any]:
        return {**self._plain.describe(), FISHER: self._weighed.describe()}


class InOrderSpace(Space):
    """Another space whose factors are fitted in order, or whose trials choose that.

    Args:
        inner: The other space.
        searched: Whether trials choose.
    """

    def __init__(self, inner: Space, *, searched: bool) -> None:
        self._inner, self._searched = inner, searched
        self.problem, self.axis, self.shares = inner.problem, inner.axis, inner.shares
        self.sizes = inner.sizes
        self.switches = (*inner.switches, ASYMMETRIC) if searched else inner.switches

    def _prepare(self, spec: Mapping[str, Any]) -> None:
        """The other space has prepared what it needs."""

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        switch = {ASYMMETRIC: (0.0, 1.0)} if self._searched else {}
        return {**self._inner.bounds, **switch}

    def options(self, params: Mapping[str, float]) -> list[Option]:
        options = self._inner.options(params)
        if self._searched and params[ASYMMETRIC] < SWITCH:
            return options
        return _in_order(options)

    def encode(self, options: Sequence[Option]) -> dict[str, float]:
        params = self._inner.encode(options)
        if self._searched:
            side = 1 if any(option.factors.asymmetric for option in options) else -1
            params[ASYMMETRIC] = SWITCH + side * NEAR_SWITCH
        return params

    def own(self, options: Sequence[Option]) -> list[Option]:
        return list(options) if self._searched else _in_order(options)

    def switched_on(self, options: Sequence[Option]) -> list[Option]:
        return _in_order(options)

    def describe(self) -> dict[str, Any]:
        return self._inner.describe()


class SizedSpace(Space):
    """Another space whose plans end at given sizes, as many trials at one as at another.

    Args:
        inner: The other space; it has a parameter `size`.
        sizes: Shares of the original's figure.
    """

    def __init__(self, inner: Space, sizes: Sequence[float]) -> None:
        self._inner = inner
        self.problem, self.axis, self.shares = inner.problem, inner.axis, inner.shares
        if SIZE not in inner.bounds:
            raise StudyError("sizes= needs a space with a size: 'warp' or 'tilt'")
        self.switches = inner.switches
        self.sizes = tuple(sorted({float(size) for size in sizes}))
        middle = {name: sum(ends) / 2 for name, ends in inner.bounds.items()}
        cheapest = self.problem.figures(inner.options({**middle, SIZE: 0.0}))
        low = cheapest[self.axis] / self.problem.totals[self.axis]
        high = self.shares.get(self.axis, 1.0)
        for size in self.sizes:
            if not low <= size <= high:
                raise StudyError(
                    f"sizes={list(self.sizes)}: {size:g} is not between {low:.3g}, the smallest "
                    f"plan this study can make, and {high:.3g} of the {self.axis}"
                )

    def _prepare(self, spec: Mapping[str, Any]) -> None:
        """The other space has prepared what it needs."""

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        others = {name: ends for name, ends in self._inner.bounds.items() if name != SIZE}
        return {**others, SIZE_INDEX: (0.0, float(len(self.sizes)))}

    def options(self, params: Mapping[str, float]) -> list[Option]:
        index = min(int(params[SIZE_INDEX]), len(self.sizes) - 1)
        return self._inner.options({**params, SIZE: self.sizes[index]})

    def encode(self, options: Sequence[Option]) -> dict[str, float]:
        params = self._inner.encode(options)
        nearest = int(np.argmin(np.abs(np.array(self.sizes) - params.pop(SIZE))))
        return {**params, SIZE_INDEX: nearest + 0.5}

    def own(self, options: Sequence[Option]) -> list[Option]:
        return self._inner.own(options)

    def switched_on(self, options: Sequence[Option]) -> list[Option]:
        return self._inner.switched_on(options)

    def describe(self) -> dict[str, Any]:
        return {**self._inner.describe(), "sizes": list(self.sizes)}


def _in_order(options: Sequence[Option]) -> list[Option]:
    return [option.in_order() for option in options]


def make_space(
    kind: str,
    problem: Problem,
    axis: str,
    spec: Mapping[str, Any] | None = None,
    *,
    switched: bool = False,
    asymmetric: bool | str = False,
    sizes: Sequence[float] | None = None,
) -> Space:
    """The space called `kind`; `StudyError` for an unknown one.

    Args:
        kind: One of `SPACES`.
        problem: The model at hand.
        axis: The figure the study makes small.
        spec: As `Space.describe` gave it; None for a new study.
        switched: Whether trials choose to weigh outputs, see `SwitchedSpace`.
        asymmetric: Whether factors are fitted in order; ``search`` lets trials choose.
        sizes: See `SizedSpace`; None for those of `spec`, if it has any.
    """
    if not isinstance(kind, str) or kind not in SPACES:
        raise StudyError(f"space={kind!r}: expected one of {', '.join(SPACES)}")
    space: Space
    if switched:
        space = SwitchedSpace(problem, axis, spec or {"kind": kind})
    else:
        space = SPACES[kind](problem, axis, spec)
    sizes = sizes or (spec or {}).get("sizes")
    if sizes:
        space = SizedSpace(space, sizes)
    return InOrderSpace(space, searched=asymmetric == "search") if asymmetric else space

"""Schedules of freezing: which factors of a decomposed layer train in which phase.

References: fixed freezing, arXiv 2407.20266 §2.2; sequential freezing, 2309.03824; the
front of the network as training ends, 1706.04983.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from rankopt._utils.arguments import check_integer

__all__ = ["FREEZING", "FactorsUntil", "Fixed", "NoFreezing", "Roles", "Schedule", "Sequential"]

Roles = frozenset[str]
_OUTER: Final = frozenset({"first", "last"})


class Schedule(ABC):
    """Which roles of a decomposed layer are frozen in which phase.

    A phase is a counter: of epochs, or of anything else the caller counts.
    Biases, norms and layers that were kept always train, and so does a chain of
    one factor, but for those in a front that is frozen (see `front`).
    """

    def __repr__(self) -> str:
        """What it was made with: a checkpoint is told apart by this."""
        settings = ", ".join(f"{name}={value!r}" for name, value in sorted(vars(self).items()))
        return f"{type(self).__qualname__}({settings})"

    @abstractmethod
    def frozen(self, phase: int, roles: Roles) -> Roles:
        """The roles to freeze.

        Args:
            phase: From 0.
            roles: The roles among ``first``, ``core`` and ``last`` the layer has.
        """

    def fronts(self, phase: int) -> frozenset[str]:
        """Names of modules up to which, and including which, nothing trains; none by default.

        Args:
            phase: From 0.
        """
        return frozenset()

    def modules(self) -> frozenset[str]:
        """Names of all modules that `fronts` gives in any phase, to be looked up beforehand."""
        return frozenset()

    def every(self, count: int) -> Schedule:
        """The same schedule with phases `count` times as long.

        Example:
            >>> slow = Sequential().every(3)
            >>> [sorted(slow.frozen(t, frozenset({"first", "last"}))) for t in (0, 2, 3)]
            [['first'], ['first'], ['last']]
        """
        return _Every(self, count)

    def until(self, phase: int, then: Schedule | None = None) -> Schedule:
        """The same schedule before `phase` and another from it on; None trains everything.

        Example:
            >>> schedule = Fixed().until(8)
            >>> schedule.frozen(8, frozenset({"first", "last"}))
            frozenset()
        """
        return _Until(self, phase, then or NoFreezing())

    def front(self, module: str, start: int, end: int | None = None) -> Schedule:
        """The same schedule, and in some phases the front of the network does not train at all.

        A backward pass then ends behind it, which can save more than frozen factors do, most of all
        in convolutional networks, whose first layers see the most pixels. It does not end there if
        something in the front has to train as it is used again later, such as tied embeddings.

        Args:
            module: The last module of the front. All that was registered before it belongs to
                the front too, weights, biases and norms, decomposed or not, and the parameters of
                their own of the modules that contain it. Registered, not executed: models
                whose modules run in another order save less, or freeze what should train.
            start: The first phase in which it is frozen.
            end: The first phase in which it trains again; None for never.

        Example:
            >>> schedule = Sequential().front("layer1", 0, 5).front("layer2", 13)
            >>> [sorted(schedule.fronts(t)) for t in (4, 5, 13)]
            [['layer1'], [], ['layer2']]
        """
        return _Front(self, module, start, end)


@dataclass(frozen=True)
class NoFreezing(Schedule):
    """Everything trains."""

    def frozen(self, phase: int, roles: Roles) -> Roles:
        """Nothing."""
        return frozenset()


@dataclass(frozen=True)
class Fixed(Schedule):
    """The first factor of a pair and both outer ones around a core never train."""

    def frozen(self, phase: int, roles: Roles) -> Roles:
        """The same roles in every phase."""
        if "core" in roles:
            return roles & _OUTER
        return frozenset({"first"}) if roles == _OUTER else frozenset()


@dataclass(frozen=True)
class Sequential(Schedule):
    """Factors take turns: the core and the outer factors, or the last and the first.

    Args:
        parity: The phases, even (0) or odd (1), in which the core, or the last
            factor of a pair, trains.
    """

    parity: Literal[0, 1] = 0

    def __post_init__(self) -> None:
        if self.parity not in (0, 1):
            raise ValueError(f"parity={self.parity!r}: expected 0 or 1")

    def frozen(self, phase: int, roles: Roles) -> Roles:
        """One half in even phases, the other in odd ones."""
        one = roles & (frozenset({"core"}) if "core" in roles else frozenset({"last"}))
        other = roles - one
        if not one or not other:
            return frozenset()
        return other if phase % 2 == self.parity else one


@dataclass(frozen=True)
class _Every(Schedule):
    schedule: Schedule
    count: int

    def __post_init__(self) -> None:
        check_integer("count", self.count, 1)

    def __repr__(self) -> str:
        return f"{self.schedule!r}.every({self.count})"

    def frozen(self, phase: int, roles: Roles) -> Roles:
        return self.schedule.frozen(phase // self.count, roles)

    def fronts(self, phase: int) -> frozenset[str]:
        return self.schedule.fronts(phase // self.count)

    def modules(self) -> frozenset[str]:
        return self.schedule.modules()


@dataclass(frozen=True)
class _Until(Schedule):
    schedule: Schedule
    phase: int
    then: Schedule

    def __post_init__(self) -> None:
        check_integer("phase", self.phase, 0)

    def __repr__(self) -> str:
        then = "" if self.then == NoFreezing() else f", {self.then!r}"
        return f"{self.schedule!r}.until({self.phase}{then})"

    def frozen(self, phase: int, roles: Roles) -> Roles:
        schedule, phase = self._at(phase)
        return schedule.frozen(phase, roles)

    def fronts(self, phase: int) -> frozenset[str]:
        schedule, phase = self._at(phase)
        return schedule.fronts(phase)

    def modules(self) -> frozenset[str]:
        return self.schedule.modules() | self.then.modules()

    def _at(self, phase: int) -> tuple[Schedule, int]:
        """The schedule that counts in `phase`, and how it counts it."""
        if phase < self.phase:
            return self.schedule, phase
        return self.then, phase - self.phase


@dataclass(frozen=True)
class _Front(Schedule):
    schedule: Schedule
    module: str
    start: int
    end: int | None

    def __post_init__(self) -> None:
        if not isinstance(self.module, str) or not self.module:
            raise ValueError(f"module={self.module!r}: expected the name of a module")
        check_integer("start", self.start, 0)
        if self.end is not None:
            check_integer("end", self.end, self.start + 1)

    def __repr__(self) -> str:
        end = "" if self.end is None else f", {self.end}"
        return f"{self.schedule!r}.front({self.module!r}, {self.start}{end})"

    def frozen(self, phase: int, roles: Roles) -> Roles:
        return self.schedule.frozen(phase, roles)

    def fronts(self, phase: int) -> frozenset[str]:
        found = self.schedule.fronts(phase)
        frozen = phase >= self.start and (self.end is None or phase < self.end)
        return found | {self.module} if frozen else found

    def modules(self) -> frozenset[str]:
        return self.schedule.modules() | {self.module}


@dataclass(frozen=True)
class FactorsUntil(Schedule):
    """Every factor trains from a phase on; fronts are those of the schedule all the same.

    Args:
        schedule: Any.
        phase: The first one in which no factor is frozen.
    """

    schedule: Schedule
    phase: int

    def frozen(self, phase: int, roles: Roles) -> Roles:
        """Those of the schedule before the phase."""
        return self.schedule.frozen(phase, roles) if phase < self.phase else frozenset()

    def fronts(self, phase: int) -> frozenset[str]:
        """Those of the schedule."""
        return self.schedule.fronts(phase)

    def modules(self) -> frozenset[str]:
        """Those of the schedule."""
        return self.schedule.modules()


FREEZING: Final[Mapping[str, Callable[[], Schedule]]] = {
    "none": NoFreezing,
    "fixed": Fixed,
    "sequential": Sequential,
}

"""What a strategy must be; `Problem`, `Site` and `Option` are what it sees.

A strategy is a frozen dataclass of settings with one method that turns a
`Problem` into a `RankPlan`. It chooses one `Option` for each `Site`; pricing,
factorising and writing the plan are the problem's work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, ClassVar

from rankopt._utils.arguments import is_number
from rankopt.plan import RankPlan
from rankopt.strategy.problem import Problem

__all__ = ["Strategy", "Tags", "check_share", "check_timeout"]


@dataclass(frozen=True)
class Tags:
    """What a strategy promises and needs; the contract's checks follow them.

    Args:
        deterministic: The same seed gives the same decisions.
        monotone: A looser budget never gives a larger total error.
        unbudgeted: ``search(model, None)`` has a natural answer.
        metric_drop: Solves budgets on ``metric_drop`` itself; for the others `search`
            bisects.
        latency: Holds budgets on measured time itself; for the others `search` corrects
            the target until the built model is fast enough.
        needs: Any of ``calibration``, ``evaluate``, ``latency``.
    """

    deterministic: bool = True
    monotone: bool = True
    unbudgeted: bool = True
    metric_drop: bool = False
    latency: bool = False
    needs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if isinstance(self.needs, str):
            raise ValueError(f"needs={self.needs!r}: expected a set of names, {{{self.needs!r}}}")
        object.__setattr__(self, "needs", frozenset(self.needs))


class Strategy(ABC):
    """One way to choose ranks: a frozen dataclass of settings and `search`.

    Class attributes:
        name: As in the registry and in plans.
        tags: What it promises by default; see `Tags` and `promises`.
        methods: Decompositions it chooses from unless `search` is given others;
            a strategy that does not choose takes the first that applies.

    Check a new one with `rankopt.testing.check_strategy`.
    """

    name: ClassVar[str]
    tags: ClassVar[Tags] = Tags()
    methods: ClassVar[tuple[str, ...]] = ("svd", "tucker2", "spatial_svd")

    @property
    def promises(self) -> Tags:
        """What it promises with these settings: `tags`, unless a setting changes it."""
        return self.tags

    @abstractmethod
    def search(self, problem: Problem) -> RankPlan:
        """Choose an option for each site and return ``problem.plan(self, options)``.

        Args:
            problem: The model and budget at hand; it must not be changed.

        Raises:
            BudgetInfeasible: No choice meets the budget.
        """

    def describe(self, seed: int) -> dict[str, Any]:
        """Name, settings and seed, as they stand in the plan."""
        settings: dict[str, Any] = asdict(self) if is_dataclass(self) else {}
        return {"name": self.name, "settings": settings, "seed": seed}


def check_timeout(timeout: float | None) -> None:
    """Raise ValueError unless `timeout` is None or a number of seconds; infinity is no limit."""
    if timeout is None:
        return
    number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if not number or not timeout >= 0:  # true for NaN
        raise ValueError(f"timeout={timeout!r}: expected seconds, at least 0, or None")


def check_share(name: str, value: float, *, low: float = 0.0, high: float = 1.0) -> None:
    """Raise ValueError unless `value` is a finite number in [low, high]."""
    if not is_number(value) or not low <= value <= high:
        raise ValueError(f"{name}={value!r}: expected a number from {low:g} to {high:g}")

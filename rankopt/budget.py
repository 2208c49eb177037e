"""What a compressed model may cost: parse, check and explain budgets."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Final

from rankopt.errors import BudgetError

__all__ = ["Budget", "check_inputs"]

RATIO_AXES: Final = ("params", "macs", "memory", "latency")
_DEPENDS: Final = {
    "macs": "MACs depend",
    "latency": "time depends",
    "latency_ms": "time depends",
}
_NUMBER = re.compile(r"^\d+(\.\d*)?([eE][+-]?\d+)?$|^\.\d+([eE][+-]?\d+)?$")
_COUNT = re.compile(r"^[\d.]+\s*([kKmMgGtT]i?)?[bB]?$")
# What follows a bound where another one begins without a comma.
_SEVERAL = re.compile(r"[;=<>]|\band\b")
_SHARES: Final = "budgets are shares of the original model's figure, not counts"
_SPELLINGS: Final = (
    "'params<=50%', 'macs<=50%', 'memory<=50%', 'latency<=70%', 'latency_ms<=8' "
    "or 'metric_drop<=0.01, minimize=latency'"
)


@dataclass(frozen=True)
class Budget:
    """Upper bounds on the figures of a compressed model.

    `params`, `macs`, `memory` and `latency` are ratios in (0, 1] of the
    *whole original model's* figure, kept layers included; `latency_ms` is
    absolute, in milliseconds; `metric_drop` is in the unit of the user's
    `evaluate` and needs `minimize`, the figure to make small.

    Args:
        params: Largest share of the original's unique parameters.
        macs: Largest share of the original's multiply-accumulates
            (conv, linear and attention matmuls for one `example_inputs`).
        memory: Largest share of the original's parameter and buffer bytes.
        latency: Largest share of the original's measured latency.
        latency_ms: Largest measured latency, milliseconds.
        metric_drop: Largest loss in the user's metric.
        minimize: With `metric_drop`: one of params, macs, memory, latency.
        direction: With `metric_drop`: whether the metric is better when
            higher (``"maximize"``, the default) or lower (``"minimize"``).

    Raises:
        BudgetError: A value out of range, or nothing bounded at all.

    Example:
        >>> Budget.parse("macs<=50%, params<=0.4").explain()
        'params at most 40% and macs at most 50% of the original model'
    """

    params: float | None = None
    macs: float | None = None
    memory: float | None = None
    latency: float | None = None
    latency_ms: float | None = None
    metric_drop: float | None = None
    minimize: str | None = None
    direction: str = "maximize"

    def __post_init__(self) -> None:
        for axis in (*RATIO_AXES, "latency_ms", "metric_drop"):
            value = getattr(self, axis)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Real):
                raise BudgetError(f"budget {axis}={value!r}: expected a number")
            value = float(value)
            if not math.isfinite(value):
                raise BudgetError(f"budget {axis}={value!r}: expected a finite number")
            object.__setattr__(self, axis, value)
            if axis in RATIO_AXES and not 0 < value <= 1:
                hint = f"for {value:g} percent write '{axis}<={value:g}%'"
                if not 0 < value <= 100:
                    hint = f"{_SHARES}: write '{axis}<=50%' for half of it"
                raise BudgetError(
                    f"budget {axis}={value:g}: a share of the original model lies in (0, 1]; {hint}"
                )
            if axis == "latency_ms" and value <= 0:
                raise BudgetError(f"budget latency_ms={value:g}: milliseconds are positive")
            if axis == "metric_drop" and value < 0:
                raise BudgetError(f"budget metric_drop={value:g}: a drop is at least 0")
        if not self.axes:
            raise BudgetError(f"an empty budget bounds nothing; write one of {_SPELLINGS}")
        if (self.metric_drop is None) != (self.minimize is None):
            raise BudgetError(
                "metric_drop and minimize go together: "
                "'metric_drop<=0.01, minimize=latency' asks for the fastest model that loses "
                "at most 0.01"
            )
        if self.minimize is not None and self.minimize not in RATIO_AXES:
            raise BudgetError(
                f"minimize={self.minimize!r}: expected one of {', '.join(RATIO_AXES)}"
            )
        if self.direction not in ("maximize", "minimize"):
            raise BudgetError(f"direction={self.direction!r}: expected 'maximize' or 'minimize'")
        if self.direction != "maximize" and self.metric_drop is None:
            raise BudgetError(
                f"direction={self.direction!r} is of a metric, which only metric_drop bounds"
            )

    @classmethod
    def parse(cls, spec: object) -> Budget | None:
        """Read a budget as users write it.

        Args:
            spec: A `Budget`, a string such as ``"macs<=50%, params<=0.4"``, or
                None, which leaves the amount to the strategy.

        Raises:
            BudgetError: Anything else; a bare number names no unit, so it is
                refused with the spellings it could have meant.

        Example:
            >>> Budget.parse("latency_ms<=8")
            Budget(latency_ms=8.0)
        """
        if spec is None or isinstance(spec, Budget):
            return spec
        if isinstance(spec, (int, float)):
            raise BudgetError(f"budget {spec!r} does not say of what; write {_SPELLINGS}")
        if not isinstance(spec, str):
            raise BudgetError(
                f"a budget is a string, a rankopt.Budget or None, not {type(spec).__name__}"
            )
        values: dict[str, Any] = {}
        for clause in spec.split(","):
            axis, value = cls._parse_clause(clause.strip(), spec)
            if axis in values:
                raise BudgetError(f"budget {spec!r} bounds {axis} twice")
            values[axis] = value
        return cls(**values)

    @staticmethod
    def _parse_clause(clause: str, spec: str) -> tuple[str, float | str]:
        if _NUMBER.match(clause.rstrip("%").strip()):
            raise BudgetError(f"budget {clause!r} does not say of what; write {_SPELLINGS}")
        name, relation, text = (part.strip() for part in _split_relation(clause, spec))
        written, name = name, name.lower().replace("minimise", "minimize")
        if _SEVERAL.search(text):
            raise BudgetError(f"budget {spec!r}: separate bounds with a comma")
        if name in ("minimize", "direction"):
            if relation != "=":
                raise BudgetError(f"budget {spec!r}: write '{name}={text}'")
            return name, text.lower().replace("imise", "imize")
        if name not in (*RATIO_AXES, "latency_ms", "metric_drop"):
            hint = "; write macs, 1 MAC = 2 FLOPs" if "flop" in name else ""
            raise BudgetError(
                f"budget {spec!r}: unknown quantity {written!r}; "
                f"expected one of {', '.join((*RATIO_AXES, 'latency_ms', 'metric_drop'))}{hint}"
            )
        if relation != "<=":
            raise BudgetError(f"budget {spec!r}: write '{name}<={text}' (only <= is a budget)")
        percent = text.endswith("%")
        digits = text.removesuffix("%").strip()
        if not _NUMBER.match(digits):
            counted = name in RATIO_AXES and _COUNT.match(text)
            hint = f"; {_SHARES}: write '{name}<=50%' for half of it" if counted else ""
            raise BudgetError(f"budget {spec!r}: {text!r} is not a number{hint}")
        if percent and name not in RATIO_AXES:
            raise BudgetError(f"budget {spec!r}: {name} is not a share; write it without '%'")
        value = float(digits)
        if percent and not 0 < value <= 100:
            raise BudgetError(f"budget {spec!r}: a share lies above 0% and at most at 100%")
        return name, value / 100 if percent else value

    @property
    def axes(self) -> tuple[str, ...]:
        """The bounded quantities, in declaration order."""
        names = (*RATIO_AXES, "latency_ms", "metric_drop")
        return tuple(name for name in names if getattr(self, name) is not None)

    @property
    def ratios(self) -> dict[str, float]:
        """Axis to its bound, of what is bounded."""
        return {axis: self.ratio(axis) for axis in self.axes}

    def ratio(self, axis: str) -> float:
        """The bound of `axis`; KeyError where it is not bounded."""
        value = getattr(self, axis, None)
        if value is None or axis not in self.axes:
            raise KeyError(axis)
        return float(value)

    def fits(self, figures: Mapping[str, float], original: Mapping[str, float]) -> bool:
        """Whether `figures` stay within every ratio of `original`.

        Args:
            figures: Axis to figure of the compressed model.
            original: Axis to figure of the original model, the same units.

        Example:
            >>> Budget(params=0.5).fits({"params": 40}, {"params": 100})
            True
        """
        return all(
            figures[axis] <= self.ratio(axis) * original[axis]
            for axis in self.axes
            if axis in RATIO_AXES
        )

    def explain(self) -> str:
        """The budget as a sentence."""
        shares = [
            f"{axis} at most {100 * self.ratio(axis):.4g}%"
            for axis in self.axes
            if axis in RATIO_AXES
        ]
        parts = []
        if shares:
            parts.append(" and ".join(shares) + " of the original model")
        if self.latency_ms is not None:
            parts.append(f"latency at most {self.latency_ms:g} ms")
        if self.metric_drop is not None:
            parts.append(
                f"the smallest {self.minimize} with at most {self.metric_drop:g} lost in a metric "
                f"to {self.direction}"
            )
        return "; ".join(parts)

    def to_dict(self) -> dict[str, float | str]:
        """Only what was set, for the plan file."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Budget:
        """The inverse of `to_dict`."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise BudgetError(f"budget has unknown keys {unknown}")
        return cls(**values)

    def __repr__(self) -> str:
        inner = ", ".join(f"{name}={value!r}" for name, value in self.to_dict().items())
        return f"Budget({inner})"


def check_inputs(axes: Iterable[str | None], inputs: Any, *, asked: str = "a budget") -> None:
    """Raise `BudgetError` where a figure of `axes` cannot be known without `example_inputs`.

    Args:
        axes: What is bounded or made small; None for nothing.
        inputs: The `example_inputs`, or None.
        asked: What asks for the figures.
    """
    for axis, what in _DEPENDS.items():
        if inputs is None and axis in axes:
            raise BudgetError(
                f"{asked} on {axis} needs example_inputs: {what} on the input's size; pass a "
                "tensor, a tuple or a dict to call the model with, or bound params instead"
            )


def _split_relation(clause: str, spec: str) -> tuple[str, str, str]:
    for relation in ("<=", ">=", "=", "<", ">"):
        if relation in clause:
            name, text = clause.split(relation, 1)
            return name, relation, text
    raise BudgetError(f"budget {spec!r}: cannot read {clause!r}; write {_SPELLINGS}")

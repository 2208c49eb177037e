"""The JSON of plans: values read with their types checked, objects written to read well."""

from __future__ import annotations

import json
import math
from typing import Any, Final, TypeVar

from rankopt.errors import PlanError

__all__ = ["check_keys", "listed", "number", "plain", "pretty", "refuse_constant", "typed"]

LINE_WIDTH: Final = 110

T = TypeVar("T")


def refuse_constant(name: str) -> float:
    raise PlanError(f"the plan holds {name}; every number in a plan is finite")


def typed(value: Any, kind: type[T], where: str) -> T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise PlanError(f"{where}: expected a {kind.__name__}, got {value!r}")
    return value


def listed(values: Any, kind: type[T], where: str) -> tuple[T, ...]:
    return tuple(typed(value, kind, where) for value in typed(values, list, where))


def number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise PlanError(f"{where}: expected a finite number, got {value!r}")
    return value


def check_keys(values: Any, expected: set[str], where: str) -> None:
    if not isinstance(values, dict):
        raise PlanError(f"{where}: expected an object, got {type(values).__name__}")
    missing, unknown = expected - set(values), set(values) - expected
    if missing:
        raise PlanError(f"{where}: missing {', '.join(sorted(missing))}")
    if unknown:
        raise PlanError(
            f"{where}: unknown {', '.join(sorted(unknown))}; other data belongs under 'extensions'"
        )


def plain(value: Any, where: str) -> Any:
    """A value as JSON gives it back, tuples as lists.

    Raises:
        PlanError: No JSON can hold it; the message names the entry within.
    """
    if isinstance(value, dict):
        for key in value:
            typed(key, str, f"{where}: key")
        return {key: plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, float):
        return number(value, where)
    if value is None or isinstance(value, (str, bool, int)):
        return value
    raise PlanError(
        f"{where}: a {type(value).__name__} is no JSON; use text, numbers, lists and dicts"
    )


def pretty(value: Any, indent: int = 0) -> str:
    """JSON with one line per leaf that fits, so that plans read well in a diff."""
    flat = json.dumps(value, ensure_ascii=False, allow_nan=False)
    holds_objects = isinstance(value, (dict, list)) and any(
        isinstance(item, dict) for item in (value.values() if isinstance(value, dict) else value)
    )
    if not isinstance(value, (dict, list)) or not value:
        return flat
    if indent and not holds_objects and len(flat) + indent <= LINE_WIDTH:
        return flat
    pad = " " * (indent + 2)
    if isinstance(value, dict):
        items = [
            f"{json.dumps(str(key), ensure_ascii=False)}: {pretty(item, indent + 2)}"
            for key, item in value.items()
        ]
        opening, closing = "{", "}"
    else:
        items = [pretty(item, indent + 2) for item in value]
        opening, closing = "[", "]"
    return f"{opening}\n{pad}" + f",\n{pad}".join(items) + f"\n{' ' * indent}{closing}"

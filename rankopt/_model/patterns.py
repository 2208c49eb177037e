"""Which layers the user asks for: globs on module names and functions of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from rankopt._model.layers import Layer
from rankopt.errors import ModelError

__all__ = ["Patterns", "select"]

Pattern: TypeAlias = "str | Callable[[Layer], bool]"
Patterns: TypeAlias = "Pattern | Iterable[Pattern]"


def select(layers: Sequence[Layer], only: Patterns = (), ignore: Patterns = ()) -> list[Layer]:
    """Refuse the layers that the user's patterns exclude.

    Args:
        layers: As found.
        only: Case-sensitive globs on full module names, or functions of a layer;
            empty means all.
        ignore: The same; what matches is kept.

    Raises:
        ModelError: A pattern that matches no layer.
    """
    wanted, unwanted = _as_patterns(only, "only"), _as_patterns(ignore, "ignore")
    for keyword, patterns in (("only", wanted), ("ignore", unwanted)):
        for pattern in patterns:
            if not any(_matches(layer, pattern) for layer in layers):
                raise ModelError(
                    f"{keyword}={pattern!r} matches no layer; the layers are "
                    f"{', '.join(layer.name for layer in layers[:6])}, … "
                    "(full module names, case-sensitive globs)"
                )
    chosen = []
    for layer in layers:
        if any(_matches(layer, pattern) for pattern in unwanted):
            layer = replace(layer, refusal="ignored by the user")
        elif wanted and not any(_matches(layer, pattern) for pattern in wanted):
            layer = replace(layer, refusal="not among only=")
        chosen.append(layer)
    return chosen


def _matches(layer: Layer, pattern: Pattern) -> bool:
    if isinstance(pattern, str):
        return any(fnmatchcase(name, pattern) for name in layer.names)
    return bool(pattern(layer))


def _as_patterns(patterns: Patterns, keyword: str) -> tuple[Pattern, ...]:
    if isinstance(patterns, str) or callable(patterns):
        patterns = (patterns,)
    listed = tuple(patterns) if isinstance(patterns, Iterable) else (patterns,)
    for pattern in listed:
        if isinstance(pattern, type | nn.Module):  # callable, but not a function of a layer
            what = "a class" if isinstance(pattern, type) else "a module"
            raise ModelError(
                f"{keyword}: got {what}, {pattern!r}; give the module's name, a glob on names, or "
                "a function such as lambda layer: layer.type == 'Linear'"
            )
        if not isinstance(pattern, str) and not callable(pattern):
            raise ModelError(
                f"{keyword}={pattern!r}: expected a glob on module names, a function of a layer, "
                "or several of these"
            )
    return listed

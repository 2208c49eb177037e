"""What the user's `evaluate` gives: one number, or one for each batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from rankopt.errors import EvaluationError

__all__ = ["mean", "metric_of", "number", "parsed"]


def mean(values: Sequence[tuple[float, float]]) -> float:
    """Weighted mean of (value, weight) pairs.

    Example:
        >>> mean([(1.0, 1.0), (4.0, 2.0)])
        3.0
    """
    return sum(value * weight for value, weight in values) / sum(weight for _, weight in values)


def number(value: Any) -> float:
    """A metric as a float, NaN included.

    Raises:
        EvaluationError: It is no number.
    """
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:  # of a tensor, say
        raise EvaluationError(
            f"evaluate gave a {type(value).__name__}; expected a number"
        ) from error


def parsed(value: Any, *, finite: bool = True) -> tuple[float, float]:
    """A number and its weight.

    Raises:
        EvaluationError: It is neither a number nor such a pair, or not finite where it has to be.
    """
    pair = value if isinstance(value, tuple) and len(value) == 2 else (value, 1.0)
    try:
        found, weight = float(pair[0]), float(pair[1])
    except (TypeError, ValueError, RuntimeError) as error:
        raise EvaluationError(
            f"evaluate gave a {type(value).__name__}; expected a number, or (number, weight)"
        ) from error
    if finite and not math.isfinite(found):
        raise EvaluationError(f"evaluate gave {found}; expected a finite number")
    if not (math.isfinite(weight) and weight > 0):
        raise EvaluationError(f"evaluate gave weight {weight}; expected a positive number")
    return found, weight


def metric_of(
    evaluate: Callable[[nn.Module], Any], model: nn.Module, *, finite: bool = True
) -> float:
    """The metric of a model, the weighted mean where `evaluate` yields one for each batch.

    Raises:
        EvaluationError: `evaluate` raised, or gave no number, or an infinite one or NaN where
            it has to be `finite`.
    """
    try:
        found = evaluate(model)
        found = found if isinstance(found, Iterator) else [found]
        values = [parsed(value, finite=finite) for value in found]
    except EvaluationError:
        raise
    except Exception as error:
        raise EvaluationError(f"evaluate raised {type(error).__name__}: {error}") from error
    if not values:
        raise EvaluationError("evaluate yielded no value; expected at least one batch")
    return mean(values)

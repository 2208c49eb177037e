"""What the user's `evaluate` gives: one number, or one for each batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, SupportsFloat, TypeAlias

from torch import nn

from rankopt.errors import EvaluationError

__all__ = ["Evaluate", "EvaluateBatch", "Score", "mean", "metric_of", "parsed"]

# A number, or one and its weight.
Score: TypeAlias = SupportsFloat | tuple[SupportsFloat, SupportsFloat]
# The metric of a model: one for all, or from a generator one for each batch.
Evaluate: TypeAlias = Callable[[nn.Module], Score | Iterator[Score]]
# That of one batch, for studies that are given the batches.
EvaluateBatch: TypeAlias = Callable[[nn.Module, Any], Score]


def mean(values: Sequence[tuple[float, float]]) -> float:
    """Weighted mean of (value, weight) pairs.

    Example:
        >>> mean([(1.0, 1.0), (4.0, 2.0)])
        3.0
    """
    return sum(value * weight for value, weight in values) / sum(weight for _, weight in values)


def parsed(value: Any, *, finite: bool = True) -> tuple[float, float]:
    """A number and its weight.

    Raises:
        EvaluationError: It is neither a number nor such a pair, or not finite where it has to be.
    """
    pair = value if isinstance(value, tuple) and len(value) == 2 else (value, 1.0)
    try:
        found, weight = map(_number, pair)
    except (TypeError, ValueError, RuntimeError) as error:  # of a tensor, say
        raise EvaluationError(
            f"evaluate gave a {type(value).__name__}; expected a number, or (number, weight)"
        ) from error
    if finite and not math.isfinite(found):
        raise EvaluationError(f"evaluate gave {found}; expected a finite number")
    if not (math.isfinite(weight) and weight > 0):
        raise EvaluationError(f"evaluate gave weight {weight}; expected a positive number")
    return found, weight


def _number(value: Any) -> float:
    if isinstance(value, (str, bytes)):  # which float() would read
        raise TypeError
    return float(value)


def metric_of(evaluate: Evaluate, model: nn.Module, *, finite: bool = True) -> float:
    """The metric of a model, the weighted mean where `evaluate` yields one for each batch.

    Raises:
        EvaluationError: `evaluate` raised, or gave no number, or an infinite one or NaN where
            it has to be `finite`.
    """
    try:
        found = evaluate(model)
        scores = found if isinstance(found, Iterator) else [found]
        values = [parsed(score, finite=finite) for score in scores]
    except EvaluationError:
        raise
    except Exception as error:
        raise EvaluationError(f"evaluate raised {type(error).__name__}: {error}") from error
    if not values:
        raise EvaluationError("evaluate yielded no value; expected at least one batch")
    return mean(values)

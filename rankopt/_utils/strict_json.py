"""JSON that every reader takes: it has no words for NaN and infinities."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

__all__ = ["strict_json"]


def strict_json(value: Any, **options: Any) -> str:
    """Like `json.dumps`, with null for numbers that are not finite.

    Example:
        >>> strict_json({"metric": float("nan"), "ranks": (1, 2)})
        '{"metric": null, "ranks": [1, 2]}'
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value

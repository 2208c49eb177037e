"""Checks of arguments and settings: errors name them, what was got and what is expected."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from typing import Any

__all__ = ["check_choice", "check_integer", "check_path", "is_number"]


def check_choice(name: str, value: Any, known: Collection[str]) -> None:
    """Raise `ValueError` unless a setting is one of the words in `known`.

    Example:
        >>> check_choice("mode", "fast", ("paper", "robust"))
        Traceback (most recent call last):
        ...
        ValueError: mode='fast': expected one of paper, robust
    """
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(known)}")


def check_integer(name: str, value: Any, least: int) -> None:
    """Raise `ValueError` unless a setting is an integer of at least so much."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: expected an integer of at least {least}")


def check_path(name: str, value: Any) -> None:
    """Raise `ValueError` unless a setting is a path, or None for none."""
    if value is None or (isinstance(value, (str, os.PathLike)) and os.fspath(value)):
        return
    raise ValueError(f"{name}={value!r}: expected a path, or None")


def is_number(value: Any) -> bool:
    """Whether a value is a real number that a float can hold; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.float_info.max  # math.isfinite fails on larger integers

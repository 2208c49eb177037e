"""Returning freed memory to the operating system."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["give_back"]


def give_back() -> None:
    """Return what has been freed; glibc otherwise keeps matrices of up to 32 MB for itself.

    Nothing happens where the C library has no `malloc_trim`.
    """
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

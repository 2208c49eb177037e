"""Locks on files, which the kernel drops when a process ends, however it ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["lock", "turn"]


def lock(handle: int, *, wait: bool) -> bool:
    """Whether the lock was got; Windows has none of this kind, and everyone gets it."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


@contextmanager
def turn(handle: int) -> Iterator[None]:
    """Wait for the lock on an open file, hold it until the block ends, close the file."""
    try:
        lock(handle, wait=True)
        yield
    finally:
        os.close(handle)

"""Locks on files, which the kernel drops when a process ends, however it ends."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

__all__ = ["alone", "lock", "turn"]

# Workers of a loader hold what their process held for some seconds after it was killed.
PATIENCE: Final = 15.0


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


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Hold the lock on a folder; whether it was got, which may take seconds.

    Everyone gets it where the file system or Windows has no such locks.
    """
    if sys.platform == "win32":
        yield True
        return
    import fcntl

    handle, end = os.open(folder, os.O_RDONLY), time.monotonic() + PATIENCE
    try:
        got = True
        with suppress(OSError):
            while not (got := lock(handle, wait=False)) and time.monotonic() < end:
                time.sleep(0.1)
        yield got
    finally:
        with suppress(OSError):  # closing would not do: forked processes hold it too
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)

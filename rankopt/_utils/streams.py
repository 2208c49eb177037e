"""Keeping other people's printing out of our output."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["stdout_to_stderr"]


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send what C code prints on file descriptor 1 to 2, so that ``--json`` stays JSON.

    HiGHS prints debug lines that no option silences.
    """
    if sys.stdout is None:  # closed: nothing to protect
        yield
        return
    sys.stdout.flush()
    try:
        kept = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # one of them is closed: nothing to protect, or nowhere to send it
        yield
        return
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)

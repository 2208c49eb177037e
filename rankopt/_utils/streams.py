"""Keeping other people's printing out of our output."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

__all__ = ["stdout_to_stderr"]


@contextmanager
def stdout_to_stderr(*, without: str) -> Iterator[None]:
    """Send what C code prints on file descriptor 1 to 2 afterwards, so that ``--json`` stays JSON.

    Args:
        without: How lines begin that are dropped. HiGHS prints debug lines that no option silences.
    """
    if sys.stdout is None:  # closed: nothing to protect
        yield
        return
    sys.stdout.flush()
    with ExitStack() as held:
        try:
            printed = held.enter_context(tempfile.TemporaryFile())
            kept = os.dup(1)
            held.callback(os.close, kept)
            os.dup2(printed.fileno(), 1)
        except OSError:  # closed: nothing to protect; or no folder to keep it in
            yield
            return
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(kept, 1)
            printed.seek(0)
            _to_stderr(b"".join(x for x in printed if not x.startswith(without.encode())))


def _to_stderr(text: bytes) -> None:
    if text and sys.stderr is not None:
        sys.stderr.write(text.decode(errors="replace"))
        sys.stderr.flush()

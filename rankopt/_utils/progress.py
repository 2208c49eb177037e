"""Progress bars that appear only once work has taken two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

__all__ = ["progress_bar"]

PATIENCE_SECONDS: Final = 2.0


@contextmanager
def progress_bar(
    label: str, total: int | None, *, enabled: bool | None = None
) -> Iterator[Callable[..., None]]:
    """Yield a function to call after each step; it takes a note to show beside the bar.

    Args:
        label: What is being done.
        total: Number of steps; None if unknown; a note is then shown in place of a count.
        enabled: None shows the bar where standard error is a terminal.
    """
    shown = sys.stderr.isatty() if enabled is None else enabled
    started = time.perf_counter()
    bar: Any = None
    task: Any = None
    done = 0
    shown_note = ""

    def advance(note: str | None = None) -> None:
        nonlocal bar, task, done, shown_note
        shown_note = shown_note if note is None else note
        done += 1
        if not shown:
            return
        if bar is None:
            if time.perf_counter() - started < PATIENCE_SECONDS:
                return
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            noted = total is None and shown_note  # the note says how far it is
            counts = [] if noted else [MofNCompleteColumn(), TimeRemainingColumn()]
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                *counts,
                TextColumn("{task.fields[note]}"),
            )
            console = Console(stderr=True)
            # Bars vanish from a terminal; a log has one line of each, at its end.
            bar = Progress(*columns, console=console, transient=console.is_terminal)
            task = bar.add_task(label, total=total, note=shown_note)
            bar.start()
        bar.update(task, completed=done, note=shown_note)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()

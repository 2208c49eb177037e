"""Terminal tables in the house style, and figures as people read them."""

from __future__ import annotations

import io
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["count", "counted", "milliseconds", "show", "table", "to_text"]

TEXT_WIDTH = 110
LOG_WIDTH = 120


def table(title: str, *columns: str, caption: str | None = None) -> Table:
    """An empty table in the house style; columns after the first are right-aligned."""
    made = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, caption=caption,
        caption_justify="left", pad_edge=False,
    )  # fmt: skip
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return made


def to_text(*renderables: Any, width: int = TEXT_WIDTH) -> str:
    """Tables as plain text."""
    stream = io.StringIO()
    console = _console(file=stream, width=width, no_color=True)
    for renderable in renderables:
        console.print(renderable)
    return stream.getvalue().rstrip()


def show(*renderables: Any) -> None:
    """Print tables, as wide as the terminal, or as a log allows."""
    console = _console()
    if not console.is_terminal:
        console.width = LOG_WIDTH
    for renderable in renderables:
        console.print(renderable)


def _console(**settings: Any) -> Console:
    """Text is shown as it is: names, notes and errors may hold ``[brackets]`` and ``:colons:``."""
    return Console(markup=False, emoji=False, **settings)


def count(value: float | None) -> str:
    """A count with a unit letter.

    Example:
        >>> count(4_089_184_256)
        '4.09 G'
    """
    if value is None:
        return "–"
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def counted(number: int, what: str) -> str:
    """A number of things.

    Example:
        >>> counted(1, "site"), counted(2, "site")
        ('1 site', '2 sites')
    """
    return f"{number} {what}" + ("" if number == 1 else "s")


def milliseconds(value: float | None) -> str:
    """A time.

    Example:
        >>> milliseconds(8.1249)
        '8.12 ms'
    """
    return "–" if value is None else f"{value:.3g} ms"

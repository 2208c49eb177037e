"""Interactive HTML plots, drawn by plotly (the extra ``[report]``)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rankopt._utils.files import write_text
from rankopt.errors import MissingDependency, RankoptError

__all__ = ["check_name", "plotly", "write"]


def check_name(path: str | os.PathLike[str]) -> None:
    """Refuse names of other formats than HTML."""
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise RankoptError(
            f"cannot plot to {path}: plots are HTML pages, so end the name in .html "
            "(the page's camera button saves a PNG)"
        )


def plotly() -> Any:
    """``plotly.graph_objects``.

    Raises:
        MissingDependency: It is not installed.
    """
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise MissingDependency(
            "plots need plotly: pip install plotly (or rankopt[report])"
        ) from error
    return go


def write(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure to a page that loads nothing from elsewhere."""
    write_text(path, figure.to_html(include_plotlyjs=True, full_html=True))

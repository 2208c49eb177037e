"""Figures as HTML pages, drawn by plotly."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankopt._files import write_text
from rankopt.errors import MissingDependency, RankoptError

if TYPE_CHECKING:
    from rankopt.layer_profile import LayerProfile

__all__ = ["write_profile"]


def write_profile(profile: LayerProfile, path: str | os.PathLike[str]) -> None:
    """Write time against rank to an HTML page; see `LayerProfile.plot`."""
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise RankoptError(
            f"cannot plot to {path}: plots are HTML pages, so end the name in .html "
            "(the page's camera button saves a PNG)"
        )
    go = _plotly()
    rows = profile.rows
    ranks = [max(row.ranks) for row in rows]
    medians = [row.latency_ms.median for row in rows]
    dense = profile.dense_ms
    figure = go.Figure()
    figure.add_hrect(y0=dense.low, y1=dense.high, fillcolor="gray", opacity=0.25, line_width=0)
    figure.add_scatter(
        x=[ranks[0], ranks[-1]], y=[dense.median] * 2, mode="lines", name="dense",
        line={"color": "gray"},
    )  # fmt: skip
    figure.add_scatter(
        x=ranks,
        y=medians,
        name=profile.method,
        mode="lines+markers",
        error_y={
            "array": [row.latency_ms.high - row.latency_ms.median for row in rows],
            "arrayminus": [row.latency_ms.median - row.latency_ms.low for row in rows],
        },
        text=[
            f"rank {' x '.join(map(str, row.ranks))}: {row.ratio} of dense, "
            f"{100 * row.work:.0f}% of its MACs"
            for row in rows
        ],
        hoverinfo="text",
    )
    for fast, _ in profile.cliffs:
        figure.add_vline(x=max(fast), line={"dash": "dot", "color": "firebrick"})
    where = profile.conditions
    figure.update_layout(
        title=f"{profile.layer} {list(profile.shape)}, {where['mode']}: {profile.verdict}"
        f"<br><sup>{where['device']}, {where['threads']} threads, {where['dtype']}, "
        f"{where['memory_format']}, torch {where['torch']}</sup>",
        xaxis_title="largest rank",
        yaxis_title="time, ms",
        yaxis_rangemode="tozero",
        template="plotly_white",
    )
    write_text(path, figure.to_html(include_plotlyjs=True, full_html=True))


def _plotly() -> Any:
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise MissingDependency(
            "plots need plotly: pip install plotly (or rankopt[report])"
        ) from error
    return go

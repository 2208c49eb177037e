"""A layer's time against rank, as a terminal table and as an interactive plot."""

from __future__ import annotations

import os
from textwrap import wrap
from typing import TYPE_CHECKING, Final

from rich.table import Table

from rankopt._utils import plots
from rankopt._utils.tables import table

if TYPE_CHECKING:
    from rankopt._timing.layer_profile import LayerProfile

__all__ = ["profile_table", "write_profile"]

STRONG, PALE, CLIFF = "#1f6feb", "#8fb3ea", "#b42318"
TITLE_WIDTH: Final = 125
HEADROOM: Final = 1.25


def profile_table(profile: LayerProfile) -> Table:
    """Time against rank of one layer."""
    where = profile.conditions
    made = table(
        f"{profile.layer} {list(profile.shape)}, {profile.method}, {where['mode']}, dense "
        f"{profile.dense_ms} ms",
        "rank", "macs", "time, ms", "of dense", "",
        caption=f"{profile.verdict} ({profile.runs} runs; {where['device']}, {where['threads']} "
        f"threads, {where['dtype']}, {where['memory_format']})",
    )  # fmt: skip
    for row in profile.rows:
        made.add_row(
            " x ".join(map(str, row.ranks)),
            f"{100 * row.work:.0f}%",
            str(row.latency_ms),
            str(row.ratio),
            row.verdict,
        )
    return made


def write_profile(profile: LayerProfile, path: str | os.PathLike[str]) -> None:
    """Write time against rank to an HTML page; see `LayerProfile.plot`."""
    plots.check_name(path)
    go = plots.plotly()
    rows = profile.rows
    ranks = [max(row.ranks) for row in rows]
    medians = [row.latency_ms.median for row in rows]
    dense = profile.dense_ms
    where = profile.conditions
    figure = go.Figure()
    figure.add_hrect(y0=dense.low, y1=dense.high, fillcolor="gray", opacity=0.15, line_width=0)
    figure.add_scatter(
        x=[min(ranks), max(ranks)], y=[dense.median] * 2, mode="lines", name="dense",
        line={"color": "gray", "dash": "dash"}, hovertext=f"dense: {dense} ms", hoverinfo="text",
    )  # fmt: skip
    figure.add_scatter(
        x=ranks,
        y=medians,
        name=profile.method,
        mode="lines+markers",
        line={"color": STRONG},
        error_y={
            "array": [row.latency_ms.high - row.latency_ms.median for row in rows],
            "arrayminus": [row.latency_ms.median - row.latency_ms.low for row in rows],
            "color": PALE,
            "thickness": 1.5,
            "width": 3,
        },
        text=[
            f"rank {' x '.join(map(str, row.ranks))}: {row.latency_ms} ms, {row.ratio} of dense, "
            f"{100 * row.work:.0f}% of its MACs"
            for row in rows
        ],
        hoverinfo="text",
    )
    for fast, _ in profile.cliffs:
        figure.add_vline(
            x=max(fast), line={"dash": "dot", "color": CLIFF}, annotation_text="cliff",
            annotation_font_color=CLIFF,
        )  # fmt: skip
    shape = "×".join(map(str, profile.shape))
    machine = (
        f"{where['device']}, {where['threads']} threads, {where['dtype']}, "
        f"{where['memory_format']}, torch {where['torch']}"
    )
    words = "<br>".join(wrap(f"{profile.verdict} ({machine})", TITLE_WIDTH))
    figure.update_layout(
        title={
            "text": f"{profile.layer}, {shape}, {where['mode']}",
            "subtitle": {"text": words, "font": {"size": 13}},
        },
        margin={"t": 90 + 18 * words.count("<br>")},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"},
        xaxis_title="largest rank",
        yaxis_title="time, ms",
        # A disturbed run has a long bar, which would flatten everything else.
        yaxis_range=[0, HEADROOM * max(*medians, dense.median)],
        template="plotly_white",
    )
    plots.write(figure, path)

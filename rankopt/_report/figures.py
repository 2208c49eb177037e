"""Figures as HTML pages, drawn by plotly."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Final

from rankopt._files import write_text
from rankopt.errors import MissingDependency, PlanError, RankoptError

if TYPE_CHECKING:
    from rankopt.layer_profile import LayerProfile
    from rankopt.plan import RankPlan

__all__ = ["check_name", "write_profile", "write_ranks"]

# Entries of a step that are drawn over the steps, where a search noted them.
CURVES = ("loss", "soft_loss", "best", "entropy")

STRONG, PALE, CLIFF = "#1f6feb", "#8fb3ea", "#b42318"
TITLE_WIDTH: Final = 125
HEADROOM: Final = 1.25


def write_profile(profile: LayerProfile, path: str | os.PathLike[str]) -> None:
    """Write time against rank to an HTML page; see `LayerProfile.plot`."""
    check_name(path)
    go = _plotly()
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
    write_text(path, figure.to_html(include_plotlyjs=True, full_html=True))


def write_ranks(plan: RankPlan, path: str | os.PathLike[str]) -> None:
    """Write how ranks moved during a search to an HTML page.

    Above, how much of each site was left at each step: its expected cost as a share of
    the dense one's, or its rank where the search noted ranks. Below, loss and entropy.

    Args:
        plan: Of a strategy that keeps a record of its steps, such as ``relaxed``.
        path: The page, ending in .html.

    Raises:
        MissingDependency: plotly is not installed.
        PlanError: The plan's record is damaged.
        RankoptError: The plan holds no record, or the page cannot be written.
    """
    check_name(path)
    name = plan.strategy.get("name")
    record = plan.extensions.get(name) if isinstance(name, str) else None
    steps = record.get("steps") if isinstance(record, Mapping) else None
    if not steps or not isinstance(record, Mapping):
        raise RankoptError(
            f"the plan of strategy {name!r} holds no record of steps to plot; the strategy "
            "'relaxed' keeps one"
        )
    go = _plotly()
    try:
        at = [step["step"] for step in steps]
        left = "ranks" if "ranks" in steps[0] else "kept"
        columns = zip(*(step[left] for step in steps), strict=True)
        moved = dict(zip(record["sites"], map(list, columns), strict=True))
        curves = {key: [step.get(key) for step in steps] for key in CURVES if key in steps[0]}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise PlanError(
            f"extensions of the plan: the record of {name!r} is damaged ({type(error).__name__}: "
            f"{error}); every step holds step, and kept or ranks with a value for each of sites"
        ) from error
    figure = go.Figure()
    figure.add_heatmap(
        x=at,
        y=list(moved),
        z=list(moved.values()),
        colorscale="Viridis",
        colorbar={"title": "rank" if left == "ranks" else "cost left", "y": 0.7, "len": 0.6},
        yaxis="y2",
    )
    for curve, values in curves.items():
        figure.add_scatter(x=at, y=values, name=curve)
    figure.update_layout(
        title=f"{name}: how the ranks of {len(moved)} sites moved",
        xaxis={"title": "step", "anchor": "y"},
        yaxis={"domain": [0, 0.32]},
        yaxis2={"domain": [0.4, 1], "autorange": "reversed"},
        legend={"y": 0.25},
        height=max(600, 300 + 18 * len(moved)),
        template="plotly_white",
    )
    write_text(path, figure.to_html(include_plotlyjs=True, full_html=True))


def check_name(path: str | os.PathLike[str]) -> None:
    """Refuse names of other formats than HTML."""
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise RankoptError(
            f"cannot plot to {path}: plots are HTML pages, so end the name in .html "
            "(the page's camera button saves a PNG)"
        )


def _plotly() -> Any:
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise MissingDependency(
            "plots need plotly: pip install plotly (or rankopt[report])"
        ) from error
    return go

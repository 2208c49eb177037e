"""How ranks moved during a search, as an interactive plot."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rankopt._utils import plots
from rankopt.errors import PlanError, RankoptError

if TYPE_CHECKING:
    from rankopt.plan import RankPlan

__all__ = ["write_ranks"]

# Entries of a step that are drawn over the steps, where a search noted them.
CURVES = ("loss", "soft_loss", "best", "entropy")


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
    plots.check_name(path)
    name = plan.strategy.get("name")
    record = plan.extensions.get(name) if isinstance(name, str) else None
    steps = record.get("steps") if isinstance(record, Mapping) else None
    if not steps or not isinstance(record, Mapping):
        raise RankoptError(
            f"the plan of strategy {name!r} holds no record of steps to plot; the strategy "
            "'relaxed' keeps one"
        )
    go = plots.plotly()
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
    plots.write(figure, path)

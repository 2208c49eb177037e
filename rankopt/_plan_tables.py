"""A plan as terminal tables: one row per decision, and the whole model's figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rich import box
from rich.table import Table

from rankopt._utils.tables import count, counted, milliseconds, table

if TYPE_CHECKING:
    from rankopt.plan import Decision, RankPlan

__all__ = ["plan_table", "totals_table"]


def _bytes(value: float | None) -> str:
    return count(value) if value is None else f"{count(value)}B"


_UNITS: Final = {"latency": milliseconds, "memory": _bytes}


def totals_table(plan: RankPlan) -> Table:
    """Whole-model figures of a plan."""
    strategy = plan.strategy.get("name", "by hand")
    made = table(
        f"{plan.model.get('class', 'model')}, strategy {strategy}",
        "", "original", "predicted", "measured", "ratio",
        caption=f"{counted(len(plan.changes), 'site')} decomposed, "
        f"{len(plan.decisions) - len(plan.changes)} kept, {plan.seconds:.2f} s",
    )  # fmt: skip
    for axis, entry in plan.totals.items():
        before = entry["before"]
        after = entry["measured"] if entry["measured"] is not None else entry["predicted"]
        ratio = f"{100 * after / before:.2f}%" if before and after is not None else "–"
        shown = _UNITS.get(axis, count)
        figures = (shown(entry[key]) for key in ("before", "predicted", "measured"))
        made.add_row(axis, *figures, ratio)
    return made


def plan_table(plan: RankPlan) -> Table:
    """One row per decision: what, at which rank, at what cost, and why."""
    axis = "macs" if any("macs" in d.cost for d in plan) else "params"
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("layer", "weight", "method", "ranks", axis, "error", "reason"):
        right = column in ("ranks", axis, "error")
        fold = "ellipsis" if column in ("weight", "method") else "fold"
        made.add_column(column, justify="right" if right else "left", overflow=fold, no_wrap=right)  # type: ignore[arg-type]
    for decision in plan:
        made.add_row(*_cells(decision, axis))
    return made


def _cells(decision: Decision, axis: str) -> tuple[str, ...]:
    share = "–"
    if axis in decision.cost:
        before, after = decision.cost[axis]
        share = f"{100 * after / before:.0f}%" if before else "–"
    return (
        ", ".join(decision.targets) or "(root)",
        "x".join(map(str, decision.shapes[0])),
        decision.method,
        " x ".join(map(str, decision.ranks)) or "–",
        share,
        "–" if decision.error is None or decision.keeps else f"{decision.error:.3f}",
        decision.reason,
    )

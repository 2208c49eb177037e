"""Terminal tables."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Final

from rich import box
from rich.console import Console
from rich.table import Table

from rankopt.plan import Decision, RankPlan

if TYPE_CHECKING:
    from rankopt._compare import Comparison, Figure
    from rankopt.layer_profile import LayerProfile

__all__ = [
    "comparison_table",
    "count",
    "counted",
    "milliseconds",
    "plan_table",
    "profile_table",
    "show",
    "table",
    "to_text",
    "totals_table",
]

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


def comparison_table(comparison: Comparison) -> Table:
    """Both models side by side, with a plain verdict on speed."""
    unknown = "" if comparison.metric is not None else "\nmetric: not measured, pass evaluate="
    made = table(
        "original against compressed", "", "original", "compressed", "ratio",
        caption=comparison.verdict + unknown,
    )  # fmt: skip
    rows: list[tuple[str, Figure | None, str]] = [
        ("params", comparison.params, ""),
        ("memory", comparison.memory, "B"),
        ("macs", comparison.macs, ""),
    ]
    for name, figure, unit in rows:
        if figure is not None:
            before, after = (f"{count(x)}{unit}" for x in (figure.before, figure.after))
            made.add_row(name, before, after, f"{100 * figure.ratio:.1f}%")
    if comparison.metric is not None:
        metric = comparison.metric
        change = f"{metric.after - metric.before:+.4g}"
        made.add_row("metric", f"{metric.before:.4g}", f"{metric.after:.4g}", change)
    error, agreement = comparison.output_error, comparison.agreement
    if error is not None or agreement is not None:
        same = "" if agreement is None else f"{agreement:.1%} same class"
        text = "not finite" if error is None else f"{error:.2g} relative error"
        made.add_row("outputs", "", text, same)
    if comparison.latency_ratio is not None:
        ratio = comparison.latency_ratio
        made.add_row(
            "latency, ms",
            str(comparison.latency_before_ms),
            str(comparison.latency_after_ms),
            f"{100 * ratio.median:.1f}% [{100 * ratio.low:.1f}, {100 * ratio.high:.1f}]",
        )
    return made


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

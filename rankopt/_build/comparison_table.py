"""A comparison as a terminal table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from rankopt._utils.tables import count, table

if TYPE_CHECKING:
    from rankopt._build.compare import Comparison, Figure

__all__ = ["comparison_table"]


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

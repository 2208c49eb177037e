"""Line charts as inline SVG, coloured by the style sheet of the page around them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

__all__ = ["Line", "line_chart", "nice_ticks"]

WIDTH, HEIGHT = 320, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 24
TICKS: Final = 4
# Below this share of their size values differ by rounding, or by less than labels show.
FLAT: Final = 1e-6
# Above this many points dots would hide the line.
MOST_DOTS: Final = 60


@dataclass(frozen=True)
class Line:
    """One series.

    Args:
        label: What it shows; drawn in the legend.
        points: (x, y); points whose y is not finite are left out.
        notes: One text per point, shown when it is pointed at.
    """

    label: str
    points: Sequence[tuple[float, float]]
    notes: Sequence[str]


def nice_ticks(low: float, high: float, count: int = TICKS) -> list[float]:
    """About `count` round numbers from at most `low` to at least `high`.

    Example:
        >>> nice_ticks(0.13, 0.92)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not high - low > FLAT * max(abs(low), abs(high)):
        pad = abs(low) / 10 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / count
    exponent = math.floor(math.log10(rough))
    power = 10.0**exponent
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 1 - exponent) for i in range(first, last + 1)]


def line_chart(title: str, lines: Sequence[Line], *, x_label: str) -> str:
    """A figure element; empty text where there is nothing to draw.

    Args:
        title: Its caption.
        lines: At most three.
        x_label: Under the horizontal axis, which has whole numbers.
    """
    drawn = [_finite(line) for line in lines]
    drawn = [line for line in drawn if line.points]
    if not drawn:
        return ""
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points]
    ticks = nice_ticks(min(ys), max(ys))
    left, right = min(xs), max(xs)
    span_x, span_y = (right - left) or 1.0, ticks[-1] - ticks[0]

    def place(x: float, y: float) -> tuple[float, float]:
        across = 0.5 if right == left else (x - left) / span_x
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - ticks[0]) / span_y * (HEIGHT - TOP - BOTTOM),
        )

    parts = []
    for tick in ticks:
        _, y = place(left, tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}">{_short(tick)}</text>')
    for tick in _whole(left, right):
        x, _ = place(tick, ticks[0])
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{HEIGHT - 8}">{tick}</text>')
    for index, line in enumerate(drawn, start=1):
        placed = [place(*point) for point in line.points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
        parts.append(f'<path class="line s{index}" d="M{path}"/>')
        if len(placed) <= MOST_DOTS:
            parts += [
                f'<circle class="dot s{index}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
                f"<title>{escape(note)}</title></circle>"
                for (x, y), note in zip(placed, line.notes, strict=True)
            ]
    legend = ""
    if len(drawn) > 1:
        legend = " ".join(
            f'<span class="key s{index}">{escape(line.label)}</span>'
            for index, line in enumerate(drawn, start=1)
        )
    return (
        f"<figure><figcaption>{escape(title)} {legend}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} by '
        f'{escape(x_label)}">{"".join(parts)}</svg>'
        f'<div class="axis">{escape(x_label)}</div></figure>'
    )


def _finite(line: Line) -> Line:
    kept = [i for i, (_, y) in enumerate(line.points) if math.isfinite(y)]
    return Line(line.label, [line.points[i] for i in kept], [line.notes[i] for i in kept])


def _whole(left: float, right: float) -> list[int]:
    """A few whole numbers from `left` to `right`, both of them included."""
    step = max(1, math.ceil((right - left) / 6))
    found = list(range(math.ceil(left), math.floor(right) + 1, step))
    if found[-1] != math.floor(right):
        if math.floor(right) - found[-1] < step / 2:
            found.pop()
        found.append(math.floor(right))
    return found


def _short(value: float) -> str:
    """A tick's label.

    Example:
        >>> [_short(v) for v in (0.0, 0.25, 1500.0, 2e6, 3e-5)]
        ['0', '0.25', '1.5k', '2M', '3e-05']
    """
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"

"""LayerProfile: what was learnt about one layer's time, and in plain words."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from rankopt._timing.latency import Interval

__all__ = ["LayerProfile", "ProfileRow"]


@dataclass(frozen=True)
class ProfileRow:
    """One rank of a profile.

    Args:
        ranks: Of the chain.
        work: Its MACs as a share of the dense layer's.
        latency_ms: Its milliseconds.
        ratio: Its time as a paired ratio to the dense layer's; below 1 is faster.
    """

    ranks: tuple[int, ...]
    work: float
    latency_ms: Interval
    ratio: Interval

    @property
    def verdict(self) -> str:
        """``faster`` or ``slower`` than dense, or ``undecided``."""
        if self.ratio.high < 1:
            return "faster"
        return "slower" if self.ratio.low > 1 else "undecided"


@dataclass(frozen=True)
class LayerProfile:
    """Time against rank for one layer and one decomposition; prints as a table.

    Args:
        layer: Name of the layer.
        shape: Of its weight.
        method: Name of the decomposition.
        dense_ms: Milliseconds of the dense layer.
        rows: By ascending rank.
        cliffs: (fast, slow) neighbouring ranks between which time jumps.
        conditions: Device, threads, memory format and so on, as in the cache.
        runs: How often a chain or the dense layer ran; 0 if all was known.
    """

    layer: str
    shape: tuple[int, ...]
    method: str
    dense_ms: Interval
    rows: tuple[ProfileRow, ...]
    cliffs: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    conditions: dict[str, str]
    runs: int

    @property
    def fastest(self) -> ProfileRow:
        """The row of least time."""
        return min(self.rows, key=lambda row: row.ratio.median)

    @property
    def noisy(self) -> bool:
        """Whether most intervals are too wide to tell neighbouring ranks apart."""
        return sum(row.ratio.noisy for row in self.rows) > len(self.rows) / 2

    @property
    def verdict(self) -> str:
        """In plain words, up to which rank a chain is surely faster than the dense layer."""
        noise = (
            "; times vary too much to tell neighbouring ranks apart: the machine is busy, "
            "throttled or not warm, profile again"
            if self.noisy
            else ""
        )
        faster = [row for row in self.rows if row.verdict == "faster"]
        if not faster:
            ratio = self.fastest.ratio
            return f"no rank is surely faster than dense, the fastest takes {ratio} of it{noise}"
        largest = " x ".join(map(str, faster[-1].ranks))
        text = f"faster than dense up to rank {largest}"
        if self.cliffs:
            jumps = (" x ".join(map(str, fast)) for fast, _ in self.cliffs)
            text += f"; cliffs above rank {', '.join(jumps)}"
        return text + noise

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "verdict": self.verdict}

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw time against rank as an interactive HTML page.

        Args:
            path: Ends in ``.html``; the page's camera button saves a PNG.

        Raises:
            MissingDependency: plotly is not installed.
            RankoptError: Another ending, or the file cannot be written.
        """
        from rankopt._timing.profile_views import write_profile

        write_profile(self, path)

    def __str__(self) -> str:
        from rankopt._timing.profile_views import profile_table
        from rankopt._utils.tables import to_text

        return to_text(profile_table(self))

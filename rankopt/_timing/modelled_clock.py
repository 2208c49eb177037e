"""A clock for tests: time as a function of what is computed, the same on every machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["ModelledClock", "Operations"]


class ModelledClock:
    """Deterministic milliseconds from a model of hardware, in place of a clock.

    Every convolution and matrix product costs a fixed overhead plus its MACs, with the
    channels on both sides padded to a multiple, so that time has cliffs.

    Args:
        overhead_ms: Per operation.
        macs_per_ms: Of the padded operation.
        multiple: What channels are padded to.
        extra_ms: Per run, whatever is run: what layers alone do not show.

    Example:
        >>> clock = ModelledClock(overhead_ms=1.0, macs_per_ms=64.0, multiple=4)
        >>> layer, x = nn.Linear(8, 6, bias=False), torch.zeros(1, 8)
        >>> clock(lambda: layer(x))  # 1 + 8 * 8 / 64
        2.0
    """

    def __init__(
        self,
        *,
        overhead_ms: float = 0.01,
        macs_per_ms: float = 2e6,
        multiple: int = 8,
        extra_ms: float = 0.0,
    ) -> None:
        self.overhead_ms, self.macs_per_ms = overhead_ms, macs_per_ms
        self.multiple, self.extra_ms = multiple, extra_ms

    def __call__(self, function: Callable[[], Any]) -> float:
        with Operations() as seen, torch.no_grad():
            function()
        macs = sum(
            positions * rest * self._padded(inputs) * self._padded(outputs)
            for positions, inputs, outputs, rest in seen.found
        )
        spent: float = self.extra_ms + len(seen.found) * self.overhead_ms + macs / self.macs_per_ms
        return spent

    def _padded(self, channels: int) -> int:
        return -(-channels // self.multiple) * self.multiple


class Operations(TorchDispatchMode):
    """Records (positions, inputs, outputs, kernel) of convolutions and matrix products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[tuple[int, int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "convolution":
            weight = args[1]
            outputs, inputs, *kernel = weight.shape
            self.found.append((result.numel() // outputs, inputs, outputs, math.prod(kernel)))
        elif name in ("mm", "addmm", "bmm", "baddbmm"):
            left = args[1] if name in ("addmm", "baddbmm") else args[0]
            outputs = result.shape[-1]
            self.found.append((result.numel() // outputs, left.shape[-1], outputs, 1))
        return result

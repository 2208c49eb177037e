"""What a user asks of a search beside model, data and budget."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Settings"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The fields of the same names of `rankopt.strategy.Problem`, which describes them."""

    seed: int = 0
    deadline: float | None = None
    fisher: bool = False
    asymmetric: bool = False
    round_to: int = 1
    rounding: str = "down"
    progress: bool | None = None

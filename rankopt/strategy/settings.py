"""What a user asks of a search beside model, data and budget."""

from __future__ import annotations

from dataclasses import dataclass

from rankopt._utils.arguments import check_integer

__all__ = ["Settings"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The fields of the same names of `rankopt.strategy.Problem`, which describes them."""

    seed: int = 0
    deadline: float | None = None
    fisher: bool = False
    asymmetric: bool | str = False
    round_to: int = 1
    rounding: str = "down"
    progress: bool | None = None

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, 0)
        if self.progress not in (None, True, False):
            raise ValueError(f"progress={self.progress!r}: expected True, False or None")

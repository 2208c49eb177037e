"""One named check of a contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Check"]


@dataclass(frozen=True)
class Check:
    """One named check; call it to run it."""

    subject: str
    name: str
    run: Callable[[], None]

    def __call__(self) -> None:
        try:
            self.run()
        except AssertionError as error:
            raise AssertionError(f"{self.subject}: {self.name}: {error}") from error

    def __str__(self) -> str:
        return f"{self.subject}-{self.name}"

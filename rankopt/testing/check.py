"""One named check of a contract."""

from __future__ import annotations

import sys
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
        except Exception as error:
            if sys.version_info >= (3, 11):
                error.add_note(f"raised in the check {self.subject}: {self.name}")
            raise

    def __str__(self) -> str:
        return f"{self.subject}-{self.name}"

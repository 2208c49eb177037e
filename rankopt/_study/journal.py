"""Journal files that survive a write that was cut short."""

from __future__ import annotations

import os
from typing import Any, BinaryIO, Final

from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import get_lock_file

__all__ = ["Journal"]

BLOCK: Final = 4096


class Journal(JournalFileBackend):
    """Optuna's journal file, whose last line is taken away where it was not finished.

    A full disk or a killed process can leave half a line. The next line would be appended
    to it, and no process could read the file from there on.
    """

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append whole lines, or none where the last one does not fit."""
        with get_lock_file(self._lock), open(self._file_path, "r+b") as file:
            _drop_unfinished(file)
        try:
            super().append_logs(logs)
        except OSError:
            with get_lock_file(self._lock), open(self._file_path, "r+b") as file:
                _drop_unfinished(file)
            raise


def _drop_unfinished(file: BinaryIO) -> None:
    """Cut a file after its last line break."""
    size = end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - BLOCK)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        file.truncate(end)

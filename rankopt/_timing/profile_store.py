"""Measured layer times on disk: SQLite, shared by processes, never trusted blindly."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from pathlib import Path
from typing import Any, Final

from rankopt._utils.locks import turn
from rankopt.errors import warn

__all__ = ["CONDITIONS", "ProfileStore", "cache_folder"]

SCHEMA_VERSION: Final = 1
# "RkOp": tells our file from anyone else's SQLite database.
APPLICATION_ID: Final = 0x526B4F70
FILE_NAME: Final = "profile.sqlite"
BUSY_SECONDS: Final = 30.0
# What a time depends on besides the layer and its ranks.
CONDITIONS: Final = ("device", "torch", "dtype", "memory_format", "threads", "mode", "settings")

_COLUMNS: Final = (*CONDITIONS, "layer", "chain")
_CREATE: Final = f"""
CREATE TABLE IF NOT EXISTS timings (
  {", ".join(f"{column} TEXT NOT NULL" for column in _COLUMNS)},
  value TEXT NOT NULL,
  PRIMARY KEY ({", ".join(_COLUMNS)})
) WITHOUT ROWID"""
_WHERE: Final = " AND ".join(f"{column} = ?" for column in (*CONDITIONS, "layer"))


class _UnusableError(Exception):
    """A file that holds no table of ours; the text says why."""


def cache_folder() -> Path:
    """Where measurements are kept: ``$RANKOPT_CACHE``, or the platform's user cache folder."""
    chosen = os.environ.get("RANKOPT_CACHE")
    if chosen:
        return Path(chosen)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "rankopt"


class ProfileStore:
    """Key-value storage of layer times.

    Several processes may read and write one file (write-ahead log). A file that is
    damaged, of another program or of a newer rankopt is renamed, with a warning, and
    a new one begun; where nothing can be written, times are held in memory, with a
    warning.

    Args:
        path: The file; None holds everything in memory.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)
        self._connection = self._open()

    def rows(self, conditions: Mapping[str, str], layer: str) -> dict[str, Any]:
        """Chain to value of every stored time of one layer under `conditions`."""
        key = [conditions[column] for column in CONDITIONS]
        query = f"SELECT chain, value FROM timings WHERE {_WHERE}"
        try:
            found = self._connection.execute(query, [*key, layer]).fetchall()
        except sqlite3.DatabaseError as error:
            self._recover(str(error))
            return {}
        values: dict[str, Any] = {}
        for chain, text in found:
            with suppress(ValueError, TypeError):  # no JSON: as if it had not been timed
                values[chain] = json.loads(text)
        return values

    def put(self, conditions: Mapping[str, str], layer: str, values: Mapping[str, Any]) -> None:
        """Store times by chain; all of them or, if the process dies, none."""
        key = [conditions[column] for column in CONDITIONS]
        rows = [[*key, layer, chain, json.dumps(value)] for chain, value in values.items()]
        marks = ", ".join("?" for _ in range(len(_COLUMNS) + 1))
        for attempt in range(2):
            try:
                with self._connection:
                    self._connection.executemany(
                        f"INSERT OR REPLACE INTO timings VALUES ({marks})", rows
                    )
                return
            except sqlite3.DatabaseError as error:
                if attempt == 0:
                    self._recover(str(error))

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def __del__(self) -> None:
        with suppress(AttributeError):  # opening it may have failed
            self._connection.close()

    def _open(self) -> sqlite3.Connection:
        if self.path is None:
            return _memory()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            found = _identity(self.path)
            try:
                return _connect(self.path)
            except _UnusableError as error:
                self._set_aside(str(error), found)
                return _connect(self.path)
        except (OSError, sqlite3.Error, _UnusableError) as error:
            warn(
                f"{self.path} cannot be written ({error}); layer times are kept in memory and "
                "measured again next time; set RANKOPT_CACHE to a folder that can be written"
            )
            self.path = None
            return _memory()

    def _recover(self, why: str) -> None:
        """After an error in use: begin a new file if this one is damaged."""
        self._connection.close()
        self._connection = self._open()
        if self.path is None:
            return
        found = _identity(self.path)
        try:
            with closing(_connect(self.path)) as fresh:
                fresh.execute("SELECT chain, value FROM timings").fetchall()
        except (sqlite3.Error, _UnusableError):
            self._connection.close()
            self._set_aside(why, found)
            self._connection = self._open()

    def _set_aside(self, why: str, found: tuple[int, int] | None) -> None:
        """Rename the file that was found unusable, unless another process has done so.

        Args:
            why: What is wrong with it.
            found: `_identity` of that file.
        """
        assert self.path is not None
        kept = self.path.with_name(f"{self.path.name}.set-aside-{time.time_ns()}")
        with _turn_at(self.path):
            if found is None or _identity(self.path) != found:
                return  # another process was faster, and what lies there now is its good file
            # The log first: once the file is gone, another process may begin one with a log.
            for suffix in ("-wal", "-shm", ""):
                with suppress(FileNotFoundError):
                    os.replace(f"{self.path}{suffix}", f"{kept}{suffix}")
        warn(
            f"the cache of layer times {self.path} cannot be used ({why}); "
            f"it was renamed to {kept.name} and a new one is begun"
        )


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from another that takes its name; None where there is none."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


def _turn_at(path: Path) -> AbstractContextManager[None]:
    """Hold a lock beside a file, where its folder can hold one, until the block ends."""
    try:
        return turn(os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600))
    except OSError:  # nothing can be renamed there either
        return nullcontext()


def _memory() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    connection.execute(_CREATE)
    return connection


def _connect(path: Path) -> sqlite3.Connection:
    """Open `path`, with the table if it is new; `_UnusableError` if it holds something else."""
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, check_same_thread=False)
    try:
        try:
            _write_ahead(connection)
            _prepare(connection)
        except sqlite3.OperationalError:  # locked, read-only, disk full: not the file's fault
            raise
        except sqlite3.DatabaseError as error:
            raise _UnusableError(str(error)) from error
    except BaseException:
        connection.close()
        raise
    return connection


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Readers and one writer at a time; SQLite does not wait for this lock by itself."""
    until = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.02)
    connection.execute("PRAGMA synchronous=NORMAL")


def _prepare(connection: sqlite3.Connection) -> None:
    with connection:
        connection.execute("BEGIN IMMEDIATE")  # two processes may find the file empty at once
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        owner = connection.execute("PRAGMA application_id").fetchone()[0]
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
        if not tables and version == owner == 0:
            connection.execute(_CREATE)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            return
    if owner != APPLICATION_ID:
        raise _UnusableError("it is a database of another program")
    if version != SCHEMA_VERSION:
        age = "newer" if version > SCHEMA_VERSION else "older"
        raise _UnusableError(f"its schema {version} is {age} than this rankopt's {SCHEMA_VERSION}")
    if "timings" not in tables:
        raise _UnusableError("its table is missing")

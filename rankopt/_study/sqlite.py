"""SQLite files of studies: their URLs, one transaction at a time, and reading without writing."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from rankopt.errors import StudyError

if TYPE_CHECKING:
    import sqlalchemy

__all__ = ["file_url", "holds_studies", "path_in", "read_only_url", "serialise", "writable"]


def file_url(path: str) -> str:
    """The URL of a file, whatever its name holds, as Optuna takes it: a format string.

    Raises:
        StudyError: SQLAlchemy would take part of the name for something else.
    """
    import sqlalchemy

    url = sqlalchemy.URL.create("sqlite", database=path)
    if path_in(str(url)) != path:
        raise StudyError(
            f"storage {path}: SQLAlchemy {sqlalchemy.__version__} misreads the name of this file "
            "in a URL; rename it, or upgrade SQLAlchemy to 2.1, which takes any name"
        )
    return _escaped(url)


def path_in(url: str) -> str:
    """The file that a URL of SQLite names."""
    import sqlalchemy

    return sqlalchemy.make_url(url).database or ""


def writable(path: str) -> bool:
    """Whether a file, and beside it the write-ahead log, may be written or made."""
    target = Path(path).absolute()
    return os.access(target.parent, os.W_OK) and (not target.exists() or os.access(target, os.W_OK))


def read_only_url(path: str) -> str:
    """The URL to read an existing file by, as Optuna takes it."""
    import sqlalchemy

    name, options = _to_read(path)
    return _escaped(
        sqlalchemy.URL.create("sqlite", database=name, query={**options, "uri": "true"})
    )


def holds_studies(path: str) -> bool:
    """Whether an existing file has Optuna's tables; nothing is written, locks neither.

    Raises:
        sqlite3.Error: It cannot be read, or is no database.
    """
    name, options = _to_read(path)
    opened = sqlite3.connect(f"{name}?{urlencode(options)}", uri=True)
    with contextlib.closing(opened) as connection:
        found = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'studies'")
        return found.fetchone() is not None


def serialise(engine: Any) -> None:
    """One SQLite transaction at a time.

    SQLite has no ``SELECT … FOR UPDATE``: two workers could read that a trial waits, or that
    its worker died, and both act on it. Taking the write lock at the beginning excludes it.
    """
    from sqlalchemy import event

    def connected(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # the driver would otherwise begin by itself, too late
        # A write-ahead log spares two disk flushes per write; a killed process loses nothing.
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    def begun(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    event.listen(engine, "connect", connected)
    event.listen(engine, "begin", begun)
    engine.dispose()  # connections made before


def _to_read(path: str) -> tuple[str, dict[str, str]]:
    """A file as SQLite's URI, and options by which it is only read."""
    target = Path(path).absolute()
    options = {"mode": "ro"}
    if not Path(f"{target}-wal").exists():
        options["immutable"] = "1"  # nobody writes: no lock files, which it would make beside it
    return f"file:{quote(str(target))}", options


def _escaped(url: sqlalchemy.URL) -> str:
    return str(url).replace("{", "{{").replace("}", "}}")

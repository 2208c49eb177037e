"""Writing files so that nothing is ever half-written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rankopt.errors import RankoptError

__all__ = ["atomic_path", "atomic_paths", "check_writable", "write_text"]


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it there if the block succeeds.

    On any exception, Ctrl-C included, the temporary file is removed and an
    existing file at `path` stays as it was.

    Raises:
        RankoptError: The folder is missing or cannot be written.
    """
    target = Path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise _unwritable(target, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _move(temporary, target)
    except OSError as error:
        raise RankoptError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_paths(path: str | os.PathLike[str]) -> Iterator[Path]:
    """As `atomic_path`, for formats that write more files beside the one they are given.

    The temporary path has the final name, in a folder of its own, as files may name each other.
    What was written beside it is moved first.

    Raises:
        RankoptError: The folder is missing or cannot be written.
    """
    target = Path(path)
    try:
        holder = tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise _unwritable(target, error) from error
    with holder as folder:
        temporary = Path(folder) / target.name
        yield temporary
        try:
            for part in sorted(Path(folder).iterdir(), key=lambda part: part == temporary):
                _move(part, target.with_name(part.name))
        except OSError as error:
            raise RankoptError(f"cannot write {target}: {error.strerror or error}") from error


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a file that cannot be written, before the work whose result it is to hold.

    Raises:
        RankoptError: It is a folder, or lies in none that exists and is writable.
    """
    target = Path(path)
    if target.is_dir():
        raise RankoptError(f"cannot write {target}: it is a folder; name a file in it")
    try:
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise _unwritable(target, error) from error


def _unwritable(target: Path, error: OSError) -> RankoptError:
    return RankoptError(
        f"cannot write {target}: {error.strerror or error}; "
        "choose a folder that exists and is writable"
    )


def _move(temporary: Path, target: Path) -> None:
    """Put a complete file in its place, with the permissions of a new one."""
    with temporary.open("r+b") as written:  # Windows syncs only what may be written
        os.fsync(written.fileno())
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)
    temporary.replace(target)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")

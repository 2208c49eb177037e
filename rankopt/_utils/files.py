"""Writing files so that nothing is ever half-written."""

from __future__ import annotations

import os
import stat
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
    existing file at `path` stays as it was. A symbolic link stays one: the file
    it leads to is replaced.

    Raises:
        RankoptError: The folder is missing or cannot be written, or `path` is a folder, a
            device or a pipe.
    """
    target = _regular(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _move(temporary, target)
    except OSError as error:
        raise RankoptError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_paths(path: str | os.PathLike[str]) -> Iterator[Path]:
    """As `atomic_path`, for formats that write more files beside the one they are given.

    The temporary path has the final name, in a folder of its own, as files may name each other.
    What was written beside it is moved first.

    Raises:
        RankoptError: See `atomic_path`.
    """
    target = _regular(path)
    try:
        holder = tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise _unwritable(path, error) from error
    with holder as folder:
        temporary = Path(folder) / target.name
        yield temporary
        try:
            for part in sorted(Path(folder).iterdir(), key=lambda part: part == temporary):
                _move(part, _regular(target.with_name(part.name)))
        except OSError as error:
            raise RankoptError(f"cannot write {path}: {error.strerror or error}") from error


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a file that cannot be written, before the work whose result it is to hold.

    Raises:
        RankoptError: It is a folder, a device or a pipe, or lies in no folder that exists and
            is writable.
    """
    target = _regular(path)
    try:
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise _unwritable(path, error) from error


def _regular(path: str | os.PathLike[str]) -> Path:
    """The file that `path` leads to, which is a regular one or not there yet.

    Moving a file onto a device or a pipe would replace it, for every program on the machine.
    """
    target = Path(os.path.realpath(path))
    try:
        mode = target.stat().st_mode
    except OSError:  # not there yet; a folder that cannot be read is reported on writing
        return target
    if stat.S_ISDIR(mode):
        raise RankoptError(f"cannot write {path}: it is a folder; name a file in it")
    if not stat.S_ISREG(mode):
        raise RankoptError(
            f"cannot write {path}: it is a device, pipe or socket, and writing would replace it; "
            "name a regular file"
        )
    return target


def _unwritable(path: str | os.PathLike[str], error: OSError) -> RankoptError:
    return RankoptError(
        f"cannot write {path}: {error.strerror or error}; "
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

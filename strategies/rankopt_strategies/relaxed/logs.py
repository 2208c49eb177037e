"""Where the steps of a search go while it runs: a file of JSON lines, TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankopt._utils.strict_json import strict_json
from rankopt.errors import MissingDependency, RankoptError

__all__ = ["StepLog"]

# Entries of a step with one value per site, and what TensorBoard files them under.
PER_SITE = ("kept", "surest", "ranks")


class StepLog:
    """Writes each step of a search; does nothing without a destination.

    Args:
        path: A file for one line of JSON per step; replaced.
        tensorboard: A folder for TensorBoard's event files.
        sites: Names, in the order of every per-site list.

    Raises:
        MissingDependency: `tensorboard` is asked for and not installed.
        RankoptError: `path` cannot be written.
    """

    def __init__(self, path: str | None, tensorboard: str | None, sites: Sequence[str]) -> None:
        self._path, self._folder, self._sites = path, tensorboard, tuple(sites)
        self._make_writer = None if tensorboard is None else _summary_writer()
        self._file: Any = None
        self._writer: Any = None

    def __enter__(self) -> StepLog:
        if self._path is not None:
            try:
                self._file = Path(self._path).open("w", encoding="utf-8")
            except OSError as error:
                raise RankoptError(f"cannot write log={self._path!r}: {error.strerror}") from error
        return self

    def __exit__(self, *_: object) -> None:
        for held in (self._file, self._writer):
            if held is not None:
                held.close()

    def begin(self, steps: Sequence[Mapping[str, Any]]) -> None:
        """Start after `steps`, those of a run that is gone on with.

        The file gets them again; of TensorBoard's events later ones are dropped.
        """
        if self._make_writer is not None:
            try:
                self._writer = self._make_writer(self._folder, purge_step=len(steps))
            except OSError as error:
                raise RankoptError(
                    f"cannot write tensorboard={self._folder!r}: {error.strerror}"
                ) from error
        for step in steps:
            self._write(step)

    def add(self, step: Mapping[str, Any]) -> None:
        """Write one step."""
        self._write(step)
        if self._writer is None:
            return
        for name, value in scalars(step, self._sites).items():
            self._writer.add_scalar(name, value, step["step"])
        self._writer.flush()

    def _write(self, step: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(strict_json(step) + "\n")
            self._file.flush()


def scalars(step: Mapping[str, Any], sites: Sequence[str]) -> dict[str, float]:
    """The numbers of a step under flat names.

    Example:
        >>> scalars({"step": 0, "loss": 0.5, "cost": {"macs": 0.9}, "kept": [0.4]}, ["conv"])
        {'loss': 0.5, 'cost/macs': 0.9, 'kept/conv': 0.4}
    """
    found: dict[str, float] = {}
    for name, value in step.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{axis}": share for axis, share in value.items()}
        elif name in PER_SITE:
            found |= {f"{name}/{site}": x for site, x in zip(sites, value, strict=True)}
        elif name not in ("step", "prices"):
            found[name] = value
    return {name: value for name, value in found.items() if value is not None}


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependency(
            "tensorboard= needs tensorboard: pip install 'rankopt[tensorboard]'"
        ) from error
    return SummaryWriter

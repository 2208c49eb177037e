"""What a training run leaves in its folder: a checkpoint to go on from, and a record to read.

Both are replaced atomically after every epoch, so a run that is killed at any time
goes on from the end of its last complete epoch.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from rankopt._build.provenance import plan_of
from rankopt._model import measure
from rankopt._utils.files import atomic_path, write_text
from rankopt._utils.locks import alone
from rankopt._utils.strict_json import strict_json
from rankopt.errors import CheckpointError, RankoptError

__all__ = [
    "CHECKPOINT",
    "RECORD",
    "check_kept",
    "copied",
    "fingerprint",
    "held",
    "load_state",
    "put_back",
    "save_state",
    "sole",
    "write_record",
]

SCHEMA: Final = "rankopt.training/3"
CHECKPOINT: Final = "training.pt"
RECORD: Final = "record.jsonl"


def fingerprint(model: nn.Module) -> dict[str, str | None]:
    """What identifies the model a checkpoint belongs to."""
    plan = plan_of(model)
    decisions = None
    if plan is not None:
        text = json.dumps([decision.to_dict() for decision in plan], sort_keys=True)
        decisions = hashlib.sha256(text.encode()).hexdigest()[:32]
    return {"plan": decisions, "model": measure.structure_digest(model)}


def held(model: nn.Module) -> dict[str, Any]:
    """All that a model holds: its state, and buffers that no state has.

    With the versions of its modules: some cannot load a state without, such as torchvision's
    MNASNet.
    """
    state: dict[str, Any] = model.state_dict()
    state.update((name, owner._buffers[key].detach()) for name, owner, key in _unsaved(model))
    return state


def copied(model: nn.Module) -> dict[str, Any]:
    """What a model holds, as later steps leave it."""
    state = held(model)
    for key, value in state.items():
        state[key] = value.clone() if isinstance(value, Tensor) else value
    return state


@torch.no_grad()
def put_back(model: nn.Module, kept: Mapping[str, Any]) -> None:
    """Give a model what `copied` kept of it."""
    state = OrderedDict(kept)
    state._metadata = getattr(kept, "_metadata", None)  # type: ignore[attr-defined]
    unsaved = {name for name, _, _ in _unsaved(model)}
    for name, owner, key in list(_buffers(model)):
        buffer = state.pop(name, None) if name in unsaved else state.get(name)
        current = owner._buffers[key]
        if not isinstance(buffer, Tensor):  # of an older checkpoint, or named by a hook
            continue
        if name not in unsaved and buffer.shape == current.shape:  # loading does it
            continue
        buffer = buffer.to(current.device)
        if buffer.shape != current.shape or buffer.dtype != current.dtype:
            owner._buffers[key] = buffer.clone()
        elif not torch.equal(buffer, current):  # in place, as others may refer to it
            current.copy_(buffer)
    model.load_state_dict(state)


def _buffers(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """(name, module, name in it)."""
    for prefix, owner in model.named_modules():
        for key in sorted(owner._buffers):
            if owner._buffers[key] is not None:
                yield f"{prefix}.{key}" if prefix else key, owner, key


def _unsaved(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """Buffers with ``persistent=False``."""
    return (found for found in _buffers(model) if found[2] in found[1]._non_persistent_buffers_set)


@contextmanager
def sole(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder.

    Raises:
        CheckpointError: There is one.
    """
    with alone(folder) as got:
        if not got:
            raise CheckpointError(
                f"{folder} is in use by another run, which may be of this very training; wait "
                "until it has ended, or give another folder="
            )
        yield


def save_state(
    folder: Path, identity: Mapping[str, Any], state: Mapping[str, Any], name: str = CHECKPOINT
) -> None:
    """Write the checkpoint atomically; tensors and plain values only."""
    with atomic_path(folder / name) as temporary:
        try:
            torch.save(_plain({"schema": SCHEMA, "identity": dict(identity), **state}), temporary)
        except RuntimeError as error:  # of torch's writer, as on a full disk
            raise RankoptError(
                f"cannot write {folder / name}: {error}; is the disk full?"
            ) from error
        check_readable(temporary)


def check_kept(model: nn.Module, optimizer: Any) -> None:
    """Raise where a checkpoint of them could not be read back, before there is anything to lose.

    Raises:
        CheckpointError: See `check_readable`.
    """
    extra = {key: value for key, value in held(model).items() if not isinstance(value, Tensor)}
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    with BytesIO() as written:
        torch.save(_plain({"model": extra, "optimizer": groups}), written)
        written.seek(0)
        check_readable(written)


def check_readable(checkpoint: Any) -> None:
    """Raise unless the checkpoint, a path or an open file, holds tensors and plain values alone.

    Raises:
        CheckpointError: It holds objects of classes, which are not read back.
    """
    classes = torch.serialization.get_unsafe_globals_in_checkpoint(checkpoint)
    if classes:
        raise CheckpointError(
            f"a checkpoint would hold objects ({', '.join(sorted(classes))}), which cannot be read "
            "back; keep tensors, numbers and text in the optimiser's groups and state, and in "
            "extra state of modules, or train without folder="
        )


def _plain(value: Any) -> Any:
    """NumPy's numbers and enumerated ones as Python's: readers of checkpoints know no others."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Enum) and isinstance(value, (int, str)):
        return value.value
    if type(value) is dict:
        return {key: _plain(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(part) for part in value)
    return value


def load_state(
    folder: Path, identity: Mapping[str, Any], name: str = CHECKPOINT
) -> dict[str, Any] | None:
    """The checkpoint in `folder`, on the CPU; None if there is none.

    Raises:
        CheckpointError: The file is damaged, or was made by another run; the
            message names the first setting that differs.
    """
    path = folder / name
    for partial in folder.glob(f".{name}.*"):  # of a process that was killed while it wrote
        partial.unlink(missing_ok=True)
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # torch's reader of a damaged file may raise anything
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        raise CheckpointError(f"{path} is no checkpoint of this version of rankopt")
    made = state["identity"]
    for key, value in identity.items():
        if key in made and made[key] != value:
            raise CheckpointError(
                f"{path} was made with {key} {made[key]!r}, this run has {value!r}; use the "
                "same to go on with it, or another folder= to start anew"
            )
    return dict(state)


def make_folder(folder: Any) -> Path:
    """The folder, made if need be."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RankoptError(f"cannot make the folder {path}: {error.strerror}") from error
    return path


def write_record(
    folder: Path, start: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]]
) -> None:
    """One JSON object per line: the run's settings, then every epoch."""
    lines = [{"event": "start", **start}, *({"event": "epoch", **epoch} for epoch in epochs)]
    write_text(folder / RECORD, "".join(strict_json(line) + "\n" for line in lines))

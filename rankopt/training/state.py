"""What a training run leaves in its folder: a checkpoint to go on from, and a record to read.

Both are replaced atomically after every epoch, so a run that is killed at any time
goes on from the end of its last complete epoch.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from rankopt._build.provenance import plan_of
from rankopt._model import measure
from rankopt._utils.files import atomic_path, write_text
from rankopt._utils.strict_json import strict_json
from rankopt.errors import CheckpointError, RankoptError

__all__ = [
    "CHECKPOINT",
    "RECORD",
    "copied",
    "fingerprint",
    "held",
    "load_state",
    "put_back",
    "save_state",
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
    for name, owner, key in list(_unsaved(model)):
        buffer, current = state.pop(name, None), owner._buffers[key]
        if buffer is None:  # of an older checkpoint
            continue
        buffer = buffer.to(current.device)
        if buffer.shape != current.shape or buffer.dtype != current.dtype:
            owner._buffers[key] = buffer.clone()
        elif not torch.equal(buffer, current):  # in place, as others may refer to it
            current.copy_(buffer)
    model.load_state_dict(state)


def _unsaved(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """Buffers with ``persistent=False``: (name, module, name in it)."""
    for prefix, owner in model.named_modules():
        for key in sorted(owner._non_persistent_buffers_set):
            if owner._buffers.get(key) is not None:
                yield f"{prefix}.{key}" if prefix else key, owner, key


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


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's: the reader of checkpoints knows no others."""
    if isinstance(value, np.generic):
        return value.item()
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

"""Saving and loading compressed models: plan and weights in safetensors, nothing pickled."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from rankopt._build.provenance import change_since_built, plan_of
from rankopt._build.skeletons import build_empty
from rankopt._build.state import cast_unstored, filled, stored, unstored_dtypes
from rankopt._model import surgery
from rankopt._utils.arguments import check_integer
from rankopt._utils.files import atomic_path, check_writable, write_text
from rankopt.errors import CheckpointError, PlanError, RankoptError
from rankopt.plan import RankPlan

__all__ = ["check_target", "load", "load_plan", "save"]

MAX_SHARD_BYTES: Final = 5 * 10**9
_PLAN, _ALIASES, _LAYOUTS = "rankopt.plan", "rankopt.aliases", "rankopt.layouts"
_BUFFERS: Final = "rankopt.buffers"


def check_target(path: str | os.PathLike[str]) -> Path:
    """The path of a file to be written, before there is anything to write.

    Raises:
        CheckpointError: It has another suffix than ``.safetensors``, no folder to lie in, or the
            name of a model in shards that rankopt did not write.
        RankoptError: The folder cannot be written.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise CheckpointError(f"{target}: name the file *.safetensors")
    if not target.absolute().parent.is_dir():
        raise CheckpointError(f"{target}: its folder does not exist; create it first")
    check_writable(target)
    _shard_names(_index_of(target))
    return target


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    plan: RankPlan | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a compressed model and the plan it was built by.

    One safetensors file, or numbered shards and an index beside it above
    `max_shard_bytes`. Tied tensors are stored once. Files appear only when complete.

    Args:
        model: From `rankopt.apply` or `rankopt.load`, possibly trained since.
        path: Ends in ``.safetensors``.
        plan: Only for models built by other means; of others their own.
        max_shard_bytes: Largest file.

    Raises:
        CheckpointError: The model carries no plan, or another than `plan`, was given other
            parameters since it was built, holds state that is no plain tensor, has a state dict
            without its factors or with tensors that a hook made, or see `check_target`.
        RankoptError: The folder cannot be written.
        ValueError: `max_shard_bytes` is no positive integer.
    """
    surgery.check_model(model, swapped=path)
    check_integer("max_shard_bytes", max_shard_bytes, 1)
    target = Path(os.path.realpath(check_target(path)))  # shards lie beside where a link leads
    built_by = plan_of(model)
    plan = built_by if plan is None else plan
    if plan is None:
        raise CheckpointError(
            f"this {type(model).__name__} was not built by rankopt.apply or rankopt.load; "
            "pass the plan it was built by as plan="
        )
    if built_by is not None and _built(plan) != _built(built_by):
        raise CheckpointError(
            f"plan= is not the one this {type(model).__name__} was built by, so load would build "
            "another model from it; leave plan= out"
        )
    change = change_since_built(model) if built_by is not None else None
    if change is not None:
        raise CheckpointError(
            f"this {type(model).__name__} was changed since rankopt built it ({change}), so load "
            "could not rebuild it; change the original model and search on that, or keep this one "
            "by torch.save(model.state_dict(), ...)"
        )
    changed = [name for decision in plan.changes for name in decision.targets]
    tensors, aliases, layouts = stored(surgery.unwrap(model), changed)
    metadata = {
        "format": "pt",
        _PLAN: json.dumps(plan.to_dict(), allow_nan=False),
        _ALIASES: json.dumps(aliases),
        _LAYOUTS: json.dumps(layouts),
        _BUFFERS: json.dumps(unstored_dtypes(surgery.unwrap(model))),
    }
    shards = _shards(tensors, max_shard_bytes)
    index_path = _index_of(target)
    old = _shard_names(index_path)
    if len(shards) == 1:
        _write(target, shards[0], metadata)
        index_path.unlink(missing_ok=True)  # of an earlier, sharded save
        _unlink_shards(target, old)
        return
    names = _free_names(target, len(shards), old)
    located = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": metadata, "weight_map": located}
    try:
        for name, shard in zip(names, shards, strict=True):
            _write(target.with_name(name), shard, {"format": "pt"})
        write_text(index_path, json.dumps(index, indent=1))
    except BaseException:
        _unlink_shards(target, set(names) - _shard_names(index_path))
        raise
    _unlink_shards(target, old - set(names))
    target.unlink(missing_ok=True)  # of an earlier save in one file


def _built(plan: RankPlan) -> list[Any]:
    """What `load` builds by."""
    return [(decision.targets, decision.method, dict(decision.args)) for decision in plan.changes]


def _write(target: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_path(target) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # of a full disk, too
            raise RankoptError(f"cannot write {target}: {error}") from error


def _index_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.index.json")


def _shard_names(index_path: Path) -> set[str]:
    """The files that an earlier save's index names; none where there is no index.

    Raises:
        CheckpointError: The index is not one of rankopt's, and neither are its files.
    """
    try:
        content = json.loads(index_path.read_text(encoding="utf-8"))
        if _PLAN in content["metadata"]:
            return {name for name in content["weight_map"].values() if Path(name).name == name}
    except FileNotFoundError:
        return set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise CheckpointError(
        f"{index_path} belongs to another model, or is damaged, and would be replaced; choose "
        "another name or folder"
    )


def _free_names(target: Path, count: int, old: set[str]) -> list[str]:
    """Names of shards beside which whatever is there stays, and that no earlier index names."""

    def named(token: str) -> list[str]:
        numbers = range(1, count + 1)
        return [f"{target.stem}{token}-{n:05d}-of-{count:05d}.safetensors" for n in numbers]

    taken = any(name in old or target.with_name(name).exists() for name in named(""))
    return named(f"-{secrets.token_hex(4)}" if taken else "")


def _unlink_shards(target: Path, names: Iterable[str]) -> None:
    for name in names:
        target.with_name(name).unlink(missing_ok=True)


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Rebuild a compressed model from its file.

    Args:
        model: The original architecture, with any weights; not changed. What its state dict
            leaves out is taken from it.
        path: As given to `save`.

    Returns:
        The compressed model on `model`'s device, with the stored dtypes.

    Raises:
        CheckpointError: The file is missing, truncated or not one of rankopt's,
            or its tensors do not fit; the message names the first that does not. Also, a
            tensor that the state dict leaves out and `model` has no values for.
        PlanError: The file was made for another architecture.
    """
    surgery.check_model(model, swapped=path)
    metadata, tensors = _read(Path(path))
    plan = _plan_in(metadata, path)
    for alias, name in _texts_in(metadata, _ALIASES, path).items():
        if name not in tensors:
            raise CheckpointError(f"{path}: {alias} is an alias of {name}, which is missing")
        tensors[alias] = tensors[name]
    result = _skeleton(model, plan, tensors)
    layouts = _texts_in(metadata, _LAYOUTS, path)
    dtypes = _texts_in(metadata, _BUFFERS, path)
    device = surgery.device_of(model)
    if device.type == "meta":  # a skeleton: the values come from the file
        device = torch.device("cpu")
        lost = [name for name, buffer in result.named_buffers() if buffer.is_meta]
        absent = [name for name in lost if surgery.normalised(name) not in tensors]
        if absent:
            raise CheckpointError(
                f"{path}: buffer {absent[0]} is on the meta device and not in the file; "
                "build the model on the CPU"
            )
    result = filled(result, surgery.unwrap(model), tensors, layouts, device, path)
    cast_unstored(result, dtypes)
    return result


def load_plan(path: str | os.PathLike[str]) -> RankPlan:
    """The plan inside a file written by `save`, without the weights."""
    metadata, _ = _read(Path(path), weights=False)
    return _plan_in(metadata, path)


def _shards(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += nbytes
    return shards


def _read(path: Path, *, weights: bool = True) -> tuple[dict[str, str], dict[str, Tensor]]:
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; name a file that rankopt.save wrote")
    index = _index_of(path)
    if path.is_symlink() and not path.exists() and not index.exists():
        path = Path(os.path.realpath(path))
        index = _index_of(path)
    if not path.exists() and index.exists():
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
            metadata, located = (_texts(content, key) for key in ("metadata", "weight_map"))
            for name in located.values():
                if not name or Path(name).name != name:
                    raise ValueError(f"weight_map names {name!r}; shards lie beside the index")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{index} is damaged: {error}") from error
        tensors: dict[str, Tensor] = {}
        for name in sorted(set(located.values())) if weights else ():
            tensors.update(_read_file(path.with_name(name), weights=True)[1])
        return metadata, tensors
    return _read_file(path, weights=weights)


def _texts(content: Any, key: str) -> dict[str, str]:
    """An entry of an index, which maps names to texts."""
    found = content[key]
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise TypeError(f"{key} is no object of texts")
    return found


def _texts_in(
    metadata: Mapping[str, str], key: str, path: str | os.PathLike[str]
) -> dict[str, str]:
    """An entry of the metadata that maps names to texts; empty where there is none."""
    try:
        return _texts({key: json.loads(metadata.get(key, "{}"))}, key)
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its metadata are damaged: {key}: {error}") from error


def _read_file(path: Path, *, weights: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
    with _opened(path) as handle:
        metadata = dict(handle.metadata() or {})
        # Views of the file lie at any offset, and kernels differ for unaligned weights.
        names = handle.keys() if weights else ()
        tensors = {key: handle.get_tensor(key).clone() for key in names}
    return metadata, tensors


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            yield handle
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({error}); it may be truncated"
        ) from error


def _skeleton(model: nn.Module, plan: RankPlan, tensors: Iterable[str]) -> nn.Module:
    """What the plan makes of the model; all attention unpacked if only then the names fit."""
    result = build_empty(model, plan)
    names = set(tensors)
    if names <= _names(result):
        return result
    whole = build_empty(model, plan, whole=True)
    return whole if names <= _names(whole) else result


def _names(model: nn.Module) -> set[str]:
    return {surgery.normalised(raw) for raw in model.state_dict()}


def _plan_in(metadata: Mapping[str, str], path: str | os.PathLike[str]) -> RankPlan:
    text = metadata.get(_PLAN)
    if text is None:
        raise CheckpointError(f"{path} holds no rankopt plan; it was not written by rankopt.save")
    try:
        return RankPlan.from_json(text)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error

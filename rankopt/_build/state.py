"""The tensors of a model as files hold them, and back."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from rankopt._model import references, surgery
from rankopt.errors import CheckpointError

__all__ = ["cast_unstored", "filled", "stored", "unstored_dtypes"]

_LAYOUT_NAMES: Final = {
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}

_REGISTERED: Final = ("_parameters", "_buffers", "_modules")


def stored(
    model: nn.Module, changed: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, str]]:
    """Contiguous tensors, one per distinct storage view; aliases; memory formats.

    Args:
        model: From `rankopt.apply`, unwrapped.
        changed: Names of its chains, whose parameters are nowhere else.

    Raises:
        CheckpointError: The state dict holds what is no tensor of the model, or lacks a chain's.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    layouts: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    held = {*model.parameters(), *model.buffers()}
    for raw, kept in model.state_dict(keep_vars=True).items():
        value = kept.detach() if isinstance(kept, Tensor) else kept
        name = surgery.normalised(raw)
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name}: extra state of type {type(value).__name__} is no tensor; "
                "safetensors cannot hold it"
            )
        try:
            value.untyped_storage().data_ptr()
        except RuntimeError as error:
            raise CheckpointError(
                f"{name} is a {type(value).__name__} ({value.layout}), and safetensors holds plain "
                "tensors only; save the model before quantising it, and quantise what load returns"
            ) from error
        if value.is_meta:
            raise CheckpointError(f"{name} is on the meta device: it has no values to save")
        if kept not in held and not surgery.is_extra_state(name):
            raise CheckpointError(
                f"{name} in the state dict is no parameter or buffer of this "
                f"{type(model).__name__}, so load could not put it back: a hook or a "
                "_save_to_state_dict of its own made it; save the model without"
            )
        key = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        layout = _layout_of(value)
        if layout is not None:
            layouts[name] = layout
        contiguous = value.contiguous()
        # A slice of a larger storage is refused by safetensors: copy it out.
        whole = contiguous.untyped_storage().nbytes() == contiguous.numel() * value.element_size()
        tensors[name] = contiguous if whole else contiguous.clone()
    prefixes = tuple(f"{name}." if name else "" for name in changed)
    present = set(map(id, model.state_dict(keep_vars=True).values()))
    for name, parameter in model.named_parameters():
        if id(parameter) not in present and surgery.normalised(name).startswith(prefixes):
            raise CheckpointError(
                f"{surgery.normalised(name)} is a factor that the state dict of this "
                f"{type(model).__name__} leaves out, and no other model has it: keep the layer "
                "with ignore= in the search, or remove the hook"
            )
    return tensors, aliases, layouts


def _layout_of(value: Tensor) -> str | None:
    """The memory format as strides have it: 1x1 kernels are contiguous in both."""
    layout = {4: "channels_last", 5: "channels_last_3d"}.get(value.dim())
    if layout is None:
        return None
    plain, last = (
        torch.empty(value.shape, device="meta", memory_format=memory_format).stride()
        for memory_format in (torch.contiguous_format, _LAYOUT_NAMES[layout])
    )
    return layout if plain != last == value.stride() else None


def unstored_dtypes(model: nn.Module) -> dict[str, str]:
    """Dtypes of what the state dict leaves out: model.to(bfloat16) rounds it too."""
    present = set(map(id, model.state_dict(keep_vars=True).values()))
    return {
        surgery.normalised(name): str(tensor.dtype).removeprefix("torch.")
        for name, tensor in (*model.named_buffers(), *model.named_parameters())
        if id(tensor) not in present
    }


def cast_unstored(model: nn.Module, dtypes: Mapping[str, str]) -> None:
    """Give what the file does not hold the dtypes from `unstored_dtypes`."""
    for name, parameter in model.named_parameters():
        dtype = dtypes.get(surgery.normalised(name))
        if dtype is not None:
            parameter.data = parameter.data.to(_dtype(dtype))
    for name, buffer in list(model.named_buffers()):
        dtype = dtypes.get(surgery.normalised(name))
        if dtype is not None:
            owner, _, key = name.rpartition(".")
            model.get_submodule(owner)._buffers[key] = buffer.to(_dtype(dtype))


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"the file's metadata are damaged: {name!r} is no dtype of torch")
    return found


def filled(
    model: nn.Module,
    source: nn.Module,
    tensors: Mapping[str, Tensor],
    layouts: Mapping[str, str],
    device: torch.device,
    path: str | os.PathLike[str],
) -> nn.Module:
    """`model` with the stored values; parameters that its state dict leaves out from `source`."""
    slots = model.state_dict(keep_vars=True)
    names = {surgery.normalised(raw): raw for raw in slots}
    missing = [name for name in names if name not in tensors]
    unexpected = [name for name in tensors if name not in names]
    if missing or unexpected:
        what = f"lacks {missing[0]}" if missing else f"holds {unexpected[0]}, which has no place"
        raise CheckpointError(
            f"{path} {what} in this {type(model).__name__} "
            f"({len(missing)} missing and {len(unexpected)} unexpected tensors)"
        )
    values: dict[Tensor, Tensor] = {}
    first: dict[Tensor, str] = {}
    for name, raw in names.items():
        slot, value = slots[raw], tensors[name]
        if surgery.is_extra_state(name):
            continue
        if slot.shape != value.shape:
            raise CheckpointError(
                f"{path}: {name} is {list(value.shape)}, the model expects {list(slot.shape)}"
            )
        other = tensors[first.setdefault(slot, name)]
        same = other is value or (other.dtype == value.dtype and torch.equal(other, value))
        if not same:
            raise CheckpointError(
                f"{path} holds other values for {name} than for {first[slot]}, which are one "
                f"tensor in this {type(model).__name__}; give a model in which they are two"
            )
        value, layout = value.to(device), _LAYOUT_NAMES.get(layouts.get(name, ""))
        if layout is not None:
            value = torch.empty_like(value, memory_format=layout).copy_(value)
        values.setdefault(slot, _like(slot, value))
    given = {surgery.normalised(name): parameter for name, parameter in source.named_parameters()}
    for name, slot in model.named_parameters():
        held = given.get(surgery.normalised(name))
        if slot in values or held is None or held.is_meta:
            continue
        if held.shape == slot.shape:  # blocks that were merged have others
            values[slot] = _like(slot, held.detach().clone())
    result = surgery.clone(model, instead=values)
    _check_filled(result, path)
    for name, module in surgery.named_modules(result):
        if (state := f"{name}._extra_state".removeprefix(".")) in names:
            module.set_extra_state(tensors[state])
    return result


def _like(slot: Tensor, value: Tensor) -> Tensor:
    if isinstance(slot, nn.Parameter):
        return nn.Parameter(value, requires_grad=slot.requires_grad)
    return value


def _check_filled(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Raise `CheckpointError` for a tensor without values that anything in `model` refers to."""
    for name, module in surgery.named_modules(model):
        plain = {key: value for key, value in vars(module).items() if key not in _REGISTERED}
        for key, value in {**plain, **module._parameters, **module._buffers}.items():
            if isinstance(value, Tensor) and f"{key}_v" in module._parameters:
                continue  # recomputed on each call
            if any(isinstance(t, Tensor) and t.is_meta for t in references.held_in(value)):
                raise CheckpointError(
                    f"{path}: {f'{name}.{key}'.removeprefix('.')} is on the meta device and not "
                    f"in the file: the state dict of this {type(model).__name__} leaves it out; "
                    "load into a model that was built on the CPU"
                )

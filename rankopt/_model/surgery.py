"""Cloning module trees without copying weights, and swapping modules inside them."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from rankopt._model import references
from rankopt._utils.memory import give_back
from rankopt.errors import ModelError

__all__ = [
    "ancestors",
    "check_model",
    "clone",
    "device_of",
    "held_outside",
    "is_compiled",
    "is_extra_state",
    "memory_format_of",
    "named_modules",
    "normalised",
    "replace",
    "share_unchanged",
    "unwrap",
]

# Where modules come from whose forward only reads parameters.
READERS: Final = ("torch.nn.", "transformers.pytorch_utils")


def normalised(name: str) -> str:
    """`name` without the ``_orig_mod`` that torch.compile puts into paths.

    Example:
        >>> normalised("_orig_mod.layer1._orig_mod.conv")
        'layer1.conv'
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def is_extra_state(name: str) -> bool:
    """Whether a key of a state dict holds what a module's `get_extra_state` gave."""
    return name.rpartition(".")[2] == "_extra_state"


def check_model(model: Any, name: str = "model", *, swapped: Any = None) -> None:
    """Check what a user gave as a model.

    Args:
        model: Whatever was given.
        name: Of the argument.
        swapped: The argument after it, where users may have given both in the other order.

    Raises:
        ModelError: It is no module; says what to give in its place.
    """
    if isinstance(model, nn.Module):
        return
    got = type(model).__name__
    if isinstance(swapped, nn.Module):
        hint = "the arguments are in the other order, the model comes first"
    elif isinstance(model, type) and issubclass(model, nn.Module):
        got, hint = f"the class {model.__name__}", f"make one, such as {model.__name__}(...)"
    elif isinstance(model, Mapping):
        hint = "a state dict holds no layers: build the model and load_state_dict it"
    elif isinstance(model, (str, os.PathLike)):
        got, hint = f"{got} {os.fspath(model)!r}", "build the model and load its weights first"
    else:
        hint = "build the model first"
    raise ModelError(f"{name}: expected a torch.nn.Module, got {got}; {hint}")


def unwrap(model: nn.Module) -> nn.Module:
    """The plain module inside torch.compile, DataParallel or DDP wrappers.

    Raises:
        ModelError: It is no module.
    """
    check_model(model)
    found: Any = model
    while True:
        if isinstance(found, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            found = found.module
        elif _is_wrapped(found):
            found = found._orig_mod
        else:
            plain: nn.Module = found
            return plain


def is_compiled(model: nn.Module) -> bool:
    """Whether a call of a model runs what torch.compile made of it, wrapped or in place."""
    in_place = getattr(model, "_compiled_call_impl", None)
    return _is_wrapped(model) or in_place is not None


def _is_wrapped(model: nn.Module) -> bool:
    """Whether a module is what torch.compile returns; it alone imports the module asked for."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return compiler is not None and isinstance(model, compiler.OptimizedModule)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every (normalised name, module), shared modules under each of their names."""
    for name, module in model.named_modules(remove_duplicate=False):
        if name.rpartition(".")[2] == "_orig_mod":
            continue
        yield normalised(name), getattr(module, "_orig_mod", module)


def clone(
    model: nn.Module,
    *,
    share: Iterable[Tensor] = (),
    instead: Mapping[Tensor, Tensor] | None = None,
) -> nn.Module:
    """A deep copy whose tensors are shared, replaced or copied.

    Whatever refers to them does so in the copy too: tied parameters, lists, functions.

    Args:
        model: Any module.
        share: Tensors the copy refers to instead of copying.
        instead: Tensors of the model to those that the copy refers to instead.

    Raises:
        ModelError: The model holds something that cannot be copied.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in share}
    memo.update({id(tensor): other for tensor, other in (instead or {}).items()})
    for module in model.modules():
        # Neither tensors recomputed on each call (old-style weight norm) nor some sparse ones
        # can be deep-copied.
        for value in (*vars(module).values(), *module._buffers.values()):
            if not isinstance(value, Tensor) or id(value) in memo:
                continue
            if not value.is_leaf or value.layout != torch.strided:
                memo[id(value)] = value.detach().clone()
    try:
        copied = copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({error}); make it deep-copyable"
            + _uncopied(model, memo)
        ) from error
    references.follow(named_modules(copied), memo)
    return copied


def _uncopied(model: nn.Module, known: Mapping[int, Any]) -> str:
    """Which attribute it is that cannot be copied, if it is one of a module itself."""
    own = vars(nn.Module())
    for name, module in named_modules(model):
        for key, value in (*vars(module).items(), *module._buffers.items()):
            try:
                if key not in own:
                    copy.deepcopy(value, dict(known))
            except (TypeError, RuntimeError, AttributeError):
                where = f"{name}.{key}" if name else key
                return f": its attribute {where} is a {type(value).__name__}"
    return ""


def share_unchanged(copy: nn.Module, original: nn.Module) -> None:
    """Let a copy that has been run refer to the parameters it still has in common.

    A forward may write into its parameters (renormed embeddings, merged adapters), so a
    model is run as a copy; where the first run left them alone, and they belong to a module
    whose forward is known never to write, one of them is enough.
    """
    theirs = dict(named_modules(original))
    for name, module in named_modules(copy):
        known = type(module).__module__.startswith(READERS)
        writes = getattr(module, "max_norm", None) is not None  # an embedding that renorms
        held = theirs[name]._parameters if name in theirs and known and not writes else {}
        for key, mine in module._parameters.items():
            other = held.get(key)
            if mine is None or other is None or mine is other:
                continue
            alike = (mine.shape, mine.dtype, mine.device, mine.requires_grad) == (
                (other.shape, other.dtype, other.device, other.requires_grad)
            )
            untouched = mine._version == 0  # an adapter may have written and restored it
            if alike and untouched and torch.equal(mine, other):
                module._parameters[key] = other
    give_back()


def replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put new modules wherever the old ones stand, shared places included.

    Args:
        model: The tree to change in place.
        replacements: Old module to new module.

    Returns:
        The root: `model`, or its replacement if the root itself is replaced.
    """
    if model in replacements:
        return replacements[model]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            # A child compiled on its own is replaced with its wrapper.
            plain = getattr(child, "_orig_mod", child)
            if plain is not None and plain in replacements:
                parent._modules[name] = replacements[plain]
    return model


def held_outside(model: nn.Module) -> dict[nn.Module, str]:
    """Modules that plain attributes refer to beside the module tree, with where: ``Net.order``.

    Whoever calls them there is not reached by `replace`.
    """
    own = vars(nn.Module())
    return {
        held: f"{type(module).__name__}.{key}"
        for _, module in named_modules(model)
        for key, value in vars(module).items()
        if key not in own
        for held in references.held_in(value)
        if isinstance(held, nn.Module) and held is not module
    }


def ancestors(model: nn.Module, names: Iterable[str]) -> set[nn.Module]:
    """The modules on the paths to `names`, the named ones excluded."""
    prefixes = {name[:cut] for name in names for cut in range(len(name)) if name[cut] == "."} | {""}
    return {module for name, module in named_modules(model) if name in prefixes}


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU for an empty model."""
    check_model(model)
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def memory_format_of(weight: Tensor, like: Tensor) -> torch.memory_format:
    """The layout in which `like` is stored as `weight` is: channels-last or contiguous."""
    if like.dim() == weight.dim() and not weight.is_contiguous():
        for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if weight.dim() == dims and weight.is_contiguous(memory_format=layout):
                return layout
    return torch.contiguous_format

"""The shell's spellings of models, functions and inputs."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from textwrap import shorten
from typing import Any, Final

import torch
from torch import Tensor, nn

from rankopt._model import surgery
from rankopt.errors import ModelError, RankoptError
from rankopt.vision import import_torchvision

__all__ = ["default_input", "load_callable", "load_model", "parse_front", "parse_input"]

# Where training loops keep the state dict in a checkpoint.
_STATES: Final = ("state_dict", "model", "model_state_dict")
# Characters of each line of torch's message, which may name every layer.
LINE: Final = 200
# Integer inputs are token ids below this, which every vocabulary holds.
TOKEN_IDS = 100
_DTYPES: Final = {
    name: getattr(torch, name)
    for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
}


def load_callable(spec: str) -> Callable[..., Any]:
    """The object named ``path/to/file.py:name`` or ``package.module:name``.

    Raises:
        RankoptError: The spelling, the file or the name is wrong, or the
            file fails to import.
    """
    source, separator, name = spec.rpartition(":")
    if not separator or not source or not name:
        raise RankoptError(f"{spec!r}: expected FILE.py:NAME or package.module:NAME")
    try:
        module = _import_file(Path(source)) if source.endswith(".py") else _import_module(source)
    except RankoptError:
        raise
    except Exception as error:
        raise RankoptError(f"{source} fails to import: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        names = ", ".join(n for n in vars(module) if callable(getattr(module, n)) and n[0] != "_")
        raise RankoptError(f"{source} has no callable {name!r}; it has {names or 'none'}")
    return found  # type: ignore[no-any-return]


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise RankoptError(f"{path} does not exist")
    return _executed(path.resolve(), path.stat().st_mtime_ns)


@cache
def _executed(path: Path, changed_ns: int) -> Any:
    """A file's module: one for all options that name the file, so that they share its state."""
    name, loaded = path.stem, sys.modules.get(path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) != str(path):
        name = f"_file_{path.stem}"  # such as json.py, beside the one in use
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _search_in(path.parent)
    spec.loader.exec_module(module)
    return module


def _import_module(name: str) -> Any:
    _search_in(Path.cwd())  # a console script has its own folder there
    return importlib.import_module(name)


def _search_in(folder: Path) -> None:
    """Import from a folder from now on, as Python does from a script's; functions may, late."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def load_model(spec: str, weights: str | None = None, *, seed: int = 0) -> nn.Module:
    """The model a spec names, in eval mode.

    Args:
        spec: ``torchvision:NAME``, ``FILE.py:CALLABLE`` or ``package.module:CALLABLE``.
        weights: A ``.safetensors`` file or a torch file of plain tensors with
            the state dict, or a checkpoint that holds one; for torchvision also
            a weights name such as ``DEFAULT``.
        seed: Seeds the random initialisation, so that a model without trained
            weights is the same in every command.

    Raises:
        RankoptError: What is wrong with the spec, the function or the file.
    """
    torch.manual_seed(seed)
    remaining = weights
    if spec.startswith("torchvision:"):
        model, remaining = _torchvision_model(spec.partition(":")[2], weights)
    else:
        function = load_callable(spec)
        try:
            model = function()
        except Exception as error:
            raise ModelError(f"{spec} failed: {type(error).__name__}: {error}") from error
        if not isinstance(model, nn.Module):
            raise ModelError(f"{spec} returned a {type(model).__name__}, not a torch.nn.Module")
    if remaining is not None:
        _load_weights(model, Path(remaining))
    return model.eval()


def _torchvision_model(name: str, weights: str | None) -> tuple[nn.Module, str | None]:
    models = import_torchvision().models
    if name not in models.list_models(models):
        import difflib

        close = difflib.get_close_matches(name, models.list_models(models))
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ModelError(f"torchvision has no classification model {name!r}{hint}")
    named = weights is not None and weights in models.get_model_weights(name).__members__
    extra = {"init_weights": True} if name in ("googlenet", "inception_v3") and not named else {}
    try:
        model = models.get_model(name, weights=weights if named else None, **extra)
    except Exception as error:
        raise ModelError(f"torchvision:{name} failed: {error}") from error
    return model, None if named else weights


def _load_weights(model: nn.Module, path: Path) -> None:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        plain = surgery.unwrap(model)
        plain.load_state_dict(_fitting(state, plain))
    except Exception as error:
        lines = [shorten(line, LINE, placeholder=" ...") for line in str(error).splitlines()[:3]]
        raise ModelError(f"cannot load weights {path}: {' '.join(lines)}") from error


def _fitting(state: Any, model: nn.Module) -> Mapping[str, Any]:
    """The state dict inside a checkpoint, under the names that the model has for it."""
    if not isinstance(state, Mapping):
        raise ModelError(f"it holds a {type(state).__name__}, not a state dict")
    inner = [state[key] for key in _STATES if isinstance(state.get(key), Mapping)]
    if len(inner) == 1:
        state = inner[0]
    places = {surgery.normalised(name): name for name in model.state_dict()}
    named = {surgery.normalised(name): value for name, value in state.items()}
    wrapped = all(name.startswith("module.") for name in named)
    if wrapped and not any(name.startswith("module.") for name in places):
        named = {name.removeprefix("module."): value for name, value in named.items()}
    found = {places.get(name, name): value for name, value in named.items()}
    found = {**_tied(model, found), **found}
    return found if found.keys() != state.keys() else state  # which knows its versions


def _tied(model: nn.Module, found: Mapping[str, Any]) -> dict[str, Any]:
    """What is left out, as Hugging Face does, because the model has it under two names."""
    slots = model.state_dict(keep_vars=True)
    slots = {name: slot for name, slot in slots.items() if isinstance(slot, Tensor)}
    known = {id(slots[name]): value for name, value in found.items() if name in slots}
    return {name: known[id(slot)] for name, slot in slots.items() if id(slot) in known}


def parse_input(text: str) -> Tensor:
    """A random tensor of the shape ``1,3,224,224`` or ``2,128:int64``.

    Raises:
        RankoptError: The text is no shape, or the dtype is unknown.

    Example:
        >>> parse_input("2,8:int64").dtype
        torch.int64
    """
    shape_text, _, dtype_text = text.partition(":")
    dtype = _DTYPES.get(dtype_text or "float32")
    if dtype is None:
        raise RankoptError(
            f"input {text!r}: unknown dtype {dtype_text!r}; expected one of {', '.join(_DTYPES)}"
        )
    try:
        shape = [int(part) for part in shape_text.split(",")]
    except ValueError:
        shape = []
    if not shape or min(shape) < 1:
        raise RankoptError(f"input {text!r}: expected a shape such as 1,3,224,224[:dtype]")
    generator = torch.Generator().manual_seed(math.prod(shape))
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, TOKEN_IDS, shape, generator=generator).to(dtype)


def parse_front(text: str) -> tuple[str, int, int | None]:
    """A module and its phases of ``layer2:0:3``, as `Schedule.front` takes them.

    Raises:
        RankoptError: The text says something else.

    Example:
        >>> parse_front("layer2:4")
        ('layer2', 4, None)
    """
    module, *parts = text.split(":")
    try:
        phases = [int(part) for part in parts]
    except ValueError:
        phases = []
    rising = all(before < after for before, after in pairwise([-1, *phases]))
    if not module or not rising or len(phases) not in (1, 2):
        raise RankoptError(
            f"front {text!r}: expected MODULE:START or MODULE:START:END, counted from 0, such as "
            "layer2:0:3 for the first three epochs"
        )
    return module, phases[0], phases[1] if len(phases) == 2 else None


def default_input(spec: str) -> Tensor | None:
    """What a torchvision classifier was trained on; None for other models."""
    if not spec.startswith("torchvision:"):
        return None
    models = import_torchvision().models
    size = models.get_model_weights(spec.partition(":")[2]).DEFAULT.transforms().crop_size[0]
    return parse_input(f"1,3,{size},{size}")

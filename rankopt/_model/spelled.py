"""Settings in words, by which a folder tells one run from another in any later process."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from rankopt._model import measure

__all__ = ["spelled"]


def spelled(value: Any) -> str:
    """A setting that JSON has no word for, the same in every process.

    Functions by their name, tensors by dtype and shape, modules by type, plain attributes and a
    digest of what they hold, anything else by its repr without addresses.

    Example:
        >>> from functools import partial
        >>> spelled(partial(max, default=3))
        'partial(max, default=3)'
    """
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, nn.Module):
        plain = _plain(value)
        if value.state_dict() or len(list(value.modules())) > 1:
            plain["state"] = _state(value)
        return _called(type(value).__qualname__, (), plain)
    if isinstance(value, partial):
        return _called("partial", (value.func, *value.args), value.keywords)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {spelled(part)}' for key, part in value.items())}}}"
    if type(value) in (tuple, list):
        return f"({', '.join(map(spelled, value))})"
    if isinstance(value, (set, frozenset)):  # their order is another in every process
        return f"{{{', '.join(sorted(map(spelled, value)))}}}"
    if callable(value) and hasattr(value, "__qualname__"):
        return str(value.__qualname__)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _plain(module: nn.Module) -> dict[str, Any]:
    return {
        name: part
        for name, part in sorted(vars(module).items())
        if isinstance(part, (bool, int, float, str))
        and not name.startswith("_")
        and name != "training"
    }


def _state(module: nn.Module) -> str:
    """Digest of a module's values, and of the types and plain attributes of those inside it."""
    try:
        values = measure.weights_digest(module)
    except RuntimeError:  # quantised, lazy or on the meta device: nothing that can be read
        values = ""
    digest = hashlib.sha256(values.encode())
    for name, part in module.named_modules():
        digest.update(_called(f"{name}:{type(part).__qualname__};", (), _plain(part)).encode())
    return digest.hexdigest()[:16]


def _called(name: str, values: tuple[Any, ...], named: Mapping[str, Any]) -> str:
    parts = [*map(spelled, values), *(f"{key}={spelled(part)}" for key, part in named.items())]
    return f"{name}({', '.join(parts)})"

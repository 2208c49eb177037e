"""Which modules compute what a layer of torch computes, and what else hangs on them."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from torch import nn

__all__ = ["CONVS", "attached", "attributes", "known_class"]

CONVS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What a subclass may define and still be replaced by a chain: it is not asked for in a forward.
_HARMLESS: Final = {"__init__", "__annotate__", "__annotate_func__", "reset_parameters",
                    "extra_repr"}  # fmt: skip
_OWN: Final = frozenset(vars(nn.Module()))


def known_class(module: nn.Module) -> type[nn.Module] | None:
    """`nn.Linear` or a convolution, where a module's class is that or only builds it otherwise.

    Example:
        >>> class Orthogonal(nn.Linear):
        ...     def __init__(self, width):
        ...         super().__init__(width, width)
        ...         nn.init.orthogonal_(self.weight)
        >>> known_class(Orthogonal(8))
        <class 'torch.nn.modules.linear.Linear'>
    """
    bases: tuple[Any, ...] = (nn.Linear, *CONVS)
    cls: Any = type(module)
    return next((base for base in bases if _builds(cls, base)), None)


@cache
def _builds(cls: Any, base: Any) -> bool:
    """Whether `cls` inherits all that `base` computes, and adds nothing that others may call."""
    if cls is base:
        return True
    # torch's own subclasses mark what reads the weights past the module, or quantises it.
    if not issubclass(cls, base) or cls.__module__.startswith("torch."):
        return False
    added = [vars(c).items() for c in cls.__mro__ if c not in base.__mro__]
    return all(_harmless(name, value) for items in added for name, value in items)


def _harmless(name: str, value: Any) -> bool:
    if name in _HARMLESS or isinstance(value, staticmethod):
        return True
    return name.startswith("__") and name.endswith("__") and not callable(value)


def attached(module: nn.Module) -> str | None:
    """What hangs on a module and would be lost with it; None if nothing does."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(vars(module)[kind] for kind in hooks):
        return "hooks are attached to it"
    return "its forward is patched" if "forward" in vars(module) else None


def attributes(module: nn.Module) -> list[str]:
    """Public attributes that a layer has beside those its class of torch gives it.

    Example:
        >>> layer = nn.Linear(8, 8)
        >>> layer.gain = 0.5
        >>> attributes(layer)
        ['gain']
    """
    cls: Any = known_class(module)
    known = _given(cls)
    return [key for key in vars(module) if not key.startswith("_") and key not in known]


@cache
def _given(cls: Any) -> frozenset[str]:
    if cls is nn.Linear:
        return frozenset(vars(nn.Linear(1, 1, device="meta")))
    if cls in CONVS:
        return frozenset(vars(cls(1, 1, 1, device="meta")))
    return _OWN | {"nf", "nx"}  # transformers' Conv1D

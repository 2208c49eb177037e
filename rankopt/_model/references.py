"""Functions and weak references of a copied model, made to refer to the copy.

`copy.deepcopy` returns both as they are: a copy whose forward was wrapped by a decorator would
run the layers of the model that it was copied from.
"""

from __future__ import annotations

import copy
import dis
import weakref
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, lru_cache, partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Final

from torch import Tensor, nn

from rankopt.errors import ModelError

__all__ = ["follow", "held_in"]

_OWN: Final = frozenset(vars(nn.Module()))
_CACHED: Final = type(lru_cache(len))
_CONTAINERS: Final = (list, tuple, set, frozenset, dict)
_WEAK_DICTS: Final = (weakref.WeakValueDictionary, weakref.WeakKeyDictionary)
# What a global name must stand for to be looked at: a module, or what holds one directly.
_HOLDERS: Final = (nn.Module, Tensor, MethodType, partial, weakref.ReferenceType)


def follow(modules: Iterable[tuple[str, nn.Module]], copies: Mapping[int, Any]) -> None:
    """Let the attributes and hooks of a deep copy refer to the copy, in place.

    Functions are made anew around the copies of what they close over; cells that hold neither
    modules nor tensors of the original stay shared with it.

    Args:
        modules: The named modules of the copy.
        copies: The memo of `copy.deepcopy`: the id of an original to its copy.

    Raises:
        ModelError: An attribute leads to the original where it cannot be changed.
    """
    follower = _Follower(copies)
    for name, module in modules:
        for key, value in list(vars(module).items()):
            if key not in _OWN:
                vars(module)[key] = followed = follower.followed(value)
                if follower.leads(followed, globally=True):
                    raise ModelError(_refusal(f"{name}.{key}" if name else key, value))
            elif key.endswith("hooks"):  # in place: their handles refer to the dictionary
                for number, hook in value.items():
                    value[number] = follower.followed(hook)


def _refusal(where: str, value: Any) -> str:
    return (
        f"{where} is a {type(value).__name__} that would go on using the original model's layers "
        "or weights in a copy of it, for it finds them through a global variable or a weak "
        "dictionary; make it a method of the class, or set it once the model is compressed"
    )


def held_in(value: Any) -> Iterator[nn.Module | Tensor]:
    """Modules and tensors that a value leads to by containers, functions and references."""
    return _reached(value, globally=False)


class _Follower:
    """Makes anew what leads to originals; what is shared stays shared."""

    def __init__(self, copies: Mapping[int, Any]) -> None:
        self.copies = copies
        self.made: dict[int, Any] = {}
        self.replaced: list[Any] = []  # kept alive: `made` goes by their ids

    def leads(self, value: Any, *, globally: bool = False) -> bool:
        """Whether a value reaches a module or tensor that has a copy."""
        reached = _reached(value, globally=globally)
        return any(self.copies.get(id(held), held) is not held for held in reached)

    def followed(self, value: Any) -> Any:
        """The value, or one like it that leads to the copies."""
        for known in (self.made, self.copies):
            if id(value) in known:
                return known[id(value)]
        if isinstance(value, (nn.Module, Tensor)) or not self.leads(value):
            return value
        return self._remember(value, self._remade(value))

    def _remember(self, value: Any, new: Any) -> Any:
        self.made[id(value)] = new
        self.replaced.append(value)
        return new

    def _remade(self, value: Any) -> Any:
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, MethodType):
            return MethodType(self.followed(value.__func__), self.followed(value.__self__))
        if isinstance(value, weakref.ReferenceType):
            return weakref.ref(self.followed(value()), value.__callback__)
        if isinstance(value, partial):
            args, keywords = map(self.followed, value.args), self._values(value.keywords)
            new = type(value)(self.followed(value.func), *args, **keywords)
            vars(new).update(self._values(vars(value)))
            return new
        if isinstance(value, _CACHED):
            return lru_cache(**value.cache_parameters())(self.followed(value.__wrapped__))
        if isinstance(value, dict):
            new = self._remember(value, copy.copy(value))
            new.update(self._values(value))
            return new
        if isinstance(value, list):
            new = self._remember(value, copy.copy(value))
            new[:] = map(self.followed, value)
            return new
        if isinstance(value, (tuple, set, frozenset)):
            make = getattr(value, "_make", type(value))  # a named tuple's
            return make(map(self.followed, value))
        if isinstance(value, _WEAK_DICTS):
            return value
        new = self._remember(value, copy.copy(value))
        vars(new).update(self._values(vars(value)))
        return new

    def _values(self, mapping: Mapping[str, Any]) -> dict[str, Any]:
        return {key: self.followed(entry) for key, entry in mapping.items()}

    def _function(self, function: FunctionType) -> FunctionType:
        fresh = []
        cells = []
        for cell in function.__closure__ or ():
            if id(cell) not in self.made and any(map(self.leads, _contents(cell))):
                fresh.append(cell)
                self._remember(cell, CellType())
            cells.append(self.made.get(id(cell), cell))
        new = FunctionType(
            function.__code__, function.__globals__, function.__name__, closure=tuple(cells)
        )
        self._remember(function, new)  # it may close over itself
        for cell in fresh:
            self.made[id(cell)].cell_contents = self.followed(cell.cell_contents)
        for key in ("__module__", "__qualname__", "__doc__", "__annotations__"):
            setattr(new, key, getattr(function, key))
        new.__defaults__ = self.followed(function.__defaults__)
        new.__kwdefaults__ = self.followed(function.__kwdefaults__)
        vars(new).update(self._values(vars(function)))
        return new


def _reached(value: Any, *, globally: bool) -> Iterator[nn.Module | Tensor]:
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (nn.Module, Tensor)):
            yield value
            continue
        waiting.extend(_parts(value))
        if globally and isinstance(value, FunctionType):
            named = (value.__globals__.get(name) for name in _global_names(value.__code__))
            waiting.extend(held for held in named if isinstance(held, _HOLDERS))


def _parts(value: Any) -> Iterable[Any]:
    """What a value holds; objects are looked into where they can be called, as wrappers can."""
    if value is None or isinstance(value, (str, bytes, int, float, type, ModuleType)):
        return ()
    if isinstance(value, FunctionType):
        cells = [part for cell in value.__closure__ or () for part in _contents(cell)]
        return (*cells, value.__defaults__, value.__kwdefaults__, *vars(value).values())
    if isinstance(value, MethodType):
        return (value.__func__, value.__self__)
    if isinstance(value, weakref.ReferenceType):
        return (value(),)
    if isinstance(value, partial):
        return (value.func, *value.args, *value.keywords.values(), *vars(value).values())
    if isinstance(value, _CACHED):
        return (value.__wrapped__,)
    if isinstance(value, _WEAK_DICTS):
        return (*value.keys(), *value.values())
    if isinstance(value, _CONTAINERS):
        return tuple(value.values() if isinstance(value, dict) else value)
    return tuple(getattr(value, "__dict__", {}).values()) if callable(value) else ()


def _contents(cell: CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # not assigned yet
        return ()


@cache
def _global_names(code: CodeType) -> frozenset[str]:
    """Names that a function looks up among its globals, inner functions' included."""
    read = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    inner = (_global_names(const) for const in code.co_consts if isinstance(const, CodeType))
    return frozenset(read.union(*inner))

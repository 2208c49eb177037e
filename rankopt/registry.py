"""Strategies and decompositions by name: entry points, loaded when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, Generic, TypeVar

from rankopt._decompositions.base import Decomposition
from rankopt.errors import RegistryError
from rankopt.strategy import Strategy

__all__ = ["Registry", "decompositions", "strategies"]

T = TypeVar("T")


@dataclass(frozen=True)
class _Registered:
    """A class registered in this process rather than by an installed distribution."""

    name: str
    target: type[Any]

    def load(self) -> type[Any]:
        return self.target


class Registry(Generic[T]):
    """Classes found under one entry-point group, plus those registered by hand.

    Args:
        group: Entry-point group, such as ``rankopt.strategies``.
        kind: What an entry is, for messages.
        base: The class every entry derives from.
    """

    def __init__(self, group: str, kind: str, base: type[T]) -> None:
        self.group, self.kind, self.base = group, kind, base
        self._registered: dict[str, _Registered] = {}

    @cached_property
    def _installed(self) -> dict[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=self.group):
            known = found.setdefault(point.name, [])
            # An editable install beside a wheel lists the same object twice.
            if all(point.value != other.value for other in known):
                known.append(point)
        return found

    def names(self) -> tuple[str, ...]:
        """Every known name, sorted; nothing is imported."""
        return tuple(sorted({*self._installed, *self._registered}))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __repr__(self) -> str:
        return f"<Registry {self.group}: {', '.join(self) or 'empty'}>"

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator that adds a class under `name` in this process.

        Raises:
            RegistryError: The name is taken, or is none.
        """
        if not isinstance(name, str):
            raise RegistryError(
                f"register takes the name of a {self.kind}, such as @register('mine'), not {name!r}"
            )

        def add(cls: type[T]) -> type[T]:
            if name in self._registered or name in self._installed:
                raise RegistryError(
                    f"{self.kind} {name!r} is registered already by {self.origin(name)}; "
                    "choose another name"
                )
            self._registered[name] = _Registered(name, cls)
            return cls

        return add

    def unregister(self, name: str) -> None:
        """Remove a class that `register` added."""
        self._registered.pop(name)

    def origin(self, name: str) -> str:
        """The distribution, or the module, that provides `name`."""
        if name in self._registered:
            return self._registered[name].target.__module__
        points = self._installed[name]
        return " and ".join(p.dist.name if p.dist is not None else p.value for p in points)

    def get(self, name: str) -> type[T]:
        """The class called `name`.

        Raises:
            RegistryError: Unknown, provided twice, failing to import, or not
                a class of the right kind.
        """
        points = self._installed.get(name, [])
        if len(points) > 1:
            raise RegistryError(
                f"{self.kind} {name!r} is provided by {self.origin(name)}; uninstall one of them"
            )
        source = self._registered.get(name) or (points[0] if points else None)
        if source is None:
            raise RegistryError(
                f"unknown {self.kind} {name!r}; known: {', '.join(self.names()) or 'none'}"
            )
        try:
            cls = source.load()
        except (Exception, SystemExit) as error:
            raise RegistryError(
                f"{self.kind} {name!r} of {self.origin(name)} failed to import: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise RegistryError(
                f"{self.kind} {name!r} of {self.origin(name)} is {cls!r}, "
                f"not a subclass of {self.base.__module__}.{self.base.__qualname__}"
            )
        return cls

    def create(self, spec: str | T, **settings: Any) -> T:
        """An instance: `spec` itself, or the class of that name with `settings`.

        Raises:
            RegistryError: As `get`, an unknown setting, or a class that cannot be made.
            ValueError: A setting out of range, from the class itself.
        """
        if isinstance(spec, self.base):
            if settings:
                raise RegistryError(f"{self.kind} {spec!r} is made already; put settings into it")
            return spec
        if isinstance(spec, type) and issubclass(spec, self.base):
            raise RegistryError(
                f"{spec.__name__} is the class of a {self.kind}, not an instance; write "
                f"{spec.__name__}(), with its settings if you like"
            )
        if not isinstance(spec, str):
            raise RegistryError(
                f"a {self.kind} is a name or an instance of {self.base.__name__}, not {spec!r}"
            )
        cls = self.get(spec)
        known = [field.name for field in fields(cls)] if is_dataclass(cls) else []
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise RegistryError(
                f"{self.kind} {spec!r} has no setting {', '.join(unknown)}; "
                f"it has {', '.join(known) or 'none'}"
            )
        try:
            return cls(**settings)
        except TypeError as error:
            raise RegistryError(
                f"{self.kind} {spec!r} of {self.origin(spec)} cannot be made: {error}"
            ) from error


strategies: Final = Registry("rankopt.strategies", "strategy", Strategy)  # type: ignore[type-abstract]
decompositions: Final = Registry(
    "rankopt.decompositions",
    "decomposition",
    Decomposition,  # type: ignore[type-abstract]
)

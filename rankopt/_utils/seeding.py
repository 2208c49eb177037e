"""Seeds for every generator that a user's code may draw from."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Final

import numpy as np
import torch

__all__ = ["kept_states", "random_sources", "seed_all", "seed_source"]

# Containers longer than this are data, not settings.
LONGEST: Final = 64
# Objects within objects: the transform of a data set in a subset in a data set, and its generator.
DEEPEST: Final = 6
_KINDS: Final = (
    torch.Generator, np.random.Generator, np.random.RandomState, random.Random,
)  # fmt: skip
_SEEN_BY_SEED_ALL: Final = (
    torch.default_generator, np.random.mtrand._rand, random._inst,
)  # fmt: skip


def seed_all(seed: int) -> None:
    """Seed the global generators of torch, Python and NumPy, which takes 32 bits of it."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_sources(holders: Iterable[Any], without: tuple[type, ...] = ()) -> list[Any]:
    """Generators of torch, NumPy and Python that objects, and what is in them, hold.

    Found in attributes, and in lists, tuples and dictionaries that are short; not in closures,
    and not the global ones.

    Args:
        holders: Where to look, in this order.
        without: Types of objects not to look into.
    """
    found: dict[int, Any] = {}
    seen: set[int] = set()
    layer = list(holders)
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for one in layer:
            if id(one) in seen or isinstance(one, without):
                continue
            seen.add(id(one))
            if isinstance(one, _KINDS):
                found[id(one)] = one
            else:
                inner.extend(_held(one))
        layer = inner
    apart = {id(source) for source in _SEEN_BY_SEED_ALL}
    return [
        source
        for key, source in found.items()
        if key not in apart and not isinstance(source, random.SystemRandom)
    ]


def _held(one: Any) -> Collection[Any]:
    """What an object holds that may hold generators, or be one."""
    if isinstance(one, (type, ModuleType, str, bytes, torch.Tensor, np.ndarray)):
        return ()
    if isinstance(one, Mapping):
        return list(one.values()) if type(one) is dict and len(one) <= LONGEST else ()
    if isinstance(one, (list, tuple)):
        return one if len(one) <= LONGEST else ()
    return list(getattr(one, "__dict__", {}).values())


def seed_source(source: Any, seed: int) -> None:
    """Seed one of `random_sources`."""
    if isinstance(source, torch.Generator):
        source.manual_seed(seed)
    elif isinstance(source, np.random.Generator):
        bits = source.bit_generator
        bits.state = type(bits)(seed).state
    elif isinstance(source, np.random.RandomState):
        source.set_state(np.random.RandomState(seed % 2**32).get_state())
    else:
        source.seed(seed)


@contextmanager
def kept_states(sources: Iterable[Any]) -> Iterator[None]:
    """Leave `random_sources` as they were."""
    states = [(source, _state(source)) for source in sources]
    try:
        yield
    finally:
        for source, state in states:
            if isinstance(source, np.random.Generator):
                source.bit_generator.state = state
            elif isinstance(source, random.Random):
                source.setstate(state)
            else:
                source.set_state(state)


def _state(source: Any) -> Any:
    if isinstance(source, np.random.Generator):
        return source.bit_generator.state
    return source.getstate() if isinstance(source, random.Random) else source.get_state()

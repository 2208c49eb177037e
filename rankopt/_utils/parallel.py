"""Independent factorisations on all cores: one thread per layer beats threads inside LAPACK."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch

__all__ = ["for_each"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def for_each(
    function: Callable[[Item], Result], items: Sequence[Item], *, device: torch.device
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, function(item)) as results are ready.

    On the CPU items run in threads of one core each; on other devices, or for a
    single item, one after the other. An exception cancels what has not begun.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(items) < 2:
        yield from ((item, function(item)) for item in items)
        return
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        futures = {pool.submit(_without_grad, function, item): item for item in items}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _without_grad(function: Callable[[Item], Result], item: Item) -> Result:
    with torch.no_grad():  # the mode is per thread
        return function(item)


def largest_first(items: Iterable[Item], size: Callable[[Item], int]) -> list[Item]:
    """Items in the order that keeps all threads busy to the end."""
    return sorted(items, key=size, reverse=True)

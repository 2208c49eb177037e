"""Hooks that are gone afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch.utils.hooks import RemovableHandle

__all__ = ["hooked"]


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end, and where registering them one by one fails midway.

    Args:
        handles: What torch returns where a hook is registered.

    Example:
        >>> net, seen = nn.Linear(2, 2), []
        >>> with hooked(m.register_forward_hook(lambda *_: seen.append(1)) for m in [net]):
        ...     _ = net(torch.zeros(1, 2))
        >>> _ = net(torch.zeros(1, 2))
        >>> seen
        [1]
    """
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield

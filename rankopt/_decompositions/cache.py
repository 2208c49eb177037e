"""A bounded, content-addressed store of bases, so that nothing is factorised twice."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from typing import Final

from torch import Tensor

from rankopt._calibration.moments import Moments
from rankopt._decompositions.base import Basis, Decomposition
from rankopt._decompositions.weighed import WeighedBasis, weighed
from rankopt._model.measure import no_autocast, tensor_digest

__all__ = ["BasisCache", "clear_cache", "shared"]

DEFAULT_BYTES: Final = 512 * 2**20


class BasisCache:
    """Least recently used bases, without the weights they came from.

    Keys are the digest of the weight and the decomposition's settings, so an
    entry can never be stale; the weight is attached again on the way out.

    Args:
        max_bytes: Upper bound on what is held.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[tuple[str, bytes], Basis] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @no_autocast()
    def get(
        self, decomposition: Decomposition, weight: Tensor, moments: Moments | None = None
    ) -> Basis:
        """The basis of a canonical `weight` under `moments`, computed if it is not held."""
        known = b"" if moments is None else moments.key
        key = (repr(decomposition), tensor_digest(weight) + known + str(weight.device).encode())
        if moments is None or not moments.weighs:
            return self._found(key, decomposition, weight, moments)
        rows = weighed(weight, moments.output_root)
        return WeighedBasis(self._found(key, decomposition, rows, moments), weight, moments)

    def _found(
        self,
        key: tuple[str, bytes],
        decomposition: Decomposition,
        weight: Tensor,
        moments: Moments | None,
    ) -> Basis:
        with self._lock:
            held = self._entries.get(key)
            if held is not None:
                self._entries.move_to_end(key)
        basis = decomposition.prepare(weight, moments) if held is None else copy.copy(held)
        if held is None:
            self._put(key, basis)
        basis.weight = weight
        return basis

    def _put(self, key: tuple[str, bytes], basis: Basis) -> None:
        if basis.nbytes > self.max_bytes:
            return
        entry = copy.copy(basis)
        entry.weight = None
        with self._lock:
            if key not in self._entries:
                self._entries[key] = entry
                self._bytes += entry.nbytes
            while self._bytes > self.max_bytes:
                evicted = self._entries.popitem(last=False)[1]
                self._bytes -= evicted.nbytes
                evicted.release()  # problems that hold a copy keep its errors

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0


shared: Final = BasisCache()


def clear_cache(*, max_bytes: int | None = None) -> None:
    """Forget the factorisations that searches of this process share, and bound what follows.

    Searches and `rankopt.apply` keep the singular vectors and spectra of weights they have
    seen, up to 512 MiB and the least recently used ones going first, so that a second search
    of a model is fast. Nothing is ever stale; clear it to have the memory, or to time a search.
    Measured times of layers lie elsewhere, in the folder that ``RANKOPT_CACHE`` names.

    Args:
        max_bytes: Hold at most so many bytes from now on, 0 for nothing; None leaves the
            bound as it is.

    Raises:
        ValueError: `max_bytes` is no whole number of at least 0.

    Example:
        >>> rankopt.clear_cache(max_bytes=64 * 2**20)
        >>> rankopt.clear_cache(max_bytes=512 * 2**20)  # as at the start
    """
    if max_bytes is not None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
            raise ValueError(f"max_bytes={max_bytes!r}: expected a whole number, 0 or more")
        shared.max_bytes = max_bytes
    shared.clear()

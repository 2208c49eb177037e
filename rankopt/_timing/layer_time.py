"""What is timed and what comes of it: a chain, and its times beside the dense layer's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np

from rankopt._decompositions.base import Decomposition
from rankopt._timing.latency import Array, Interval

__all__ = ["DENSE", "Chain", "LayerTime"]

DENSE: Final = "dense"


@dataclass(frozen=True)
class Chain:
    """A decomposition at some ranks; no method stands for the dense layer."""

    method: Decomposition | None = None
    ranks: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """Text that names the chain in the store."""
        if self.method is None:
            return DENSE
        facts = {"ranks": list(self.ranks), **self.method.settings}
        return f"{self.method.name} {json.dumps(facts, sort_keys=True)}"


@dataclass(frozen=True)
class LayerTime:
    """Times of one chain and of the dense layer in the same rounds.

    Args:
        chain_ms: Milliseconds of the chain, [rounds].
        dense_ms: Milliseconds of the dense layer, [rounds].
        session: Names the rounds; chains of one session ran interleaved.
    """

    chain_ms: Array
    dense_ms: Array
    session: str = ""

    @cached_property
    def ratio(self) -> Interval:
        """Median of the paired ratios chain / dense; below 1 is faster."""
        return Interval.of(self.ratios)

    @property
    def ratios(self) -> Array:
        """Chain / dense per round, [rounds]."""
        return np.asarray(self.chain_ms / self.dense_ms)

    @cached_property
    def latency_ms(self) -> Interval:
        """Median milliseconds of the chain."""
        return Interval.of(self.chain_ms)

    def versus(self, other: LayerTime) -> Interval:
        """Time of this chain as a ratio to another's, paired where both ran together."""
        if self.session == other.session and len(self.ratios) == len(other.ratios):
            return Interval.of(self.chain_ms / other.chain_ms)
        generator = np.random.default_rng(0)
        mine, theirs = (generator.permutation(x.ratios) for x in (self, other))
        rounds = min(len(mine), len(theirs))
        return Interval.of(mine[:rounds] / theirs[:rounds])

    def extended(self, other: LayerTime) -> LayerTime:
        """The same chain with more rounds."""
        return LayerTime(
            np.concatenate([self.chain_ms, other.chain_ms]),
            np.concatenate([self.dense_ms, other.dense_ms]),
            f"{self.session},{other.session}",
        )

    def __add__(self, other: LayerTime) -> LayerTime:
        """One layer after another, as where a module is called twice."""
        rounds = min(len(self.chain_ms), len(other.chain_ms))
        return LayerTime(
            self.chain_ms[:rounds] + other.chain_ms[:rounds],
            self.dense_ms[:rounds] + other.dense_ms[:rounds],
            f"{self.session}+{other.session}",
        )

    def to_json(self) -> dict[str, Any]:
        """JSON form; the inverse of `from_json`."""
        return {
            "ms": [round(x, 6) for x in self.chain_ms.tolist()],
            "dense_ms": [round(x, 6) for x in self.dense_ms.tolist()],
            "session": self.session,
        }

    @classmethod
    def from_json(cls, value: Any) -> LayerTime:
        """Read the times of a store's entry.

        Raises:
            ValueError: It is of another form, or holds what no clock measures.
        """
        if not isinstance(value, dict) or set(value) != {"ms", "dense_ms", "session"}:
            raise ValueError(f"stored times {value!r}: expected ms, dense_ms and session")
        try:
            chain, dense = (np.array(value[key], np.float64) for key in ("ms", "dense_ms"))
        except TypeError as error:
            raise ValueError(f"stored times {value!r}: {error}") from error
        if chain.ndim != 1 or not chain.size or chain.shape != dense.shape:
            raise ValueError(f"stored times {value!r}: expected as many of the chain as of dense")
        if not (np.isfinite([chain, dense]).all() and min(chain.min(), dense.min()) > 0):
            raise ValueError(f"stored times {value!r}: expected milliseconds above 0")
        return cls(chain, dense, str(value["session"]))

"""Calibration inputs by sample, for training on them in batches of another size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankopt._model import measure
from rankopt._model.inputs import batch_size
from rankopt._model.measure import tensors_in
from rankopt._model.sharing import per_sample
from rankopt.errors import CalibrationError

__all__ = ["Samples"]


class Samples:
    """Calibration inputs by sample, those of one shape joined; others never share a batch.

    Args:
        held: Batches.
        shared: See `rankopt._model.inputs.shared_tensors`; where that is all, a batch counts
            as one sample.
    """

    def __init__(self, held: list[Any], shared: Set[int] = frozenset()) -> None:
        self._whole = all(id(tensor) in shared for tensor in tensors_in(held))
        alike: dict[Any, list[Any]] = {}
        counts: dict[Any, int] = {}
        for given in held:
            size = 1 if self._whole else batch_size(given)
            inputs = _Shared(given) if self._whole else _by_sample(given, size, shared)
            alike.setdefault(_form(inputs), []).append(inputs)
            counts[_form(inputs)] = counts.get(_form(inputs), 0) + size
        self._joined = [_joined(parts) for parts in alike.values()]
        sizes = list(counts.values())
        self.count = sum(sizes)
        self._shape = torch.repeat_interleave(torch.tensor(sizes))
        self._place = torch.cat([torch.arange(size) for size in sizes])

    def split(self, share: float) -> tuple[Tensor, Tensor]:
        """Indices to train on and to hold out, interleaved."""
        every, what = max(2, round(1 / share)), "samples"
        if self._whole:
            every = max(2, min(every, self.count))
            what = "batches, of which the model takes no single samples"
        if self.count < every:
            raise CalibrationError(
                f"recover needs at least {every} calibration {what}, got {self.count}"
            )
        index = torch.arange(self.count)
        return index[index % every != 0], index[index % every == 0]

    def batches(self, index: Tensor, size: int) -> Iterator[Any]:
        """The samples at `index` in batches of one shape each."""
        yield from map(self._take, self._parts(index, size))

    def endless(
        self, index: Tensor, size: int, generator: torch.Generator, least: int = 1
    ) -> Iterator[Any]:
        """Shuffled batches, epoch after epoch; of at least so many samples where there are any."""
        while True:
            shuffled = index[torch.randperm(len(index), generator=generator)]
            parts = list(self._parts(shuffled, size, whole=True))
            parts = [part for part in parts if len(part) >= least] or parts
            for i in torch.randperm(len(parts), generator=generator):
                yield self._take(parts[i])

    def _parts(self, index: Tensor, size: int, *, whole: bool = False) -> Iterator[Tensor]:
        """Indices of one shape each; `whole` leaves out short rests of what fills a batch."""
        for shape in range(len(self._joined)):
            parts = index[self._shape[index] == shape].split(size)
            # Batches of one or two would upset BatchNorm.
            short = whole and len(parts) > 1 and 2 * len(parts[-1]) < size
            yield from (part for part in (parts[:-1] if short else parts) if len(part))

    def _take(self, index: Tensor) -> Any:
        return _indexed(self._joined[self._shape[index[0]]], self._place[index])


@dataclass(frozen=True)
class _Shared:
    """What all samples of a batch share, such as a mask over positions."""

    value: Any


def _by_sample(inputs: Any, size: int, shared: Set[int]) -> Any:
    """The inputs with all but tensors of one row per sample marked as shared."""
    if isinstance(inputs, Tensor):
        return inputs if per_sample(inputs, size, shared) else _Shared(inputs)
    if isinstance(inputs, Mapping):
        return {key: _by_sample(value, size, shared) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(_by_sample(value, size, shared) for value in inputs)
    return _Shared(inputs)


def _form(inputs: Any) -> Any:
    """What two batches must have in common to be joined."""
    if isinstance(inputs, Tensor):
        return inputs.shape[1:], inputs.dtype
    if isinstance(inputs, Mapping):
        return tuple((key, _form(value)) for key, value in inputs.items())
    if isinstance(inputs, tuple):
        return tuple(map(_form, inputs))
    digests = tuple(map(measure.tensor_digest, tensors_in(inputs.value)))
    return digests or repr(inputs.value)


def _joined(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, Mapping):
        return {key: _joined([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple):
        return tuple(_joined([part[i] for part in parts]) for i in range(len(first)))
    return first


def _indexed(inputs: Any, index: Tensor) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[index.to(inputs.device)]
    if isinstance(inputs, Mapping):
        return {key: _indexed(value, index) for key, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(_indexed(value, index) for value in inputs)
    return inputs.value

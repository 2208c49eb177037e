"""Calibration inputs by sample, for training on them in batches of another size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankopt._model import measure
from rankopt._model.inputs import batch_size
from rankopt._model.measure import tensors_in, with_tensors
from rankopt._model.sharing import per_sample
from rankopt.errors import CalibrationError

__all__ = ["Samples"]

# Stands for any tensor where only what holds them counts.
_BLANK = torch.empty(0)


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
        for number, inputs in enumerate(held):
            form = number if self._whole else _form(inputs, batch_size(inputs), shared)
            alike.setdefault(form, []).append(inputs)
        self._groups = [_Group.of(parts, shared, whole=self._whole) for parts in alike.values()]
        sizes = [group.count for group in self._groups]
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
        for shape in range(len(self._groups)):
            parts = index[self._shape[index] == shape].split(size)
            # Batches of one or two would upset BatchNorm.
            short = whole and len(parts) > 1 and 2 * len(parts[-1]) < size
            yield from (part for part in (parts[:-1] if short else parts) if len(part))

    def _take(self, index: Tensor) -> Any:
        return self._groups[int(self._shape[index[0]])].take(self._place[index])


@dataclass(frozen=True)
class _Group:
    """Batches of one form, joined.

    Args:
        template: One of them.
        rows: The rows of all samples, by the id of the template's tensor that has some of them.
        count: Of samples.
    """

    template: Any
    rows: Mapping[int, Tensor]
    count: int

    @staticmethod
    def of(parts: list[Any], shared: Set[int], *, whole: bool) -> _Group:
        """Join batches; `whole` ones, of which there is one, are a sample each."""
        template = parts[0]
        if whole:
            return _Group(template, {}, 1)
        size = batch_size(template)
        columns = zip(*map(tensors_in, parts), strict=True)
        rows = {id(c[0]): torch.cat(c) for c in columns if per_sample(c[0], size, shared)}
        return _Group(template, rows, sum(map(batch_size, parts)))

    def take(self, index: Tensor) -> Any:
        """A batch of the samples at `index`."""

        def taken(tensor: Tensor) -> Tensor:
            rows = self.rows.get(id(tensor))
            return tensor if rows is None else rows[index.to(rows.device)]

        return with_tensors(self.template, taken)


def _form(inputs: Any, size: int, shared: Set[int]) -> Any:
    """What two batches must have in common to be joined."""
    tensors = list(tensors_in(inputs))
    ids = [id(tensor) for tensor in tensors]
    same = tuple(map(ids.index, ids))  # a tensor that comes twice does so in all of them
    rows = tuple(
        (tensor.shape[1:], tensor.dtype)
        if per_sample(tensor, size, shared)
        else measure.tensor_digest(tensor)
        for tensor in tensors
    )
    return same, rows, repr(with_tensors(inputs, lambda tensor: _BLANK))

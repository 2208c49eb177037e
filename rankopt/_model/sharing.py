"""What the samples of a batch share, and batches cut to some of their samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from rankopt._model.measure import tensors_in, with_tensors

__all__ = ["alike", "first", "per_sample", "shortened"]


def alike(held: Sequence[Any]) -> set[int]:
    """The ids of tensors that are the same in all batches, and so belong to no sample of them.

    Such as a matrix between positions, as many as there are samples in a batch. The tensor that
    tells the number of samples is none of them, and where that is the same in all batches too,
    nothing is known. Nor is it of rows that are all equal, such as masks of ones.
    """
    rows = [list(tensors_in(inputs)) for inputs in held]
    if len(held) < 2 or len({len(row) for row in rows}) > 1:
        return set()
    columns = list(zip(*rows, strict=True))
    sizes = [_size(row) for row in rows]
    leading = next((column for column in columns if column[0].dim()), None)
    if leading is None or _same(leading):
        return set()
    return {
        id(tensor)
        for column in columns
        if column is not leading
        and _same(column)
        and (len(set(sizes)) > 1 or not _rows_equal(column[0]))
        for tensor in column
    }


def _size(tensors: Iterable[Tensor]) -> int:
    return next((len(tensor) for tensor in tensors if tensor.dim()), 0)


def _same(column: Sequence[Tensor]) -> bool:
    given = column[0]
    return all(
        other is given
        or (
            (other.shape, other.dtype, other.layout) == (given.shape, given.dtype, torch.strided)
            and torch.equal(other, given)
        )
        for other in column
    )


def _rows_equal(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided:
        return False
    return not tensor.dim() or bool((tensor == tensor[:1]).all())


def per_sample(tensor: Tensor, size: int, shared: Set[int] = frozenset()) -> bool:
    """Whether a tensor of a batch of so many samples has a row for each; `shared` as of `alike`."""
    return id(tensor) not in shared and tensor.dim() > 0 and len(tensor) == size


def first(inputs: Any, count: int, shared: Set[int] = frozenset()) -> Any:
    """The first `count` samples of whatever has the batch's size and is not `shared`.

    All of them beside a sparse tensor: an adjacency, say, to which the others belong.
    """
    if any(tensor.layout != torch.strided for tensor in tensors_in(inputs)):
        return inputs
    size = _size(tensors_in(inputs))
    return with_tensors(inputs, lambda t: t[:count] if per_sample(t, size, shared) else t)


def shortened(held: Iterable[Any], samples: int, shared: Set[int] = frozenset()) -> list[Any]:
    """The first `samples` samples of held batches, and whole batches where all is `shared`."""
    kept: list[Any] = []
    for inputs in held:
        if samples <= 0:
            break
        size = _size(tensors_in(inputs))
        if size:
            kept.append(first(inputs, samples, shared) if size > samples else inputs)
        samples -= size
    return kept

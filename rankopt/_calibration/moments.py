"""Moments: what is known of a layer's inputs, and the metric that follows from it."""

from __future__ import annotations

import copy
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from rankopt._model.measure import tensor_digest
from rankopt.errors import CalibrationError

__all__ = ["DAMPING", "Centre", "Moments", "damped_root", "pool"]

# Share of the mean eigenvalue added to a moment matrix, so that it can be inverted.
DAMPING: Final = 1e-6
# Standard deviations up to so many roundings of the mean are those of constant inputs.
ROUNDINGS: Final = 16
# Larger matrices are kept on disk: those of more than 362 features, in float64.
SPILL_BYTES: Final = 2**20
# What is derived from matrices above this is derived anew: the disk has its limits too.
KEPT_BYTES: Final = 4 * 2**20


class Moments:
    """Second moments E[x xᵀ] of what a layer's weight is multiplied with.

    The output error of an approximate weight is ‖(W − Ŵ)S‖ for any root S of the
    moments, E[x xᵀ] = SSᵀ (arXiv 2403.07378). Where the mean μ is known they are those of
    x − μ, the covariance: a bias of b + (W − Ŵ)μ leaves just that error.

    Matrices above `SPILL_BYTES` lie in an unnamed temporary file and are read whenever
    asked for, so that a model's moments need not fit into memory at once; what is derived
    from them lies there up to `KEPT_BYTES`.

    Args:
        second: [groups, n, n] in float64. n is in/groups times the kernel's
            pixels (patches, channel-major) or in/groups alone (channels).
        pixels: Kernel pixels a patch spans; 1 where only channels are known.
        count: Positions averaged over.
        mean: μ [groups, n] in float64, if `second` is the covariance.
    """

    def __init__(self, second: Tensor, pixels: int, count: int, mean: Tensor | None = None) -> None:
        self.pixels, self.count, self.mean = pixels, count, mean
        self.shape = tuple(second.shape)
        self._derived: dict[str, Any] = {}
        self._file = _File()
        if second.numel() * second.element_size() > SPILL_BYTES:
            self._derived["key"] = self._identity(second)
        self._stored = self._file.keep(second)
        self._output_root: Tensor | Spilled | None = None

    def weighing(self, root: Tensor) -> Moments:
        """The same moments, with the directions of the outputs weighed: see `output_root`."""
        other = copy.copy(self)
        other._derived = {**self._derived, "key": self.key + tensor_digest(root)}
        other._output_root = self._file.keep(root)
        return other

    @property
    def weighs(self) -> bool:
        """Whether the directions of the outputs are weighed."""
        return self._output_root is not None

    @property
    def output_root(self) -> Tensor | None:
        """R [groups, out/groups, out/groups], upper triangular: errors count as ‖R ΔW S‖.

        None where all outputs count alike; otherwise see `rankopt._calibration.fisher`.
        """
        root = self._output_root
        return root.read() if isinstance(root, Spilled) else root

    @property
    def second(self) -> Tensor:
        """E[x xᵀ], or the covariance where there is a `mean`: [groups, n, n]."""
        return self._stored.read() if isinstance(self._stored, Spilled) else self._stored

    @property
    def channels(self) -> Tensor:
        """[groups, in/groups, in/groups], averaged over the kernel's pixels."""
        if self.pixels == 1:
            return self.second
        return self._kept("channels", self._averaged)

    @property
    def channel_root(self) -> Tensor:
        """Lower root of `channels`, damped."""
        return self._kept("channel_root", lambda: damped_root(self.channels))

    @property
    def damped(self) -> Tensor:
        """`second`, damped so that it has an inverse."""

        def damp() -> Tensor:
            root = damped_root(self.second)
            return root @ root.mT

        return self._kept("damped", damp)

    def output(self, weight: Tensor) -> Tensor:
        """Moments W (E[x xᵀ] + damping) Wᵀ of the output of a weight [groups, S, n], float64."""
        rows = weight.to(torch.float64)
        mapped, diagonal = torch.zeros_like(rows), []
        for start, part in self._blocks():
            stop = start + part.shape[1]
            mapped.baddbmm_(rows[..., start:stop], part)
            diagonal.append(part[..., start:stop].diagonal(dim1=-2, dim2=-1))
        damping = DAMPING * _scale(torch.cat(diagonal, dim=-1))[:, None, None]
        return mapped @ rows.mT + damping * (rows @ rows.mT)

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Rows of `second`, [groups, rows, n], with the index of the first of them."""
        if isinstance(self._stored, Spilled) and self.shape[0] == 1:
            step = max(1, 10 * SPILL_BYTES // (8 * self.shape[-1]))
            for start in range(0, self.shape[-1], step):
                yield start, self._stored.read(start, start + step)
        else:
            yield 0, self.second

    def _averaged(self) -> Tensor:
        size = self.shape[-1] // self.pixels
        blocks = self.second.reshape(-1, size, self.pixels, size, self.pixels)
        averaged: Tensor = blocks.diagonal(dim1=2, dim2=4).mean(dim=-1)
        return averaged

    def _kept(self, name: str, derive: Callable[[], Tensor]) -> Tensor:
        if name not in self._derived:
            found = derive()
            if found.numel() * found.element_size() <= KEPT_BYTES:
                self._derived[name] = self._file.keep(found)
            return found
        kept: Tensor | Spilled = self._derived[name]
        return kept.read() if isinstance(kept, Spilled) else kept

    @property
    def nbytes(self) -> int:
        """Bytes held in memory once all the derived matrices have been asked for."""
        groups, size = self.shape[0], self.shape[-1]
        whole, channels = (8 * groups * n**2 for n in (size, size // self.pixels))
        return sum(2 * part for part in (whole, channels) if part <= SPILL_BYTES)

    @property
    def key(self) -> bytes:
        """Identifies the moments in a cache."""
        if "key" not in self._derived:
            self._derived["key"] = self._identity(self.second)
        found: bytes = self._derived["key"]
        return found

    def _identity(self, second: Tensor) -> bytes:
        """Of patches, how many there were decides how far factors follow them."""
        return tensor_digest(second) + str(self.count).encode() * (self.pixels > 1)


class _File:
    """An unnamed temporary file for large tensors, made at the first of them."""

    def __init__(self) -> None:
        self._file: Any = None
        self._end = 0
        self._lock = threading.Lock()

    def keep(self, tensor: Tensor) -> Tensor | Spilled:
        """The tensor spilled; itself if it is small, or where the disk has no room for it."""
        size = tensor.numel() * tensor.element_size()
        if size <= SPILL_BYTES:
            return tensor
        with self._lock:
            try:
                if self._file is None:
                    self._file = tempfile.TemporaryFile(prefix="rankopt-")  # noqa: SIM115
                    weakref.finalize(self, self._file.close)
                self._file.seek(self._end)
                self._file.write(tensor.detach().cpu().contiguous().numpy().data)
                self._file.flush()
            except OSError:
                return tensor
            start, self._end = self._end, self._end + size
        return Spilled(tensor, self, start)

    def read(self, start: int, size: int) -> bytearray:
        content = bytearray(size)
        with self._lock:
            self._file.seek(start)
            self._file.readinto(content)
        return content


class Spilled:
    """A tensor [groups, n, m] in a `_File`, which lasts as long as the tensors in it."""

    def __init__(self, tensor: Tensor, file: _File, start: int) -> None:
        self._shape, self._device = tensor.shape, tensor.device
        self._dtype = tensor.dtype
        self._file, self._start = file, start

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The tensor on its device; with limits those rows of the one group."""
        groups, rows, columns = self._shape
        stop = rows if stop is None else min(stop, rows)
        width = columns * self._dtype.itemsize
        content = self._file.read(self._start + start * width, groups * (stop - start) * width)
        read = torch.frombuffer(content, dtype=self._dtype)
        return read.reshape(groups, stop - start, columns).to(self._device)


class Centre:
    """The mean of rows that come in parts, and the rows' distance from a point near it.

    Squares of the distances lose no digits to a mean that is large beside them.
    """

    def __init__(self) -> None:
        self.count = 0
        self._point: Any = 0.0
        self._total: Any = 0.0

    def deviations(self, rows: Tensor) -> Tensor:
        """Rows [groups, positions, n] less the mean of the first that came; they are counted."""
        if not self.count:
            self._point = rows.mean(dim=1, keepdim=True)
        rows = rows - self._point
        self._total = self._total + rows.sum(dim=1).double()
        self.count += rows.shape[1]
        return rows

    @property
    def offset(self) -> Tensor:
        """Mean of all deviations so far, [groups, n] in float64."""
        offset: Tensor = self._total / self.count
        return offset

    @property
    def mean(self) -> Tensor:
        """Mean of all rows so far, [groups, n] in float64."""
        mean: Tensor = self._point[:, 0].double() + self.offset
        return mean

    def covariance(self, squares: Tensor) -> Tensor:
        """The covariance from the mean E[d dᵀ] of the deviations, [groups, n, n] in float64."""
        found = squares - self.offset[:, :, None] * self.offset[:, None, :]
        # What is constant has no variance but rounding, which no root can be taken of.
        rounding = ROUNDINGS * torch.finfo(self._point.dtype).eps
        least = (rounding * self._point[:, 0].double()).square()
        still = found.diagonal(dim1=-2, dim2=-1) <= least
        return found.masked_fill(still[:, :, None] | still[:, None, :], 0.0)


def pool(parts: Sequence[Moments]) -> Moments:
    """The moments over all the inputs that several layers with one weight see.

    They are centred if those of every layer are.
    """
    if len(parts) == 1:
        return parts[0]
    count = sum(part.count for part in parts)
    known = [part.count / count * part.mean for part in parts if part.mean is not None]
    centre = torch.stack(known).sum(dim=0) if len(known) == len(parts) else None
    second = torch.zeros_like(parts[0].second)
    for part in parts:
        second += part.count / count * part.second
        if part.mean is not None:
            away = part.mean if centre is None else part.mean - centre
            second += part.count / count * away[:, :, None] * away[:, None, :]
    return Moments(second, parts[0].pixels, count, centre)


def damped_root(second: Tensor) -> Tensor:
    """Lower Cholesky factor [groups, n, n] of a moment matrix, damped by `DAMPING`.

    Damping makes rank-deficient moments (constant or dead channels) invertible;
    it is raised tenfold for as long as rounding defeats it.
    """
    scale = _scale(second.diagonal(dim1=-2, dim2=-1))
    damping = DAMPING
    while True:
        damped = second.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(damping * scale[:, None])
        root, info = torch.linalg.cholesky_ex(damped)
        if not bool(info.any()):
            lower: Tensor = root
            return lower
        damping *= 10
        if damping > 1:
            raise CalibrationError("second moments of a layer's inputs are not finite")


def _scale(diagonal: Tensor) -> Tensor:
    """What damping is a share of, [groups]: the mean eigenvalue; 1 for inputs that are all zero."""
    mean = diagonal.mean(dim=-1)
    return torch.where(mean > 0, mean, torch.ones_like(mean))

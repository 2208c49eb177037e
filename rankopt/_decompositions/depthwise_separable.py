"""Depthwise separable chains of k×k convolutions: depthwise k×k, 1x1 (arXiv 1808.05517)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from rankopt._calibration.moments import Moments
from rankopt._decompositions import base
from rankopt._decompositions.fitted import FittedBasis, FittedDecomposition
from rankopt._model.layers import Layer

__all__ = ["DepthwiseSeparable"]


class _Basis(FittedBasis):
    """Starts from an SVD of every input channel's kernels [S, pixels].

    Channels are not mixed before the last factor, so each is whitened by itself: along the
    pixels of its patches where their moments are known, otherwise by its scale.
    """

    @property
    def _roots(self) -> Tensor | None:
        """Lower roots of every channel's own patches, [groups, C, pixels, pixels]."""
        if self._moments is None:
            return None
        if "roots" not in self._parts:
            self._parts["roots"] = self._own_roots(self._moments)
        found: Tensor = self._parts["roots"]
        return found

    def _own_roots(self, moments: Moments) -> Tensor:
        channels, pixels = self._dense.shape[2], self._pixels
        if not self._knows_patches:
            scales = moments.channel_root.square().sum(dim=-1).sqrt()[..., None, None]
            return scales * torch.eye(pixels, dtype=scales.dtype, device=scales.device)
        blocks = moments.damped.unflatten(2, (channels, pixels)).unflatten(1, (channels, pixels))
        roots: Tensor = torch.linalg.cholesky(blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1))
        return roots

    @property
    def _tensor(self) -> Tensor:
        dense, roots = self._dense, self._roots
        if roots is None:
            return dense
        rows = torch.einsum("gscp,gcpq->gscq", dense.flatten(3), roots.to(dense))
        return rows.reshape(dense.shape)

    def _whitened_patches(self, like: Tensor) -> Tensor:
        assert self._moments is not None
        roots = self._roots
        assert roots is not None
        found, roots = self._moments.damped.to(like), roots.to(like)
        for _ in range(2):  # rows, then columns
            rows = found.unflatten(1, roots.shape[1:3])
            found = torch.linalg.solve_triangular(roots, rows, upper=False).flatten(1, 2).mT
        return found

    def _unwhitened(self, group: int, first: Tensor) -> Tensor:
        roots = self._roots
        if roots is None:
            return first
        filters = first.unflatten(0, (roots.shape[1], -1))
        root = roots[group].to(first)
        rows = torch.linalg.solve_triangular(root, filters, upper=False, left=False).flatten(0, 1)
        # Filters of a channel that hardly varies would be as large as it is small.
        lengths = rows.norm(dim=1, keepdim=True)
        scaled: Tensor = rows / lengths.where(lengths > 0, 1.0)
        return scaled

    def release(self) -> None:
        super().release()
        self._parts.pop("roots", None)

    def _estimate(self, ranks: Sequence[Any]) -> Any:
        """What the SVDs discard, as if channels were not correlated."""
        if "estimate" not in self._parts:
            values = torch.linalg.svdvals(self._tensor.flatten(3).transpose(1, 2))
            energies = values.square().sum(dim=(0, 1), dtype=torch.float64).cpu().numpy()
            lost = np.append(energies.sum(), base.tails(energies))
            self._parts["estimate"] = lost / (energies.sum() or 1.0)
        return self._parts["estimate"][np.asarray(ranks[0])]

    def _size(self, ranks: Sequence[Any]) -> Any:
        assert self.weight is not None
        outputs, inputs = self.weight.shape[1:3]
        return ranks[0] * inputs * (self._pixels + outputs)

    def _anchor(self, elements: float) -> tuple[int, ...]:
        assert self.weight is not None
        outputs = self.weight.shape[1]
        most = min(outputs, self._pixels)
        return (min(max(1, round(elements / float(self._size((1,))))), most),)

    def _fit(self, tensor: Tensor, ranks: Sequence[int], *, thorough: bool) -> list[Tensor]:
        kernels = tensor.flatten(2).transpose(0, 1)  # [C, S, pixels]
        filters = base.principal_vectors(kernels.mT @ kernels)[..., : ranks[0]]
        return [filters.mT.flatten(0, 1)]

    def _features(self, leading: Sequence[Tensor]) -> Tensor:
        assert self.weight is not None
        (filters,) = leading  # [C·r, pixels]
        inputs = self.weight.shape[2]
        place = torch.eye(inputs, dtype=filters.dtype, device=filters.device)
        return place.repeat_interleave(len(filters) // inputs, dim=0)[..., None] * filters[:, None]

    def _name(self, leading: Sequence[Tensor], last: Tensor) -> dict[str, Tensor]:
        assert self.weight is not None
        size = self.weight.shape[3:]
        filters = leading[0].flatten(0, 1)
        ones = (...,) + (None,) * len(size)
        return {
            "core.weight": filters[:, None].unflatten(-1, size),
            "last.weight": last.flatten(0, 1)[ones],
        }


@dataclass(frozen=True)
class DepthwiseSeparable(FittedDecomposition):
    """Every input channel filtered r times by itself, then mixed: DW+PW of arXiv 1808.05517.

    Where the convolution has a stride both factors run on the smaller map, which makes this
    the cheapest chain for such layers. A rank is a number of filters per input channel, so
    choices are few: of a 3x3 convolution of 64 channels each takes an eighth of the MACs.

    The filters come from an SVD of each channel's kernels, and the 1x1 factor is fitted to the
    weight, or with moments to the output; so are the filters where enough patches are known.
    """

    name: ClassVar[str] = "depthwise_separable"
    roles: ClassVar[Mapping[str, str]] = {"core": "core", "last": "last"}
    has_spectra: ClassVar[bool] = False

    def refusal(self, layer: Layer) -> str | None:
        if layer.is_conv and not layer.pointwise:
            return None
        return "depthwise_separable takes convolutions with a kernel above one pixel"

    def rank_axes(self, layer: Layer) -> tuple[base.RankAxis, ...]:
        _, outputs = layer.group_shape
        most = min(outputs, base.kernel_size(layer))
        return (base.RankAxis("filters", most, width=layer.in_channels),)

    def params(self, layer: Layer, ranks: Sequence[Any]) -> Any:
        (rank,) = ranks
        inputs, outputs = layer.group_shape
        return layer.groups * rank * inputs * (base.kernel_size(layer) + outputs)

    def macs(self, layer: Layer, ranks: Sequence[Any]) -> Any:
        _, leaving = base.positions(layer)
        return self.params(layer, ranks) * leaving

    def prepare(self, weight: Tensor, moments: Moments | None = None) -> base.Basis:
        return _Basis(weight, moments)

    def build(self, layer: Layer, ranks: Sequence[int]) -> nn.Sequential:
        hidden = layer.in_channels * ranks[0]
        return base.chain(
            core=base.conv(
                layer,
                layer.in_channels,
                hidden,
                kernel=layer.kernel,
                groups=layer.in_channels,
                place=base.geometry(layer),
            ),
            last=base.conv(layer, hidden, layer.out_channels, groups=layer.groups, bias=layer.bias),
        )

"""torchvision's window attention as a module that calls `qkv` and `proj`.

Imported only once a model contains such a module, so torchvision is there.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import (
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
)

__all__ = ["WindowAttention", "WindowAttentionV2", "unpack"]

# Added to the scores of pairs that only the cyclic shift made neighbours
# (Swin, arXiv 2103.14030, section 3.2; the value is torchvision's).
MASKED: Final = -100.0
# Largest temperature of cosine attention (Swin V2, arXiv 2111.09883, section 3.3).
MAX_LOGIT_SCALE: Final = math.log(100.0)


def unpack(module: Any) -> nn.Module:
    """Change the class of a window attention in place; tensors stay the same.

    V2 never uses the key third of its bias; it is zeroed here, so that calling
    `qkv` as a module gives the same values.
    """
    if type(module) is ShiftedWindowAttention:
        module.__class__ = WindowAttention
    elif type(module) is ShiftedWindowAttentionV2:
        bias = module.qkv.bias
        if bias is not None:
            values = bias.detach().clone()
            third = len(values) // 3
            values[third : 2 * third] = 0
            module.qkv.bias = nn.Parameter(values, requires_grad=bias.requires_grad)
        module.__class__ = WindowAttentionV2
    unpacked: nn.Module = module
    return unpacked


class _CallsProjections:
    """The forward pass both versions share."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Attend within windows; `x` and the result are [batch, height, width, channels]."""
        batch, height, width, channels = x.shape
        rows, columns = self.window_size
        padded = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        down, across = padded.shape[1] // rows, padded.shape[2] // columns
        # A window that covers the whole map is not shifted.
        shift = (
            0 if down == 1 else self.shift_size[0],
            0 if across == 1 else self.shift_size[1],
        )
        padded = padded.roll((-shift[0], -shift[1]), dims=(1, 2)) if any(shift) else padded
        windows = (
            padded.view(batch, down, rows, across, columns, channels)
            .transpose(2, 3)
            .reshape(batch * down * across, rows * columns, channels)
        )
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(windows).chunk(3, dim=-1)
        )
        scores = self._scores(q, k) + self.get_relative_position_bias()
        if any(shift):
            mask = _region_mask(x, (down, across), (rows, columns), shift)
            scores = (scores.unflatten(0, (batch, -1)) + mask[:, None]).flatten(0, 1)
        weights = F.dropout(scores.softmax(dim=-1), self.attention_dropout, self.training)
        attended = self.proj((weights @ v).transpose(1, 2).flatten(2))
        attended = F.dropout(attended, self.dropout, self.training)
        whole = (
            attended.view(batch, down, across, rows, columns, channels)
            .transpose(2, 3)
            .reshape(batch, down * rows, across * columns, channels)
        )
        whole = whole.roll(shift, dims=(1, 2)) if any(shift) else whole
        return whole[:, :height, :width].contiguous()


def _region_mask(
    x: Tensor, grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> Tensor:
    """Additive mask [windows, tokens, tokens] that keeps shifted-in regions apart."""
    ids = []
    for count, size, moved in zip(grid, window, shift, strict=True):
        position = torch.arange(count * size, device=x.device)
        total = count * size
        ids.append((position >= total - size).long() + (position >= total - moved).long())
    region = ids[0][:, None] * 3 + ids[1]
    tokens = (
        region.view(grid[0], window[0], grid[1], window[1])
        .transpose(1, 2)
        .reshape(grid[0] * grid[1], -1)
    )
    apart = tokens[:, None, :] != tokens[:, :, None]
    return torch.zeros(apart.shape, dtype=x.dtype, device=x.device).masked_fill_(apart, MASKED)


class WindowAttention(_CallsProjections, ShiftedWindowAttention):
    """Swin V1: scaled dot products."""

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        scores: Tensor = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return scores


class WindowAttentionV2(_CallsProjections, ShiftedWindowAttentionV2):
    """Swin V2: scaled cosines."""

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores: Tensor = cosines * self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
        return scores

"""Soft truncation: a weight seen through gated directions, differentiable in both."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["Projection", "survival"]

Fold = Callable[[Tensor], Tensor]


class Projection(nn.Module):
    """W̃ = R̄ (G ∘ (R · W · Q)) Q̄, the weight with gates on the directions of its modes.

    With a gate of ones up to the ranks and zeros beyond, W̃ is the truncation to those
    ranks; with the probabilities that the rank is at least k it is the mean truncation,
    exactly, for truncation is linear in the gate. W̃ is linear in the weight too, so
    that a weight may be trained while its rank is being found.

    Args:
        unfold: Canonical weight [groups, out, in, *kernel] to [groups, rows, columns, pixels].
        fold: The inverse of `unfold`, given the canonical weight's shape by closure.
        rows: (R [groups, n, rows], R̄ [groups, rows, n]) or None to leave the mode alone.
        columns: (Q [groups, columns, m], Q̄ [groups, m, columns]) or None.
        repeat: Neighbouring column directions that share a gate.
    """

    def __init__(
        self,
        unfold: Fold,
        fold: Fold,
        rows: tuple[Tensor, Tensor] | None,
        columns: tuple[Tensor, Tensor] | None,
        *,
        repeat: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.unfold, self.fold, self.repeat = unfold, fold, repeat
        pairs = {"rows": rows, "columns": columns}
        for name, pair in pairs.items():
            for part, value in zip(("in", "out"), pair or (None, None), strict=True):
                held = None if value is None else value.to(dtype).contiguous()
                self.register_buffer(f"{name}_{part}", held, persistent=False)

    def forward(self, weight: Tensor, gate: Tensor) -> Tensor:
        """The gated weight, in the canonical shape.

        Args:
            weight: Canonical weight [groups, out, in, *kernel].
            gate: One axis per rank, input side first: [m], [n] or [m, n].
        """
        x = self.unfold(weight)
        gate = gate.to(x.dtype)
        if self.columns_in is not None:
            x = torch.einsum("grcp,gcm->grmp", x, self.columns_in)
        if self.rows_in is not None:
            x = torch.einsum("gnr,grmp->gnmp", self.rows_in, x)
        x = x * self._shaped(gate)
        if self.rows_out is not None:
            x = torch.einsum("grn,gnmp->grmp", self.rows_out, x)
        if self.columns_out is not None:
            x = torch.einsum("grmp,gmc->grcp", x, self.columns_out)
        return self.fold(x)

    def _shaped(self, gate: Tensor) -> Tensor:
        """The gate as it multiplies [groups, n, m, pixels]."""
        if gate.dim() == 2:
            return gate.T.repeat_interleave(self.repeat, dim=1)[None, :, :, None]
        if self.columns_in is None:
            return gate[None, :, None, None]
        return gate.repeat_interleave(self.repeat)[None, None, :, None]


def survival(mass: Tensor) -> Tensor:
    """P(every rank ≥ its index) from the probabilities of ranks, along every axis.

    Example:
        >>> survival(torch.tensor([0.25, 0.25, 0.5]))
        tensor([1.0000, 0.7500, 0.5000])
    """
    for axis in range(mass.dim()):
        mass = mass.flip(axis).cumsum(axis).flip(axis)
    return mass

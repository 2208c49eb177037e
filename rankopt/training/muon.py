"""Muon: steps whose singular values are all alike, for the matrices of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn

__all__ = ["Muon", "matrices", "orthogonalised"]

# Newton-Schulz iterations of a quintic polynomial whose slope at 0 is large: singular values
# end near 1, not at it, which is enough (https://kellerjordan.github.io/posts/muon).
STEPS: Final = 5
COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
# Root mean square of an AdamW update, by which one learning rate serves both (2502.16982, §2.2).
UPDATE: Final = 0.2
MOMENTUM: Final = 0.95

_LAYERS: Final = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Muon(torch.optim.AdamW):
    """AdamW, but for matrices, which take orthogonalised momentum (arXiv 2502.16982).

    The gradient of a factor is as ill-conditioned as the factor beside it; orthogonalised, small
    directions learn as fast as large ones. Weights of convolutions count as
    [outputs, inputs · kernel].

    Args:
        parameters: To train.
        chosen: Those among them that are matrices.
        lr: Learning rate; a step's elements are about as large as AdamW's.
        weight_decay: As AdamW's.
        momentum: Of the matrices.

    Example:
        >>> layer = nn.Linear(4, 3)
        >>> optimizer = Muon(layer.parameters(), [layer.weight], lr=0.01)
        >>> layer(torch.ones(2, 4)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        chosen: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float = 0.01,
        momentum: float = MOMENTUM,
    ) -> None:
        wanted, every = {id(p) for p in chosen}, list(parameters)
        groups: list[dict[str, Any]] = [
            {
                "params": [p for p in every if (id(p) in wanted) == orthogonal],
                "orthogonal": orthogonal,
                "momentum": momentum if orthogonal else None,
            }
            for orthogonal in (True, False)
        ]
        groups = [group for group in groups if group["params"]]
        super().__init__(groups, lr=lr, weight_decay=weight_decay)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; parameters without a gradient stay as they are."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["orthogonal"]]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        with torch.no_grad():
            for group in groups:
                for parameter in group["params"] if group["orthogonal"] else ():
                    if parameter.grad is not None:
                        self._step_matrix(parameter, group)
        return loss

    def _step_matrix(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient, decay = self.state[parameter], parameter.grad, group["momentum"]
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros(())  # AdamW looks for it when a state is loaded
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["step"] += 1
        buffer = state["momentum_buffer"].mul_(decay).add_(gradient)
        ahead = gradient.add(buffer, alpha=decay)  # Nesterov's
        flat = orthogonalised(ahead.flatten(1).float())
        size = UPDATE * max(flat.shape) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        update = flat.to(parameter.dtype).reshape(parameter.shape)
        parameter.add_(update, alpha=-group["lr"] * size)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Singular vectors as they are, all singular values near 1: [m, n] of full rank.

    Example:
        >>> found = orthogonalised(torch.tensor([[3.0, 0.0], [0.0, 0.1]]))
        >>> bool((torch.linalg.svdvals(found) - 1).abs().max() < 0.4)
        True
    """
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    x = wide / wide.norm().clamp_min(1e-7)
    first, second, third = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.T
        x = first * x + (second * gram + third * gram @ gram) @ x
    found: Tensor = x.T if tall else x
    return found


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """Weights of linear layers and convolutions that mix channels; embeddings' are none."""
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    weights = [m.weight for m in model.modules() if isinstance(m, _LAYERS)]
    return [
        weight
        for weight in weights
        if isinstance(weight, nn.Parameter)
        and min(weight.shape[:2]) > 1  # a depthwise kernel is no matrix
        and id(weight) not in embedded
    ]

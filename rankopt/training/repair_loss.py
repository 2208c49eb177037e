"""How far a model's outputs, and those of its decomposed layers, are from its teacher's."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from rankopt._model.inputs import compared, relative_error, run, tensors_in
from rankopt.errors import CalibrationError, ModelError
from rankopt.training.paired_outputs import PairedOutputs

__all__ = ["repair_loss"]

# Weight of the layers' outputs beside the model's.
FEATURES: Final = 3.0


def repair_loss(layers: PairedOutputs, inputs: Any) -> Tensor:
    """Relative error² of the outputs, and of those of the layers the plan decomposed.

    Raises:
        ModelError: It has no gradient.
    """
    layers.forget()
    with torch.no_grad():
        wanted = run(layers.teacher, inputs)
    found = run(layers.model, inputs)
    total = _output_loss(wanted, found)
    pairs = layers.pairs()
    errors = [
        torch.stack([relative_error(*pair, exact=False) for pair in calls]).mean()
        for calls in pairs.values()
    ]
    total = total + FEATURES * torch.stack(errors).mean() if errors else total
    if not total.requires_grad:
        raise ModelError(
            "recover needs the gradient of the model's output, which has none: is it computed "
            "under no_grad, or does it not depend on what trains?"
        )
    layers.check_gradients(pairs)
    return total


def _output_loss(wanted: Any, found: Any) -> Tensor:
    """Relative error² of every floating-point tensor the models return."""
    old, new = (
        [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
        for output in (wanted, found)
    )
    if len(old) != len(new):  # such as more in train mode
        old, new = [compared(wanted)], [compared(found)]
    pairs = list(zip(old, new, strict=True))
    if not pairs:
        raise CalibrationError("the model's output holds no floating-point tensor to compare")
    if any(a.shape != b.shape for a, b in pairs):
        shapes = [[list(tensor.shape) for tensor in tensors] for tensors in (old, new)]
        raise CalibrationError(f"the teacher's outputs are {shapes[0]}, the model's {shapes[1]}")
    return torch.stack([relative_error(*pair, exact=False) for pair in pairs]).mean()

"""The moving average of the weights that `rankopt.finetune` keeps with ``ema=``."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from rankopt._calibration.batchnorm import has_norms, settle_in_one_pass
from rankopt.training.batches import samples

__all__ = ["Average"]

# BatchNorm statistics are of at least so many samples, if an epoch has as many: the last ones.
SAMPLES: Final = 512


class Average:
    """A moving average of a model's weights, with BatchNorm statistics of its own.

    Averaged weights give other activations than the weights they are the average of, so
    neither the model's running statistics nor their average fit them (1803.05407, section 3.2):
    these are taken anew from what the model trained on last.

    Args:
        model: Copied.
        decay: Per step; a young average follows faster.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        def blend(averaged: Any, current: Any, count: Any) -> None:
            # Or it would remember the first weights for ever.
            rate = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
            torch._foreach_lerp_(averaged, current, rate)

        self._averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=blend)
        self._settles = has_norms(model)
        self._seen: deque[tuple[Any, int]] = deque()

    @property
    def model(self) -> nn.Module:
        """The averaged model."""
        averaged: nn.Module = self._averaged.module
        return averaged

    def update(self, model: nn.Module) -> None:
        """After a step of the optimiser."""
        self._averaged.update_parameters(model)

    def see(self, inputs: Any) -> None:
        """Remember what the model trains on, as long as it may be needed."""
        if not self._settles:
            return
        self._seen.append((inputs, samples(inputs)))
        held = sum(size for _, size in self._seen)
        while held - self._seen[0][1] >= SAMPLES:
            held -= self._seen.popleft()[1]

    def settle(self) -> None:
        """After an epoch: BatchNorm statistics of the averaged weights.

        Raises:
            CalibrationError: What a layer takes in is not finite.
        """
        if self._seen:
            settle_in_one_pass(self.model, ((inputs, {}) for inputs, _ in self._seen))
            self._seen.clear()

    def buffers(self) -> Iterator[Tensor]:
        """Of the averaged model and its count of steps."""
        return self._averaged.buffers()

    def state_dict(self) -> dict[str, Any]:
        """To go on from."""
        return self._averaged.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._averaged.load_state_dict(state)

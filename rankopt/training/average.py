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
HALVES: Final = (torch.bfloat16, torch.float16)
# Key of the averages in float32; no module is called so.
PRECISE: Final = "precise average"


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
            torch._foreach_lerp_(averaged, current, self._rate(count))

        self._decay = decay
        self._averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=blend)
        # In half precision small steps would round away.
        self._precise = {
            name: parameter.detach().float()
            for name, parameter in self.model.named_parameters()
            if parameter.dtype in HALVES
        }
        self._settles = has_norms(model)
        self._seen: deque[tuple[Any, int]] = deque()

    @property
    def model(self) -> nn.Module:
        """The averaged model."""
        averaged: nn.Module = self._averaged.module
        return averaged

    def update(self, model: nn.Module) -> None:
        """After a step of the optimiser."""
        count = int(self._averaged.n_averaged)
        self._averaged.update_parameters(model)
        pairs = zip(self.model.named_parameters(), model.parameters(), strict=True)
        with torch.no_grad():
            for (name, own), current in pairs:
                if (precise := self._precise.get(name)) is not None:
                    rate = self._rate(count) if count else 1.0
                    precise.lerp_(current.to(precise), rate)
                    own.copy_(precise)

    def _rate(self, count: Any) -> float:
        # Young averages follow faster, or they would remember the first weights for ever.
        return 1 - min(self._decay, (1 + int(count)) / (10 + int(count)))

    def see(self, inputs: Any) -> None:
        """Remember what the model trains on, as long as it may be needed."""
        if not self._settles:
            return
        self._seen.append((inputs, samples(inputs)))
        held = sum(size for _, size in self._seen)
        while held - self._seen[0][1] >= SAMPLES:
            held -= self._seen.popleft()[1]

    def settle(self, model: nn.Module) -> None:
        """After an epoch: BatchNorm statistics of the averaged weights.

        Norms that the model kept in eval mode while it trained keep the statistics they have.

        Args:
            model: The one that trains.

        Raises:
            CalibrationError: What a layer takes in is not finite.
        """
        if self._seen:
            fixed = {name for name, module in model.named_modules() if not module.training}
            seen: list[tuple[Any, dict[str, Any]]] = [(inputs, {}) for inputs, _ in self._seen]
            settle_in_one_pass(self.model, seen, without=fixed)
            self._seen.clear()

    def buffers(self) -> Iterator[Tensor]:
        """Of the averaged model and its count of steps."""
        return self._averaged.buffers()

    def state_dict(self) -> dict[str, Any]:
        """To go on from."""
        precise = {PRECISE: self._precise} if self._precise else {}
        return {**self._averaged.state_dict(), **precise}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        state = dict(state)
        for name, value in state.pop(PRECISE, {}).items():
            self._precise[name].copy_(value)
        self._averaged.load_state_dict(state)

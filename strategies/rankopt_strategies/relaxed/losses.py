"""Losses of a soft model under given probabilities, each computed once, even across crashes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rankopt._model import measure
from rankopt.soft import SoftModel
from rankopt_strategies.relaxed.objective import Objective, check_gradient
from rankopt_strategies.relaxed.resuming import Checkpoint

__all__ = ["Losses"]

Array = npt.NDArray[np.float64]
# With so many batches, every second one tells what a change of ranks does.
ENOUGH_BATCHES: Final = 4


class Losses:
    """The loss on all batches, or on some, and its gradient.

    A search asks for the same figures in the same order when it runs again, so that
    restoring what was computed is all that resuming takes.

    Args:
        soft: On the objective's model.
        objective: The loss.
        checkpoint: Keeps what was computed.
    """

    def __init__(self, soft: SoftModel, objective: Objective, checkpoint: Checkpoint) -> None:
        self.soft, self.objective, self._checkpoint = soft, objective, checkpoint
        self._known: dict[str, list[float]] = checkpoint.load().get("losses", {})
        # Times may have been taken anew, and with them the options that are worth having.
        self._menus = soft.relaxation.digest()[:16]
        every = range(len(objective))
        self._some = every[::2] if len(every) >= ENOUGH_BATCHES else every

    def __call__(self, probabilities: Array) -> float:
        """The mean loss over all batches under probabilities [options]."""
        return self._mean(probabilities, range(len(self.objective)))

    def some(self, probabilities: Array) -> float:
        """As a call, on every second batch where there are many."""
        return self._mean(probabilities, self._some)

    def gradient(self, probabilities: Array) -> Array:
        """[options] how the loss on all batches moves with the probabilities."""

        def compute() -> list[float]:
            leaf = torch.from_numpy(probabilities).to(self.soft.scores).requires_grad_()
            with torch.enable_grad():
                with self.soft.using(leaf):
                    weights = self.soft.soft_weights()
                # Weights follow from the probabilities once, not once for every batch; tied
                # layers have one between them.
                unique = {id(value): value for value in weights.values()}
                leaves = {key: value.detach().requires_grad_() for key, value in unique.items()}
                cut = {name: leaves[id(value)] for name, value in weights.items()}
                total = [torch.zeros_like(value) for value in leaves.values()]
                for index in range(len(self.objective)):
                    part = self._batch(cut, index) / len(self.objective)
                    check_gradient(part)
                    # A layer may not reach what is compared: an auxiliary head, an idle expert.
                    found = torch.autograd.grad(
                        part, list(leaves.values()), allow_unused=True, materialize_grads=True
                    )
                    total = [a + b for a, b in zip(total, found, strict=True)]
                (slopes,) = torch.autograd.grad(list(unique.values()), leaf, total)
            listed: list[float] = slopes.double().tolist()
            return listed

        return np.array(self._once("gradient", probabilities, compute))

    def _mean(self, probabilities: Array, batches: Sequence[int]) -> float:
        def compute() -> list[float]:
            probed = torch.from_numpy(probabilities).to(self.soft.scores)
            with torch.no_grad(), self.soft.using(probed):
                weights = self.soft.soft_weights()
                found = [float(self._batch(weights, index)) for index in batches]
            return [sum(found) / len(found)]

        return self._once(f"loss on {len(batches)}", probabilities, compute)[0]

    def _batch(self, weights: dict[str, Tensor], index: int) -> Tensor:
        self.soft.relaxation.problem.check_deadline()
        with self.soft.holding(weights):
            return self.objective(lambda inputs: measure.call(self.soft, inputs), index)

    def _once(self, what: str, probabilities: Array, compute: Callable[[], Any]) -> list[float]:
        state = hashlib.sha256(probabilities.tobytes()).hexdigest()[:32]
        key = f"{what} {self._menus} {state}"
        if key not in self._known:
            self._known[key] = compute()
            self._checkpoint.save(losses=self._known)
        return self._known[key]

"""The loss of one batch: the task's, the teacher's, and what is counted beside them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rankopt._model import measure
from rankopt._model.inputs import entry, tensors_in
from rankopt._model.spelled import spelled
from rankopt.errors import CalibrationError, TrainingError
from rankopt.training import batches as data
from rankopt.training.augmentation import augmentation
from rankopt.training.distillation import Distiller

__all__ = ["Objective", "so_far"]


class Objective:
    """What `rankopt.finetune` minimises; see there for `loss` and `augment`.

    Args:
        model: Not wrapped; its signature tells labels from inputs.
        accelerator: Hugging Face's.
        loss: Of (output, labels); None for the model's own or cross-entropy.
        augment: Changes inputs before teacher and model see them.
        distiller: The teacher's terms; None without a teacher.
        labelled: Whether labels are used.
    """

    def __init__(
        self,
        model: nn.Module,
        accelerator: Any,
        loss: Callable[[Any, Any], Any] | None,
        augment: Any,
        distiller: Distiller | None,
        *,
        labelled: bool,
    ) -> None:
        self._model, self._accelerator, self._loss = model, accelerator, loss
        self._augment = augmentation(augment)
        self._distiller, self._labelled = distiller, labelled
        # What has to be the same for a run to be gone on with, before calls of it change it.
        self.identity: dict[str, str | None] = {
            "loss": None if loss is None else spelled(loss),
            "augment": augment if isinstance(augment, str) else spelled(augment),
            "distillation": None if distiller is None else repr(distiller.settings),
        }

    def of(
        self,
        wrapped: nn.Module | None,
        batch: Any,
        step: int,
        generator: torch.Generator,
        totals: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor], Any]:
        """The loss of one batch with a gradient to `wrapped`, its terms by name, and its inputs.

        Args:
            wrapped: The model, in what exchanges gradients between processes.
            batch: As the loader yields it.
            step: For messages.
            generator: Draws the augmentation.
            totals: Loss, right, labels and samples so far; added to.

        Raises:
            TrainingError: The batch or what the loss makes of it cannot be used.
        """
        assert wrapped is not None
        device = self._accelerator.device
        inputs, labels = data.split(
            self._model, batch, labelled=self._labelled, step=step, plain=self._loss is None
        )
        inputs = self._augment(measure.to_device(inputs, device), generator)
        task: Any = None
        parts: dict[str, Tensor] = {}
        with self._accelerator.autocast():
            if self._distiller is not None:
                _teach(self._distiller, inputs, step)
            output = data.call(wrapped, inputs, step)
            if labels is not None:
                task = self._task(output, labels, device, step)
                _check_trainable(task, step)
            if self._distiller is not None:
                task, parts = self._distiller.loss(output, task)
        _check_trainable(task, step)
        size = data.samples(inputs)
        totals[0] += task.detach() * size
        totals[3] += size
        if (counted := data.right(output, measure.to_device(labels, device))) is not None:
            totals[1] += counted[0]
            totals[2] += counted[1]
        return task, parts, inputs

    def _task(self, output: Any, labels: Any, device: torch.device, step: int) -> Any:
        if self._loss is not None:
            return self._loss(output, measure.to_device(labels, device))
        if entry(output, "loss") is None:
            data.check_labels(labels, output, step)
        return data.task_loss(output, measure.to_device(labels, device))


def _check_trainable(loss: Any, step: int) -> None:
    if not (isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad):
        raise TrainingError(
            f"step {step}: the loss is {loss!r}, not a scalar with a gradient; without one nothing "
            "trains: is the model's output, or the loss, computed under no_grad?"
        )


def so_far(totals: Tensor, started: float) -> str:
    """Accuracy so far and speed, for the progress bar."""
    _, right, labels, samples = totals.tolist()
    accuracy = f"{100 * right / labels:.1f}%, " if labels else ""
    return f"{accuracy}{samples / (time.perf_counter() - started):.0f}/s"


def _teach(distiller: Distiller, inputs: Any, step: int) -> None:
    try:
        distiller.teach(inputs)
    except CalibrationError as error:
        shapes = ", ".join(f"{list(t.shape)} {t.dtype}" for t in tensors_in(inputs))
        raise TrainingError(
            f"step {step}: the teacher fails on a batch of {shapes}: {error.__cause__}"
        ) from error

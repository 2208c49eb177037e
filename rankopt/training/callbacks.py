"""Freezing inside other people's trainers: Hugging Face's and Lightning's.

Both drive a `rankopt.training.Freezer` once per epoch, or per number of optimiser steps.
They refuse several processes: those trainers wrap the model in DistributedDataParallel
once, which would not exchange the gradients of what was frozen then; `rankopt.finetune` wraps anew.
"""

from __future__ import annotations

from typing import Any

from rankopt.errors import MissingDependency, TrainingError
from rankopt.training.freezing import Freezer

__all__ = ["hugging_face_callback", "lightning_callback"]


def hugging_face_callback(freezer: Freezer, *, steps: int | None = None) -> Any:
    """A `transformers.TrainerCallback`.

    Args:
        freezer: Of the model being trained.
        steps: Optimiser steps per phase; None for one epoch.

    Raises:
        MissingDependency: transformers is not installed.
    """
    _check_steps(steps)
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise MissingDependency("this callback needs transformers") from error

    class Freezing(TrainerCallback):
        epoch = 0

        def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            freezer.release()  # what an interrupted run left frozen, the optimiser would not know

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            _check_alone(args.world_size)
            self.epoch = int((state.epoch or 0) + 1e-6)  # may go on within an epoch

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if steps is None:  # without a length of the data, state.epoch counts in another way
                freezer.step(self.epoch)
            self.epoch += 1

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if steps is not None:
                freezer.step(state.global_step // steps)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            freezer.release()

    return Freezing()


def lightning_callback(freezer: Freezer, *, steps: int | None = None) -> Any:
    """A `lightning.pytorch.Callback`; arguments and errors as `hugging_face_callback`."""
    _check_steps(steps)
    try:
        from lightning.pytorch import Callback
    except ImportError as error:
        raise MissingDependency("this callback needs lightning; pip install lightning") from error

    class Freezing(Callback):  # type: ignore[misc, unused-ignore]
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            _check_alone(trainer.world_size)

        # Not at the start of an epoch: a run that goes on within one does not get there.
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            done = trainer.current_epoch if steps is None else trainer.global_step // steps
            freezer.step(done)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            freezer.release()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            freezer.release()

    return Freezing()


def _check_steps(steps: int | None) -> None:
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps={steps!r}: expected an integer of at least 1, or None")


def _check_alone(processes: int) -> None:
    if processes > 1:
        raise TrainingError(
            f"the freezing callback cannot run in {processes} processes: their gradients are "
            "exchanged as decided before the freezing; use rankopt.finetune, which handles it"
        )

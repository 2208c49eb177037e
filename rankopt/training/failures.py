"""What ends a training run that cannot go on, and what a finished one was, in words."""

from __future__ import annotations

from pathlib import Path

from rankopt.errors import TrainingError, warn

__all__ = ["not_finite", "overflowing", "warn_of_another"]


def not_finite(step: int, epochs: int, folder: Path | None) -> TrainingError:
    """A loss or gradient that is NaN or infinite, after so many complete epochs."""
    kept = f"those of epoch {epochs}" if epochs else "what they were"
    where = f", and the checkpoint in {folder} is intact" if epochs and folder else ""
    return TrainingError(
        f"step {step} (epoch {epochs + 1}): the loss or its gradient is not finite; the model's "
        f"weights are {kept}{where}; try a lower learning_rate, or look for NaN in the data"
    )


def overflowing(step: int, times: int) -> TrainingError:
    """Gradients in float16 that overflow at any scale."""
    return TrainingError(
        f"step {step}: gradients in float16 have overflowed {times} times in a row, so that "
        "nothing trains; use precision='bf16' or 'no'"
    )


def warn_of_another(folder: Path | None) -> None:
    """Warn that a finished run began with other weights than the model came with."""
    warn(
        f"{folder} holds a finished run that began with other weights; the model has the weights "
        "of that run now; use another folder= to train it"
    )

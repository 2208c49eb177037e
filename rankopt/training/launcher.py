"""Hugging Face accelerate, started for one run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from rankopt import measure, surgery
from rankopt.errors import MissingDependency
from rankopt.training.recipe import Recipe

__all__ = ["accelerated", "require_accelerate"]


def require_accelerate() -> None:
    """Raise `MissingDependency` where accelerate is not installed."""
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            "finetune needs accelerate; pip install 'rankopt[train]'"
        ) from error


@contextmanager
def accelerated(model: nn.Module, recipe: Recipe) -> Iterator[Any]:
    """An Accelerator on the model's device, or on the launcher's where there are several processes.

    Its process-wide state is removed again, so that the next run may choose otherwise.
    """
    require_accelerate()
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DataLoaderConfiguration

    fresh = not PartialState._shared_state
    launched = torch.distributed.is_torchelastic_launched() or torch.distributed.is_initialized()
    device = surgery.device_of(model)
    # Accelerate knows one GPU, the current one; a launcher has chosen that itself.
    with nullcontext() if launched else measure.current_device(device):
        accelerator = Accelerator(
            mixed_precision=recipe.precision,
            cpu=device.type == "cpu" and (not launched or not _accelerators()),
            dataloader_config=DataLoaderConfiguration(
                use_seedable_sampler=True, data_seed=recipe.seed, even_batches=True
            ),
        )
        try:
            yield accelerator
        finally:
            if fresh and accelerator.num_processes == 1:
                AcceleratorState._reset_state(reset_partial_state=True)
                GradientState._reset_state()


def _accelerators() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()

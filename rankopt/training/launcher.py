"""Hugging Face accelerate, started for one run."""

from __future__ import annotations

import atexit
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from rankopt._model import measure, surgery
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

    What else uses accelerate in this process neither decides how the run steps nor is changed by
    it: the state they share is set aside, and put back at the end.
    """
    require_accelerate()
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin

    initialized = torch.distributed.is_initialized()
    launched = initialized or torch.distributed.is_torchelastic_launched()
    device = surgery.device_of(model)
    states = [AcceleratorState, GradientState, *([] if launched else [PartialState])]
    # Accelerate knows one GPU, the current one; a launcher has chosen that itself.
    current = nullcontext() if launched else measure.current_device(device)
    opens = launched and not initialized
    if opens:
        # Imported later on, by DistributedDataParallel, it would hold the process group as the
        # default of its functions' arguments for ever: what destroys the group would not end it.
        importlib.import_module("torch.distributed.nn")
    with current, _set_aside([state._shared_state for state in states]):
        accelerator = Accelerator(
            mixed_precision=recipe.precision,
            cpu=device.type == "cpu" and (not launched or not _accelerators()),
            dataloader_config=DataLoaderConfiguration(
                use_seedable_sampler=True, data_seed=recipe.seed, even_batches=True
            ),
            # Given, or the environment would have a say: the loop groups batches itself.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
        if opens:
            atexit.register(_close)
        yield accelerator


def _close() -> None:
    """End the processes' group before the interpreter, whose end its threads may crash."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def _set_aside(shared: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Empty mappings that others hold too, for the while."""
    before = [dict(state) for state in shared]
    for state in shared:
        state.clear()
    try:
        yield
    finally:
        for state, kept in zip(shared, before, strict=True):
            state.clear()
            state.update(kept)


def _accelerators() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()

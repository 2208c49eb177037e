"""The model as a training step calls it: several processes exchange gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import nn

__all__ = ["Exchange"]


class Exchange:
    """Averages gradients over the processes, by `DistributedDataParallel` from the second step on.

    That waits for the gradient of every parameter, or, if it is told that some have none, of
    those that the outputs show. The first is wrong for poolers that no loss uses, the second
    for losses of what outputs do not show, such as those of layers' outputs. So the gradients
    of the first step are averaged one by one, and tell which it has to be.

    Args:
        given: As the user gave it.
        plain: The same, not compiled.
        accelerator: Hugging Face's.
    """

    def __init__(self, given: nn.Module, plain: nn.Module, accelerator: Any) -> None:
        self._plain, self._accelerator = plain, accelerator
        self._alone = accelerator.num_processes == 1
        self.model = given if self._alone else plain
        self._wrapped = self._alone
        if not self._alone:  # as DistributedDataParallel begins, which comes a step later
            with torch.no_grad():
                for tensor in chain(plain.parameters(), plain.buffers()):
                    torch.distributed.broadcast(tensor, 0)

    def renew(self) -> None:
        """Other parameters train from now on."""
        if not self._alone:
            self.model, self._wrapped = self._plain, False

    def without(self, *, silent: bool) -> AbstractContextManager[Any]:
        """Gradients are kept for the next exchange in a `silent` block."""
        if silent and self._wrapped and not self._alone:
            return self.model.no_sync()  # type: ignore[operator,no-any-return]
        return nullcontext()

    def finish(self) -> None:
        """After the gradients of a step."""
        if self._wrapped:
            return
        parameters = [p for p in self._plain.parameters() if p.requires_grad]
        device, reduce = self._accelerator.device, self._accelerator.reduce
        found = torch.tensor([float(p.grad is not None) for p in parameters], device=device)
        somewhere = reduce(found, "sum").tolist()
        for parameter, count in zip(parameters, somewhere, strict=True):
            if count:
                own = parameter.grad
                gradient = torch.zeros_like(parameter) if own is None else own
                parameter.grad = reduce(gradient, "mean")
        self.model = nn.parallel.DistributedDataParallel(
            self._plain,
            device_ids=[device.index] if device.type == "cuda" else None,
            find_unused_parameters=min(somewhere) < self._accelerator.num_processes,
        )
        self._wrapped = True

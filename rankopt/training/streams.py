"""The order and the random numbers of every epoch, from one seed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, Final

import torch

from rankopt._utils.seeding import seed_all, seed_source
from rankopt.training import batches as data

__all__ = ["Streams"]

# Distinct streams for every epoch of every process.
STRIDE: Final = 1_000_003


class Streams:
    """Distinct random numbers for every epoch of every process, the same in every run.

    Args:
        seed: Of the run.
        loader: As `batches.prepared` gives it.
        accelerator: Hugging Face's.
    """

    def __init__(self, seed: int, loader: Any, accelerator: Any) -> None:
        self._seed, self._loader, self._accelerator = seed, loader, accelerator

    def augmentation(self, epoch: int) -> torch.Generator:
        """For the changes of the inputs in this process."""
        return torch.Generator().manual_seed(self._of(epoch))

    def batches(self, epoch: int) -> Iterator[Any]:
        """An epoch's batches of this process; from the first on, it has its own random numbers.

        Samplers draw the order of an epoch at its first batch: from one seed in all
        processes, as each takes its share of it. Workers that would outlive an epoch start anew:
        the random numbers they had come to, no checkpoint knows.
        """
        own = getattr(self._loader, "base_dataloader", self._loader)  # inside accelerate's
        if getattr(own, "_iterator", None) is not None:
            own._iterator = None
        for part in (*data.parts(self._loader), getattr(self._loader, "dataset", None)):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        batches = data.share(self._loader, self._accelerator)
        seed_all(self._of(epoch, process=0))
        order, drawn = data.random_sources(self._loader)
        for number, source in enumerate(order):
            seed_source(source, self._of(epoch, process=0) + number)
        for number, source in enumerate(drawn, start=len(order)):
            seed_source(source, self._of(epoch) + number)
        if self._accelerator.num_processes > 1:
            first = list(islice(batches, 1))
            seed_all(self._of(epoch))
            batches = chain(first, batches)
        return batches

    def _of(self, epoch: int, process: int | None = None) -> int:
        if process is None:
            process = int(self._accelerator.process_index)
        stream = (self._seed * STRIDE + epoch) * STRIDE + process
        return stream % 2**62  # torch takes 63 bits, and sources count on from here

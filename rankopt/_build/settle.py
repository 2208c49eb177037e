"""BatchNorm statistics for compressed models: of several candidates the best stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor, nn

from rankopt._model import measure, surgery
from rankopt.errors import CalibrationError, warn
from rankopt._model.inputs import affordable, divergence, run
from rankopt._calibration.batchnorm import has_norms, norm_statistics, recalibrate

__all__ = ["NormSettler", "settle_norms"]

# Samples on which candidate BatchNorm statistics are compared.
COMPARED_SAMPLES: Final = 512


class NormSettler:
    """Settles the BatchNorm statistics of compressed models of one teacher.

    What the teacher shows on the calibration inputs is computed once, so that many
    candidates of one search cost only their own runs.

    Args:
        teacher: The dense model; not changed.
        held: Calibration batches (see `rankopt._model.inputs.hold`).
    """

    def __init__(self, teacher: nn.Module, held: Sequence[Any]) -> None:
        self._held = held
        self._dense = surgery.clone(teacher).eval()  # a forward may write into its parameters

    @cached_property
    def _compared(self) -> list[Any]:
        return affordable(self._dense, self._held, COMPARED_SAMPLES)

    @cached_property
    def _outputs(self) -> list[Any]:
        with torch.no_grad(), measure.preserve_rng():
            return [run(self._dense, inputs) for inputs in self._compared]

    @cached_property
    def _statistics(self) -> dict[str, tuple[Tensor, Tensor]]:
        return norm_statistics(self._dense, self._held)

    def settle(self, result: nn.Module) -> None:
        """Recalibrate, in place; of old, pooled and teacher-matched statistics the best stay.

        Best is what moves the outputs least from the dense model's on the calibration inputs.
        """
        if not has_norms(result):
            return
        outputs, buffers = self._outputs, dict(result.named_buffers())

        def moved() -> float:
            total = 0.0
            with torch.no_grad(), measure.evaluation(result):
                for x, before in zip(self._compared, outputs, strict=True):
                    after = run(result, x)
                    try:
                        total += divergence(before, after)
                    except CalibrationError:  # outputs whose shape depends on their values
                        return math.inf
            return total

        def state() -> dict[str, Tensor]:
            return {name: value.clone() for name, value in buffers.items()}

        stale = state()
        candidates = [(moved(), stale)]
        with torch.no_grad():
            for reference in (None, self._dense):
                for name, value in buffers.items():
                    value.copy_(stale[name])
                known = None if reference is None else self._statistics
                if recalibrate(
                    result, self._held, teacher=reference, statistics=known, max_samples=None
                ):
                    candidates.append((moved(), state()))
            least, best = min(candidates, key=lambda candidate: candidate[0])
            if math.isinf(least):
                warn(
                    f"outputs of {type(result).__name__} change their shape with the weights, so "
                    "BatchNorm statistics cannot be compared: those of the dense model stay")
            for name, value in buffers.items():
                value.copy_(best[name])


def settle_norms(result: nn.Module, teacher: nn.Module, held: Sequence[Any]) -> None:
    """`NormSettler.settle` for a single compressed model."""
    if has_norms(result):
        NormSettler(teacher, held).settle(result)

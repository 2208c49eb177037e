"""BatchNorm statistics for compressed models: of several candidates the best stay."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor, nn

from rankopt._calibration.batchnorm import (
    CallSums,
    NonFiniteStatisticsError,
    has_norms,
    input_sums,
    settle_in_one_pass,
)
from rankopt._model import measure, surgery
from rankopt._model.inputs import affordable, divergence, run
from rankopt.errors import CalibrationError, warn

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
    def _expected(self) -> list[dict[str, list[CallSums]]]:
        return [input_sums(self._dense, inputs) for inputs in self._held]

    def settle(self, result: nn.Module) -> None:
        """Recalibrate, in place; of old, pooled and teacher-matched statistics the best stay.

        Best is what moves the outputs least from the dense model's on the calibration inputs.
        Where that cannot be told, the old ones stay, with a warning; a failure leaves them too.
        """
        if not has_norms(result):
            return
        buffers = dict(result.named_buffers())
        stale = {name: value.clone() for name, value in buffers.items()}
        try:
            self._settle(result, buffers, stale)
        except BaseException:
            _put(buffers, stale)
            raise

    def _settle(
        self, result: nn.Module, buffers: Mapping[str, Tensor], stale: Mapping[str, Tensor]
    ) -> None:
        best, (least, problem) = stale, self._moved(result)
        failures = []
        for teacher in (None, self._dense):
            _put(buffers, stale)
            expected = itertools.repeat({}) if teacher is None else self._expected
            try:
                settle_in_one_pass(result, zip(self._held, expected, strict=False), teacher)
            except NonFiniteStatisticsError as error:
                failures.append(str(error))
                continue
            moved, _ = self._moved(result)
            if moved < least:
                best, least = {name: value.clone() for name, value in buffers.items()}, moved
        _put(buffers, best)
        if math.isinf(least) or len(failures) == 2:  # both candidates
            warn(
                f"BatchNorm statistics of {type(result).__name__} cannot be renewed, so those of "
                f"the dense model stay: {problem or failures[0]}"
            )

    def _moved(self, result: nn.Module) -> tuple[float, str]:
        """How far the outputs are from the dense model's; infinity, and why, if that is unknown."""
        outputs, total = self._outputs, 0.0
        with torch.no_grad(), measure.preserve_rng(), measure.evaluation(result):
            for x, before in zip(self._compared, outputs, strict=True):
                after = run(result, x)
                try:
                    total += divergence(before, after)
                except CalibrationError as error:  # no shape to rely on, or not finite
                    return math.inf, str(error)
        if math.isfinite(total):
            return total, ""
        return math.inf, "its outputs are not finite on the calibration inputs"


def _put(buffers: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in buffers.items():
            value.copy_(values[name])


def settle_norms(result: nn.Module, teacher: nn.Module, held: Sequence[Any]) -> None:
    """`NormSettler.settle` for a single compressed model."""
    if has_norms(result):
        NormSettler(teacher, held).settle(result)

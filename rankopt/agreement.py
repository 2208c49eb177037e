"""A metric without labels: how near outputs are to those of the original model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rankopt._model import measure, surgery
from rankopt._model.inputs import (
    MAX_SAMPLES,
    batch_size,
    digest,
    divergence_loss,
    hold,
    main_output,
    run,
)

__all__ = ["Agreement"]


class Agreement:
    """How near a model's outputs are to the original's: minus their mean divergence.

    That is the Kullback-Leibler divergence of softened class probabilities where outputs are
    logits, else the relative squared error; 0 for the original, less for any other. Unlike an
    accuracy it is hardly better on inputs the original was trained on than on others, and tells
    small differences apart, so a study may be judged by it on few samples. It is to be passed
    as ``evaluate=``, and comes batch by batch.

    Args:
        model: The original; run once on all inputs, in eval mode, and not kept.
        inputs: Batches as of ``calibration=`` of `rankopt.search`; labels are left out. They and
            the outputs are held.
        temperature: What logits are divided by (arXiv 1503.02531, section 2.1).
        max_samples: How many samples are used at most; None for all.

    Raises:
        CalibrationError: `inputs` cannot be used, or outputs hold nothing that can be compared.
        ModelError: `model` is no module.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
        >>> nearness = rankopt.Agreement(net, [torch.randn(64, 64) for _ in range(4)])
        >>> small = rankopt.apply(net, rankopt.search(net, "params<=50%"))
        >>> found = rankopt.compare(net, small, evaluate=nearness).metric
        >>> found.before == 0 > found.after
        True
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        *,
        temperature: float = 4.0,
        max_samples: int | None = MAX_SAMPLES,
    ) -> None:
        surgery.check_model(model)
        if not temperature > 0:
            raise ValueError(f"temperature={temperature!r}: expected a positive number")
        self.temperature = temperature
        self._held = hold(model, inputs, max_samples=max_samples)
        with torch.no_grad(), measure.preserve_rng(), measure.evaluation(model):
            self._wanted = [main_output(run(model, batch)) for batch in self._held]
        self._digest = digest(self._held)[:16]

    def __call__(self, model: nn.Module) -> Iterator[tuple[float, float]]:
        """Minus the divergence on each batch, and the batch's samples."""
        for batch, wanted in zip(self._held, self._wanted, strict=True):
            with torch.no_grad(), measure.evaluation(model):
                found = run(model, batch)
            loss = divergence_loss(wanted, found, temperature=self.temperature)
            yield -float(loss), float(batch_size(batch))

    def __repr__(self) -> str:
        return f"Agreement(inputs={self._digest}, temperature={self.temperature:g})"

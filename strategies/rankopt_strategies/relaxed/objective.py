"""What the ranks are to keep small on data: distance from the dense model, or the task's loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, Final

import torch
from torch import Tensor, nn

from rankopt._model import measure
from rankopt._model.inputs import (
    OUTPUT_BYTES,
    batch_size,
    divergence_loss,
    main_output,
    output_bytes,
    run,
    shared_tensors,
    tensors_in,
)
from rankopt._model.sharing import per_sample, shortened
from rankopt._soft.weights import named_parameters
from rankopt.errors import CalibrationError, ModelError
from rankopt.strategy import Problem

__all__ = ["Criterion", "Objective", "check_gradient", "distillation", "task"]

Criterion = Callable[[Any, Any], Tensor]
# Distillation stops reading here: the teacher's outputs are held.
MAX_BATCHES: Final = 64
HELD_BYTES: Final = 4 * OUTPUT_BYTES
# Of a batch whose outputs are compared: copies in double precision, gradients.
COPIES: Final = 8
LEAST_BATCH: Final = 2
_NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Objective:
    """A loss over batches that are gone through again and again, in order.

    BatchNorm layers use the statistics of the batch, as after the recalibration that
    `rankopt.apply` does; everything else is in eval mode.

    Args:
        model: A dense model of its own; its mode is changed.
        batches: (inputs, target) pairs.
        criterion: A scalar tensor from (output, target).
        distils: Whether targets are the model's own outputs, which follow from the rest and
            are not the same to the last bit everywhere.

    Attributes:
        position: The batch that comes next.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[tuple[Any, Any]],
        criterion: Criterion,
        *,
        distils: bool = False,
    ) -> None:
        self.distils = distils
        self.model, self.batches, self.criterion = model.eval(), batches, criterion
        self.position = 0
        for module in model.modules():
            if isinstance(module, _NORMS):
                module.momentum = 0.0  # statistics stay, whatever ran before
                module.register_forward_pre_hook(_several, with_kwargs=True)

    def __len__(self) -> int:
        return len(self.batches)

    def __call__(self, forward: Callable[[Any], Any], index: int | None = None) -> Tensor:
        """The loss of `forward` on one batch: the given one, else the next.

        Raises:
            ModelError: The criterion gives no finite scalar for the dense model either.
        """
        if index is None:
            index, self.position = self.position, (self.position + 1) % len(self.batches)
        inputs, target = self.batches[index]
        loss = self.criterion(forward(inputs), target)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            kind = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ModelError(f"the criterion gave {kind}; expected a scalar tensor")
        return loss.reshape(())

    def check(self) -> float:
        """The dense model's loss on the first batch; raises `ModelError` unless it is finite."""
        with torch.no_grad():
            loss = float(self(lambda inputs: measure.call(self.model, inputs), 0))
        if not torch.isfinite(torch.tensor(loss)):
            raise ModelError(
                f"the criterion gives {loss} for the dense model on the first batch; it has to be "
                "finite: check the data, its labels and the criterion"
            )
        return loss

    def summary(self) -> list[float]:
        """Mean and root mean square of the targets."""
        tensors = [t.double() for _, target in self.batches for t in tensors_in(target)]
        count = sum(t.numel() for t in tensors)
        mean = sum(float(t.sum()) for t in tensors) / count
        square = sum(float(t.square().sum()) for t in tensors) / count
        return [mean, square**0.5]

    def with_weights(self, problem: Problem, weights: Mapping[str, Tensor]) -> Tensor:
        """The loss on the next batch with other weights: site name to canonical weight."""
        named = dict[str, Tensor]()
        for site in problem.sites:
            dense, known = problem.weight(site.layer), problem.known(site)
            weight = weights[site.name].to(dense.dtype)
            mean = None if known is None else known.mean
            named |= named_parameters(self.model, site.layers, dense, weight, mean)

        def forward(inputs: Any) -> Any:
            args = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
            if isinstance(inputs, Mapping):
                return torch.func.functional_call(
                    self.model, named, (), dict(inputs), tie_weights=False
                )
            return torch.func.functional_call(self.model, named, tuple(args), tie_weights=False)

        return self(forward)


def check_gradient(loss: Tensor) -> None:
    """Raise `ModelError` for a loss without a gradient."""
    if not loss.requires_grad:
        raise ModelError(
            "relaxed needs the gradient of the loss, which has none: is the model's output "
            "computed under no_grad? strategy='knapsack' needs none"
        )


def _several(norm: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Batch statistics, unless there is one value only, which has no variance."""
    values = next(tensors_in((args, named)))
    norm.training = values.numel() > values.shape[1]


def distillation(problem: Problem, samples: int, temperature: float) -> Objective:
    """Distance of the outputs from the dense model's, on the calibration inputs.

    Args:
        problem: With calibration inputs.
        samples: Of a batch; fewer where outputs are large, such as those of language models.
        temperature: Of the class probabilities.
    """
    assert problem.copy is not None
    model = problem.copy()
    with torch.no_grad(), measure.evaluation(model):
        shared = shared_tensors(model, problem.inputs)
        size = output_bytes(model, problem.inputs, shared)
        samples = min(samples, max(LEAST_BATCH, OUTPUT_BYTES // (COPIES * size)))
        held = shortened(problem.inputs, max(samples, HELD_BYTES // size), shared)
        inputs = [part for batch in held for part in _split(batch, samples, shared)][:MAX_BATCHES]
        targets = [main_output(run(model, batch)) for batch in inputs]
    pairs = list(zip(inputs, targets, strict=True))

    def criterion(output: Any, target: Any) -> Tensor:
        return divergence_loss(target, output, temperature=temperature)

    return Objective(model, pairs, criterion, distils=True)


def task(problem: Problem, data: Iterable[Any], criterion: Criterion) -> Objective:
    """The user's criterion on labelled batches (inputs, targets)."""
    if problem.copy is None:
        raise ModelError("objective='task' runs the model: pass example_inputs=")
    model = problem.copy()
    device = next(iter((*model.parameters(), *model.buffers()))).device
    batches = []
    for batch in data:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise CalibrationError(
                f"data= yielded a {type(batch).__name__}; expected pairs (inputs, targets)"
            )
        batches.append(tuple(measure.to_device(part, device) for part in batch))
    if not batches:
        raise CalibrationError("data= is empty: it yielded no batch of (inputs, targets)")
    return Objective(model, batches, criterion)


def _split(inputs: Any, size: int, shared: Set[int]) -> list[Any]:
    """A batch in parts of `size` samples, where everything in it has its size."""
    count = batch_size(inputs)
    if count <= size or any(
        t.dim() and not per_sample(t, count, shared) for t in tensors_in(inputs)
    ):
        return [inputs]

    def cut(start: int) -> Any:
        return measure.with_tensors(inputs, lambda t: t[start : start + size] if t.dim() else t)

    # A last part of a few samples has poor batch statistics.
    return [cut(s) for s in range(0, count, size) if s == 0 or count - s >= size // 2]

"""compare(): what was gained, counted and measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from rankopt._build.apply import unpacked_clone
from rankopt._model import measure, surgery
from rankopt._model.inputs import (
    class_dim,
    compared,
    main_output,
    relative_error,
    scores_classes,
    tensors_in,
)
from rankopt._model.metric import Evaluate, metric_of
from rankopt._model.probe import Call
from rankopt._timing.conditions import conditions
from rankopt._timing.latency import Interval, Mode, runner, time_interleaved
from rankopt.errors import CalibrationError, ModelError

__all__ = ["Comparison", "Figure", "compare", "macs_of"]


@dataclass(frozen=True)
class Figure:
    """One quantity of both models."""

    before: float
    after: float

    @property
    def ratio(self) -> float:
        """After / before; 0 where that was 0."""
        return self.after / self.before if self.before else 0.0


@dataclass(frozen=True)
class Comparison:
    """Figures of an original and a compressed model.

    Args:
        params: Unique parameters.
        memory: Bytes of parameters and buffers.
        macs: Multiply-accumulates for the example inputs; None without them.
        metric: The user's metric; None without `evaluate`.
        output_error: Relative error ‖y' − y‖/‖y‖ of the outputs y for the example inputs;
            None without them, where outputs are no floating-point tensors of one shape or
            not finite, or where the device has no memory for both.
        agreement: Share of the example inputs' predictions with the same class, where
            outputs are class scores.
        latency_before_ms: Median of the original, milliseconds.
        latency_after_ms: Median of the compressed model, milliseconds.
        latency_ratio: Median paired ratio, below 1 is faster.
        conditions: What the times depend on: device, torch, dtype, memory format,
            threads, mode; empty if nothing was timed.
    """

    params: Figure
    memory: Figure
    macs: Figure | None = None
    metric: Figure | None = None
    output_error: float | None = None
    agreement: float | None = None
    latency_before_ms: Interval | None = None
    latency_after_ms: Interval | None = None
    latency_ratio: Interval | None = None
    conditions: Mapping[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """In plain words, whether the compressed model is faster."""
        ratio = self.latency_ratio
        if ratio is None:
            return "latency was not measured: pass example_inputs"
        noise = "; the machine is noisy, measure again with more rounds" if ratio.noisy else ""
        if ratio.low <= 1 <= ratio.high:
            return f"no faster and no slower than the original, as far as measured{noise}"
        if ratio.high < 1:
            return f"{1 / ratio.median:.2f}x as fast as the original{noise}"
        less = ", although it computes less" * (self.macs is not None and self.macs.ratio < 1)
        return (
            f"slower than the original: it takes {ratio.median:.2f} times as long{less}; keep the "
            "original where speed is what counts, or search under a budget on time, such as "
            f"'latency<=90%'{noise}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "verdict": self.verdict}

    def __str__(self) -> str:
        from rankopt._build.comparison_table import comparison_table
        from rankopt._utils.tables import to_text

        return to_text(comparison_table(self))


def compare(
    original: nn.Module,
    compressed: nn.Module,
    *,
    example_inputs: Any = None,
    evaluate: Evaluate | None = None,
    rounds: int = 30,
    mode: Mode = "inference",
    cuda_graph: bool = False,
    compile: bool = False,
    seed: int = 0,
) -> Comparison:
    """Count and time two models side by side; prints as a table.

    Both run interleaved, in eval mode without gradients unless `mode` says otherwise;
    modes and random generators are as before afterwards.

    Args:
        original: The dense model; compiled, by `torch.compile` or in place, it is timed so.
        compressed: The compressed one, likewise.
        example_inputs: A tensor, a tuple or a mapping; without it, only
            parameters and memory are compared.
        evaluate: The task's metric of a model, higher or lower.
        rounds: Timing rounds.
        mode: What is timed: ``inference``, or ``training``, forward and backward on
            copies of both models in train mode.
        cuda_graph: Whether to time replays of CUDA graphs (inference on CUDA).
        compile: Whether to time both under `torch.compile`, compiled anew.
        seed: Orders the rounds.

    Raises:
        ModelError: A model fails on the inputs, or training steps of a compiled model
            are to be timed without `compile`.
        EvaluationError: `evaluate` raised, or gave no finite number.
        ValueError: An unknown mode, or too few rounds.

    Example:
        >>> model = nn.Linear(64, 64)
        >>> same = rankopt.compare(model, model, example_inputs=torch.zeros(1, 64), rounds=3)
        >>> same.macs.ratio
        1.0
    """
    surgery.check_model(original, "original")
    surgery.check_model(compressed, "compressed")
    models = [surgery.unwrap(original), surgery.unwrap(compressed)]
    figures: dict[str, Any] = {
        "params": Figure(*(measure.count_params(model) for model in models)),
        "memory": Figure(*(measure.count_memory(model) for model in models)),
    }
    with measure.preserve_rng(), measure.evaluation(original, compressed), torch.no_grad():
        if evaluate is not None:
            figures["metric"] = Figure(
                metric_of(evaluate, original), metric_of(evaluate, compressed)
            )
        if example_inputs is not None:
            measure.check_inputs(example_inputs)
            device = surgery.device_of(models[0])
            inputs = measure.copied(measure.to_device(example_inputs, device))
            timed = [_eager(model) for model in models] if compile else [original, compressed]
            if mode == "training":  # statistics of the user's BatchNorm are not to move
                if not compile:
                    _check_eager(original, compressed)
                timed = [surgery.clone(model).train() for model in models]
            try:
                figures["macs"] = Figure(*(macs_of(model, inputs) for model in models))
                figures |= _apart(models[0], models[1], inputs)
                runners = {
                    name: runner(model, inputs, mode=mode, cuda_graph=cuda_graph, compile=compile)
                    for name, model in zip(("before", "after"), timed, strict=True)
                }
                timings = time_interleaved(runners, rounds=rounds, device=device, seed=seed)
            except (RuntimeError, TypeError) as error:
                raise ModelError(f"a model fails on example_inputs: {error}") from error
            first = next(tensors_in(inputs), None)
            figures["conditions"] = conditions(
                device,
                None if first is None else Call.of(first),
                mode,
                cuda_graph=cuda_graph,
                compile=compile,
            )
            figures["latency_before_ms"] = timings.interval("before")
            figures["latency_after_ms"] = timings.interval("after")
            figures["latency_ratio"] = timings.ratio("after", "before")
    return Comparison(**figures)


def _eager(model: nn.Module) -> nn.Module:
    """The model, or a copy with its tensors where it was compiled in place: copies are not."""
    if not surgery.is_compiled(model):
        return model
    return surgery.clone(model, share=[*model.parameters(), *model.buffers()])


def _check_eager(*models: nn.Module) -> None:
    for model in models:
        if surgery.is_compiled(model):
            raise ModelError(
                f"{type(surgery.unwrap(model)).__name__} is compiled, and mode='training' times "
                "copies, which would run without torch.compile; pass compile=True to compile the "
                "copies, or give the plain models"
            )


def _apart(original: nn.Module, compressed: nn.Module, inputs: Any) -> dict[str, float]:
    """How far the outputs are from each other; nothing where that cannot be told."""
    try:
        outputs = [main_output(measure.call(model, inputs)) for model in (original, compressed)]
        before, after = map(compared, outputs)
        if before.shape != after.shape:
            return {}
        error = math.sqrt(relative_error(before, after))
        found = {"output_error": error} if math.isfinite(error) else {}
        if scores_classes(outputs[0]):
            dim = class_dim(before)
            same = before.argmax(dim) == after.argmax(dim)
            found["agreement"] = int(same.sum()) / max(same.numel(), 1)
        return found
    except (CalibrationError, torch.OutOfMemoryError):  # nothing to compare, or no room for it
        return {}


def macs_of(model: nn.Module, inputs: Any) -> int:
    """MACs in eval mode, of a copy whose attention is unpacked, so that all of them are seen."""
    view = unpacked_clone(model).eval()
    return measure.count_macs(view, inputs)

"""The settings of a fine-tuning run, checked, and its learning rate over time."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from rankopt._utils.arguments import check_integer
from rankopt.training.average import Average
from rankopt.training.schedules import FREEZING, FactorsUntil, NoFreezing, Schedule

__all__ = ["OPTIMIZERS", "PRECISIONS", "RATES", "Recipe", "rate"]

RATES: Final = ("cosine", "one-cycle", "constant")
PRECISIONS: Final = ("no", "bf16", "fp16")
# Share of the steps in which the rate rises.
WARMUP: Final = {"cosine": 0.05, "one-cycle": 0.3, "constant": 0.0}
# One-cycle starts at this share of the peak, and ends at 1e-4 of the start (1708.07120).
ONE_CYCLE_START: Final = 1 / 25
ONE_CYCLE_END: Final = ONE_CYCLE_START * 1e-4

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: Final = ("adamw", "sgd")


@dataclass(frozen=True)
class Recipe:
    """Settings of `rankopt.finetune`, which describes them."""

    epochs: int
    learning_rate: float
    optimizer: str | MakeOptimizer
    weight_decay: float
    schedule: str
    warmup: float | None
    accumulate: int
    clip: float | None
    ema: float | None
    patience: int | None
    precision: str
    freezing: str | Schedule
    freezing_steps: int | None
    final_epochs: int
    seed: int

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("accumulate", 1), ("final_epochs", 0), ("seed", 0)):
            check_integer(name, getattr(self, name), least)
        for name in ("patience", "freezing_steps"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        _check_number("learning_rate", self.learning_rate, 0.0, math.inf, open_below=True)
        _check_number("weight_decay", self.weight_decay, 0.0, math.inf)
        if self.clip is not None:
            _check_number("clip", self.clip, 0.0, math.inf, open_below=True)
        if self.ema is not None:
            _check_number("ema", self.ema, 0.0, 1.0, open_below=True)
        if self.warmup is not None:
            _check_number("warmup", self.warmup, 0.0, 1.0)
        for name, known in (("schedule", RATES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: expected one of {', '.join(known)}"
                )
        if not callable(self.optimizer) and self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer={self.optimizer!r}: expected {' or '.join(OPTIMIZERS)}, or a function "
                "of the parameters that makes one"
            )
        if not isinstance(self.freezing, Schedule) and self.freezing not in FREEZING:
            raise ValueError(
                f"freezing={self.freezing!r}: expected one of {', '.join(FREEZING)}, or a Schedule"
            )
        if self.final_epochs > self.epochs:
            raise ValueError(f"final_epochs={self.final_epochs}: there are {self.epochs} epochs")

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser over `parameters`.

        Raises:
            ValueError: The user's function made something else, or one that needs a closure.
        """
        if self.optimizer == "adamw":
            return torch.optim.AdamW(
                parameters, lr=self.learning_rate, weight_decay=self.weight_decay
            )
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                parameters,
                lr=self.learning_rate,
                momentum=0.9,
                nesterov=True,
                weight_decay=self.weight_decay,
            )
        assert callable(self.optimizer)
        made: Any = self.optimizer(parameters)
        if not isinstance(made, torch.optim.Optimizer):
            raise ValueError(f"optimizer made a {type(made).__name__}, not a torch.optim.Optimizer")
        closure = inspect.signature(made.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise ValueError(
                f"optimizer made a {type(made).__name__}, whose step needs a closure, as it "
                "evaluates the loss several times; give one that takes a step from the gradients"
            )
        return made

    def make_average(self, model: nn.Module) -> Average | None:
        """The moving average of a model's weights; None where none is asked for."""
        return None if self.ema is None else Average(model, self.ema)

    def freezing_schedule(self, steps_per_epoch: int) -> Schedule:
        """The freezing schedule, every factor training in the last epochs.

        Its phases are epochs, or steps where `freezing_steps` are given.
        """
        schedule = (
            self.freezing if isinstance(self.freezing, Schedule) else FREEZING[self.freezing]()
        )
        if isinstance(schedule, NoFreezing):
            return schedule
        last = self.epochs - self.final_epochs
        if self.freezing_steps is not None:
            schedule, last = schedule.every(self.freezing_steps), last * steps_per_epoch
        return FactorsUntil(schedule, last) if self.final_epochs else schedule

    def rate(self, step: int, total: int) -> float:
        """The learning rate's factor at `step` of `total`."""
        warmup = WARMUP[self.schedule] if self.warmup is None else self.warmup
        return rate(self.schedule, step, total, warmup)


def rate(schedule: str, step: int, total: int, warmup: float) -> float:
    """Share of the peak learning rate at `step`, from 0, of `total` steps.

    Example:
        >>> [round(rate("cosine", step, 10, 0.2), 2) for step in (0, 1, 2, 6, 9)]
        [0.5, 1.0, 1.0, 0.5, 0.04]
    """
    rising = round(warmup * total)
    start, end = (ONE_CYCLE_START, ONE_CYCLE_END) if schedule == "one-cycle" else (0.0, 0.0)
    if step < rising:
        if schedule == "one-cycle":
            return _cosine(start, 1.0, step / rising)
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    return _cosine(1.0, end, (step - rising) / max(total - rising, 1))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


def _check_number(
    name: str, value: Any, low: float, high: float, *, open_below: bool = False
) -> None:
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value < high
    if not fine or (open_below and value == low):
        sign = "above" if open_below else "of at least"
        below = "" if high == math.inf else f" and below {high:g}"
        raise ValueError(f"{name}={value!r}: expected a number {sign} {low:g}{below}")

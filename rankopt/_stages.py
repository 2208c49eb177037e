"""The stages of `rankopt.compress`, and the folder that lets it go on where it was interrupted."""

from __future__ import annotations

import inspect
import json
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from rankopt import _apply, _recover, _search, measure, surgery
from rankopt import checkpoint as files
from rankopt._compare import Comparison, compare
from rankopt._files import write_text
from rankopt._fold import fold
from rankopt._open import uses_metric
from rankopt.budget import Budget
from rankopt.errors import CheckpointError, ModelError, RankoptError
from rankopt.inputs import digest, hold, tensors_in
from rankopt.plan import RankPlan
from rankopt.registry import strategies
from rankopt.training.finetune import finetune as train_on

__all__ = ["RESULT", "WORK", "Run", "Stage"]

WORK: Final = "work.json"
RESULT: Final = "result.json"
RECOVER_SECONDS: Final = 60.0
FUNCTIONS: Final[Mapping[str, Callable[..., Any]]] = {
    "search": _search.search,
    "apply": _apply.apply,
    "recover": _recover.recover,
    "finetune": train_on,
}


@dataclass(frozen=True)
class Stage:
    """What one step of the pipeline took and gave.

    Args:
        name: Such as ``apply``; with several rounds ``apply 2``.
        seconds: Wall-clock time, the evaluation not counted.
        params: Of the model after it; None for a search.
        metric: `evaluate` of the model after it; None without `evaluate`, and for a search.
        note: In words, what came of it.
    """

    name: str
    seconds: float
    params: int | None = None
    metric: float | None = None
    note: str = ""


class Run:
    """The stages, what they made, and where that is kept."""

    def __init__(
        self, model: nn.Module, work: Path, evaluate: Any, seed: int, progress: bool | None
    ) -> None:
        self.model, self.work, self.evaluate = model, work, evaluate
        self.seed, self.progress = seed, progress
        self.stages: list[Stage] = []
        self.done: dict[str, Any] = {}
        self.identity: dict[str, Any] = {}
        self.calibration: list[Any] | None = None
        self.inputs: Any = None

    def calibrate(self, given: Any, train: Any, samples: int, inputs: Any) -> None:
        """Hold the calibration inputs, so that every stage sees the same."""
        source = train if given is None else given
        if source is not None:
            with measure.preserve_rng():
                torch.manual_seed(self.seed)
                random.seed(self.seed)
                np.random.seed(self.seed % 2**32)
                self.calibration = hold(self.model, source, max_samples=samples)
        self.inputs = inputs
        if inputs is None and self.calibration:
            self.inputs = self.calibration[0]

    def begin(self, budgets: list[Any], stages: Mapping[str, Any]) -> None:
        """Read what an earlier call with the same arguments has done.

        Raises:
            TypeError: Settings that a stage does not know.
            CheckpointError: The folder was made with others.
        """
        for name, how in stages.items():
            if isinstance(how, Mapping):
                try:
                    inspect.signature(FUNCTIONS[name]).bind_partial(**how)
                except TypeError as error:
                    raise TypeError(f"{name}={dict(how)!r}: {error}") from error
        self.identity = {
            "model": measure.weights_digest(surgery.unwrap(self.model)),
            "budgets": json.loads(json.dumps(budgets)),
            "settings": json.loads(json.dumps(stages, default=_spelled)),
            "seed": self.seed,
            "calibration": None if self.calibration is None else digest(self.calibration),
            "evaluate": None if self.evaluate is None else _spelled(self.evaluate),
        }
        path = self.work / WORK
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            made, done = found["identity"], found["stages"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        begun = {key.split()[0] for key in done}
        for key, value in self.identity.items():
            before = made.get(key, value)
            if key == "settings":  # those of stages that are yet to come may change
                before, value = ({n: v for n, v in each.items() if n in begun}
                                 for each in (before, value))  # fmt: skip
            if before != value:
                raise CheckpointError(
                    f"{path} was made with {key} {before}, this call has {value}; use the "
                    "same to go on with it, or another folder="
                )
        self.done = done

    def rounds(
        self, budgets: list[Budget | None], stages: Mapping[str, Any], train: Any
    ) -> tuple[nn.Module, RankPlan]:
        """All rounds; the last one's model and plan."""
        source, small, plan = self.model, None, None
        for number, budget in enumerate(budgets, start=1):
            tag = f" {number}" if len(budgets) > 1 else ""
            if small is not None:
                source = fold(small, self.model)
            plan = self._searched(tag, source, budget, stages["search"])
            small = self._applied(tag, source, plan, stages["apply"])
            how = stages["recover"]
            if how is not False and (self.calibration or callable(how)):
                small = self._changed(tag, "recover", small, self._recoverer(how))
            how = stages["finetune"]
            if how is not False and (train is not None or callable(how)):
                tuner = self._tuner(how, train, f"training{tag}".replace(" ", "-"))
                small = self._changed(tag, "finetune", small, tuner)
        assert small is not None
        assert plan is not None
        return small, plan

    def verify(
        self, small: nn.Module, plan: RankPlan, budget: Budget | None, path: Path
    ) -> Comparison:
        """Save, read back, hold what was read to what was promised, and only then write `path`."""
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            candidate = Path(folder) / path.name
            files.save(small, candidate)
            reloaded = files.load(self.model, candidate).eval()
        identical = self.inputs is not None and self._gives_the_same(small, reloaded)
        original = surgery.unwrap(self.model)  # what was read back is not compiled either
        comparison = compare(
            original, reloaded, example_inputs=self.inputs, evaluate=self.evaluate, seed=self.seed
        )
        _check_budget(plan.budget if budget is None else budget, comparison)
        files.save(small, path)
        metric = None if comparison.metric is None else comparison.metric.after
        note = "read back: outputs identical" if identical else "read back"
        seconds = time.perf_counter() - started
        self.stages.append(Stage("verify", seconds, int(comparison.params.after), metric, note))
        return comparison

    def _gives_the_same(self, small: nn.Module, reloaded: nn.Module) -> bool:
        """Whether outputs were found identical; False where they hold no tensor to compare."""
        outputs = []
        with torch.no_grad(), measure.preserve_rng(), measure.evaluation(small):
            for each in (small, reloaded):
                torch.manual_seed(self.seed)  # a model may draw numbers in eval mode too
                inputs = _copied(measure.to_device(self.inputs, surgery.device_of(small)))
                outputs.append(_copied(list(tensors_in(measure.call(each, inputs)))))
        one, other = outputs
        if len(one) != len(other) or not all(map(_same, one, other)):
            raise RankoptError("the model read back from its file gives other outputs; report this")
        return bool(one)

    # Stages

    def _searched(self, tag: str, source: nn.Module, budget: Budget | None, how: Any) -> RankPlan:
        path = self.work / f"plan{tag.replace(' ', '-')}.json"

        def make() -> RankPlan:
            if callable(how):
                plan = how(source, budget)
                if not isinstance(plan, RankPlan):
                    raise ModelError(f"search returned a {type(plan).__name__}, not a RankPlan")
                return plan
            settings = {
                "example_inputs": self.inputs,
                "calibration": self.calibration,
                "calibration_samples": None,
                "seed": self.seed,
                "progress": self.progress,
                **(how or {}),
            }
            if self.evaluate is not None and uses_metric(
                budget, strategies.create(settings.get("strategy", _search.DEFAULT_STRATEGY))
            ):
                settings.setdefault("evaluate", self.evaluate)
            return _search.search(source, budget, **settings)

        key = f"search{tag}"
        if key in self.done:
            plan = RankPlan.load(path)
        else:
            started = time.perf_counter()
            plan = make()
            plan.save(path)
            self._finished(Stage(key, time.perf_counter() - started, note=_planned(plan)))
        self.stages.append(Stage(**self.done[key]))
        return plan

    def _applied(self, tag: str, source: nn.Module, plan: RankPlan, how: Any) -> nn.Module:
        def make() -> tuple[nn.Module, str]:
            if callable(how):
                small = how(source, plan)
                if not isinstance(small, nn.Module):
                    raise ModelError(f"apply returned a {type(small).__name__}, not a module")
                return small, ""
            settings = {
                "calibration": self.calibration,
                "calibration_samples": None,
                "progress": self.progress,
                **(how or {}),
            }
            return _apply.apply(source, plan, **settings), ""

        return self._stage(f"apply{tag}", make)

    def _changed(
        self, tag: str, name: str, small: nn.Module, change: Callable[[nn.Module], Any]
    ) -> nn.Module:
        def make() -> tuple[nn.Module, str]:
            return small, str(change(small) or "")

        return self._stage(f"{name}{tag}", make)

    def _recoverer(self, how: Any) -> Callable[[nn.Module], Any]:
        if callable(how):
            return lambda small: how(small, self.model)
        settings = {
            "calibration": self.calibration,
            "calibration_samples": None,
            "seconds": RECOVER_SECONDS,
            "seed": self.seed,
            "progress": self.progress,
            **(how or {}),
        }
        return lambda small: _recover.recover(small, teacher=self.model, **settings)

    def _tuner(self, how: Any, train: Any, name: str) -> Callable[[nn.Module], Any]:
        if callable(how):
            return lambda small: how(small, self.model, self.work / name)
        settings = {
            "teacher": self.model,
            "freezing": "sequential",
            "final_epochs": 1,
            "folder": self.work / name,
            "seed": self.seed,
            "progress": self.progress,
            **(how or {}),
        }
        return lambda small: train_on(small, train, **settings)

    def _stage(self, key: str, make: Callable[[], tuple[nn.Module, str]]) -> nn.Module:
        """Do a stage, or read what it made before."""
        path = self.work / f"{key.replace(' ', '-')}.safetensors"
        if key in self.done:
            small = files.load(self.model, path)
        else:
            started = time.perf_counter()
            small, note = make()
            seconds = time.perf_counter() - started
            files.save(small, path)
            metric = None
            if self.evaluate is not None:
                with torch.no_grad(), measure.preserve_rng(), measure.evaluation(small):
                    metric = float(self.evaluate(small))
            params = measure.count_params(small)
            self._finished(Stage(key, seconds, params, metric, note))
        self.stages.append(Stage(**self.done[key]))
        return small

    def _finished(self, stage: Stage) -> None:
        self.done[stage.name] = vars(stage)
        text = json.dumps({"identity": self.identity, "stages": self.done}, indent=1)
        write_text(self.work / WORK, text + "\n")


def _check_budget(budget: Budget | None, found: Comparison) -> None:
    """Hold the counted figures of the file to the budget; latency was held by the search."""
    for axis in ("params", "macs", "memory"):
        figure = getattr(found, axis)
        if budget is None or axis not in budget.axes or figure is None:
            continue
        if figure.after > budget.ratio(axis) * figure.before:
            raise RankoptError(
                f"the result's {axis} is {100 * figure.ratio:.2f}% of the original's, above the "
                f"budget ({budget.explain()}); no output was written"
            )


def _planned(plan: RankPlan) -> str:
    return f"{len(plan.changes)} of {len(plan.decisions)} sites decomposed"


def _copied(inputs: Any) -> Any:
    """Inputs with tensors of their own: a forward may write into those it is given."""
    if isinstance(inputs, torch.Tensor):
        return inputs.clone()
    if isinstance(inputs, Mapping):
        return {key: _copied(value) for key, value in inputs.items()}
    return tuple(map(_copied, inputs)) if isinstance(inputs, (tuple, list)) else inputs


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal; NaN is, where a model means it."""
    if torch.equal(a, b):
        return True
    if a.shape != b.shape or not (a.is_floating_point() and b.is_floating_point()):
        return False
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _spelled(value: Any) -> str:
    """A setting that JSON has no word for: settings by their repr, functions by their name."""
    if callable(value):
        return str(getattr(value, "__qualname__", type(value).__name__))
    if isinstance(value, (nn.Module, torch.Tensor)):
        return type(value).__name__
    if " object at 0x" in repr(value):  # an address, which means nothing later
        return type(value).__qualname__
    return repr(value)

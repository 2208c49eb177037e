"""The stages of `rankopt.compress`, and the folder that lets it go on where it was interrupted."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from rankopt import checkpoint as files
from rankopt._build.apply import apply
from rankopt._build.compare import Comparison, Figure, compare, macs_of
from rankopt._build.fold import check_foldable, fold
from rankopt._build.provenance import plan_of, remember_plan
from rankopt._model import measure, surgery
from rankopt._model.inputs import digest, hold, tensors_in
from rankopt._model.metric import Evaluate, metric_of
from rankopt._model.spelled import spelled
from rankopt._pipeline.checks import TUNING, check_budget
from rankopt._search.opening import uses_metric
from rankopt._search.search import DEFAULT_STRATEGY, search
from rankopt._utils.files import write_text
from rankopt._utils.seeding import kept_states, seed_all, seed_source
from rankopt._utils.strict_json import strict_json
from rankopt.budget import Budget
from rankopt.errors import (
    CalibrationError,
    CheckpointError,
    ModelError,
    RankoptError,
)
from rankopt.plan import RankPlan
from rankopt.registry import strategies
from rankopt.training.batches import fingerprint, random_sources
from rankopt.training.finetune import finetune as train_on
from rankopt.training.repair import recover

__all__ = ["RESULT", "WORK", "Run", "Stage"]

WORK: Final = "work.json"
RESULT: Final = "result.json"
RECOVER_SECONDS: Final = 60.0


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
        self,
        model: nn.Module,
        work: Path,
        evaluate: Evaluate | None,
        seed: int,
        progress: bool | None,
    ) -> None:
        self.model, self.work, self.evaluate = model, work, evaluate
        self.seed, self.progress = seed, progress
        self.stages: list[Stage] = []
        self.done: dict[str, Any] = {}
        self.identity: dict[str, Any] = {}
        self.calibration: list[Any] | None = None
        self.inputs: Any = None
        self.how: dict[str, Any] = {}
        self.dense_metric: float | None = None

    def calibrate(
        self, given: Any, train: Any, samples: int, inputs: Any, *, labelled: bool
    ) -> None:
        """Hold the calibration inputs, so that every stage sees the same.

        Args:
            given: By the user; None takes them from `train`.
            train: See `rankopt.finetune`.
            samples: How many of them.
            inputs: The example inputs; None takes the first batch.
            labelled: Whether batches of `train` end in labels.
        """
        source = train if given is None else given
        if source is not None:
            own = [one for found in random_sources(source) for one in found]
            with measure.preserve_rng(), kept_states(own):
                seed_all(self.seed)
                for generator in own:
                    seed_source(generator, self.seed)
                self.calibration = hold(
                    self.model, source, max_samples=samples, labelled=labelled and given is None
                )
        self.inputs = inputs
        if inputs is None and self.calibration:
            self.inputs = self.calibration[0]

    def begin(self, budgets: list[Any], stages: Mapping[str, Any], train: Any) -> None:
        """Read what an earlier call with the same arguments has done; score the dense model.

        Raises:
            CheckpointError: The folder was made with others.
            EvaluationError: `evaluate` gives no number.
        """
        needed = {"recover": bool(self.calibration), "finetune": train is not None}
        self.how = {
            name: how if callable(how) or needed.get(name, True) else False
            for name, how in stages.items()
        }
        self._read(
            {
                "model": measure.weights_digest(surgery.unwrap(self.model)),
                "budgets": json.loads(strict_json(budgets)),
                "settings": json.loads(strict_json(self.how, default=spelled)),
                "seed": self.seed,
                "calibration": None if self.calibration is None else digest(self.calibration),
                "example_inputs": spelled(self.inputs),
                "evaluate": None if self.evaluate is None else spelled(self.evaluate),
                "train": None if train is None else fingerprint(train),
            }
        )
        self.dense_metric = self._metric(surgery.unwrap(self.model))

    def _read(self, identity: dict[str, Any]) -> None:
        self.identity = identity
        path = self.work / WORK
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            made, done = found["identity"], found["stages"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        begun = _begun(done, list(self.how))
        for key, value in self.identity.items():
            before = made.get(key, value)
            if key == "settings":  # those of stages that are yet to come may change
                before, value = ({n: each.get(n) for n in begun} for each in (before, value))
            if key == "train" and "finetune" not in begun:
                continue
            if before != value:
                raise CheckpointError(
                    f"{path} was made with {key} {before}, this call has {value}; use the "
                    "same to go on with it, or another folder="
                )
        self.done = done

    def rounds(self, budgets: list[Budget | None], train: Any) -> tuple[nn.Module, RankPlan]:
        """All rounds; the last one's model and plan."""
        source, small, plan = self.model, None, None
        for number, budget in enumerate(budgets, start=1):
            tag = f" {number}" if len(budgets) > 1 else ""
            if small is not None:
                source = fold(small, self.model)
            plan = self._searched(tag, source, budget, self.how["search"])
            if number < len(budgets):
                check_foldable(plan, self.model)
            small = self._applied(tag, source, plan, self.how["apply"])
            if number == len(budgets):  # before it is trained for hours
                self._check_counts(plan.budget if budget is None else budget, small)
            if (how := self.how["recover"]) is not False:
                small = self._changed(tag, "recover", small, self._recoverer(how))
            if (how := self.how["finetune"]) is not False:
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
        comparison = compare(original, reloaded, example_inputs=self.inputs, seed=self.seed)
        check_budget(plan.budget if budget is None else budget, vars(comparison))
        metric = self._metric(reloaded)
        if self.dense_metric is not None and metric is not None:
            comparison = replace(comparison, metric=Figure(self.dense_metric, metric))
        files.save(small, path)
        note = "read back: outputs identical" if identical else "read back"
        seconds = time.perf_counter() - started
        self.stages.append(Stage("verify", seconds, int(comparison.params.after), metric, note))
        return comparison

    def _check_counts(self, budget: Budget | None, small: nn.Module) -> None:
        """Hold what was applied to the budget; recovering and fine-tuning change no counts."""
        models = [surgery.unwrap(self.model), surgery.unwrap(small)]
        figures = {
            "params": Figure(*map(measure.count_params, models)),
            "memory": Figure(*map(measure.count_memory, models)),
        }
        if budget is not None and "macs" in budget.axes and self.inputs is not None:
            inputs = measure.to_device(self.inputs, surgery.device_of(models[0]))
            with measure.preserve_rng():
                figures["macs"] = Figure(*(macs_of(each, inputs) for each in models))
        check_budget(budget, figures)

    def _gives_the_same(self, small: nn.Module, reloaded: nn.Module) -> bool:
        """Whether outputs were found identical; False where they hold no tensor to compare."""
        outputs = []
        with torch.no_grad(), measure.preserve_rng(), measure.evaluation(small):
            for each in (small, reloaded):
                torch.manual_seed(self.seed)  # a model may draw numbers in eval mode too
                inputs = measure.to_device(self.inputs, surgery.device_of(small))
                outputs.append(measure.copied(list(tensors_in(measure.call(each, inputs)))))
        one, other = outputs
        if len(one) != len(other) or not all(map(_same, one, other)):
            raise RankoptError("the model read back from its file gives other outputs; report this")
        return bool(one)

    def _metric(self, model: nn.Module) -> float | None:
        if self.evaluate is None:
            return None
        with torch.no_grad(), measure.preserve_rng(), measure.evaluation(model):
            # Between two stages a model may be as bad as it likes.
            return metric_of(self.evaluate, model, finite=False)

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
                budget, strategies.create(settings.get("strategy", DEFAULT_STRATEGY))
            ):
                settings.setdefault("evaluate", self.evaluate)
            return search(source, budget, **settings)

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
                if plan_of(small) is None:  # lost in a copy, say
                    remember_plan(surgery.unwrap(small), plan)
                return small, ""
            settings = {
                "calibration": self.calibration,
                "calibration_samples": None,
                "progress": self.progress,
                **(how or {}),
            }
            return apply(source, plan, **settings), ""

        return self._stage(f"apply{tag}", make)

    def _changed(
        self, tag: str, name: str, small: nn.Module, change: Callable[[nn.Module], Any]
    ) -> nn.Module:
        def make() -> tuple[nn.Module, str]:
            done = change(small)
            if isinstance(done, nn.Module) and surgery.unwrap(done) is not surgery.unwrap(small):
                raise ModelError(
                    f"{name} returned another model than it was given; a function in its place "
                    "changes that one and returns what to note, or None"
                )
            return small, "" if isinstance(done, nn.Module) else str(done or "")

        return self._stage(f"{name}{tag}", make)

    def _recoverer(self, how: Any) -> Callable[[nn.Module], Any]:
        if callable(how):
            return lambda small: how(small, self.model)
        settings = {
            "teacher": self.model,
            "calibration": self.calibration,
            "calibration_samples": None,
            "seconds": None if "steps" in (how or {}) else RECOVER_SECONDS,
            "seed": self.seed,
            "progress": self.progress,
            **(how or {}),
        }

        def repair(small: nn.Module) -> Any:
            try:
                return recover(small, **settings)
            except (CalibrationError, ModelError) as error:
                if how is not None:
                    raise
                return f"left out: {error}"  # nobody asked for it

        return repair

    def _tuner(self, how: Any, train: Any, name: str) -> Callable[[nn.Module], Any]:
        if callable(how):
            return lambda small: how(small, self.model, self.work / name)
        settings = {
            "teacher": self.model,
            **TUNING,
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
            metric, params = self._metric(small), measure.count_params(small)
            self._finished(Stage(key, seconds, params, metric, note))
        self.stages.append(Stage(**self.done[key]))
        return small

    def _finished(self, stage: Stage) -> None:
        self.done[stage.name] = vars(stage)
        text = strict_json({"identity": self.identity, "stages": self.done}, indent=1)
        write_text(self.work / WORK, text + "\n")


def _begun(done: Iterable[str], order: list[str]) -> list[str]:
    """The stages up to the last that was done: of those to come, settings may change."""
    reached = [(int(number or 1), name) for name, _, number in (key.partition(" ") for key in done)]
    if any(number > 1 for number, _ in reached):
        return order
    return order[: max((order.index(name) + 1 for _, name in reached), default=0)]


def _planned(plan: RankPlan) -> str:
    return f"{len(plan.changes)} of {len(plan.decisions)} sites decomposed"


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal; NaN is, where a model means it."""
    if torch.equal(a, b):
        return True
    if a.shape != b.shape or not (a.is_floating_point() and b.is_floating_point()):
        return False
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)

"""One trial: parameters to options, evaluated batch by batch, answered, stopped or recorded."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from rankopt._model.metric import mean
from rankopt._study.racing import Rival, Values, hopeless
from rankopt._study.reading import record_of
from rankopt._study.records import ATTRIBUTE, key_of, options_of, rows_of
from rankopt._study.space import Space
from rankopt._study.storage import worker_name
from rankopt._timing.latency import Measured
from rankopt.budget import Budget
from rankopt.errors import CalibrationError, EvaluationError
from rankopt.strategy import Option, Problem

if TYPE_CHECKING:
    import optuna

__all__ = ["RECORDED", "Runner"]

# What becomes a failed trial of the study: `evaluate`, or the candidate on the calibration inputs.
RECORDED: Final = (EvaluationError, CalibrationError)

# The best finished trials that cost no more; comparing with all would stop more by chance.
RIVALS: Final = 3


class Runner:
    """Runs trials of one study in this process.

    Args:
        problem: With `evaluate`; its budget is the study's.
        space: The study's search space.
        direction: ``maximize`` or ``minimize`` the metric.
        batches: How many batches `evaluate` goes through; None if unknown.
        confidence: Of every look at a trial that may be stopped early; None never stops.
        measure: Times the whole model of a trial's rows; None where time is not asked for.
    """

    def __init__(
        self,
        problem: Problem,
        space: Space,
        *,
        direction: str,
        batches: int | None = None,
        confidence: float | None = 0.99,
        measure: Callable[[Any], Measured] | None = None,
    ) -> None:
        self.problem, self.space, self.worker = problem, space, worker_name()
        self.maximise = direction == "maximize"
        self.batches, self.confidence, self.measure = batches, confidence, measure

    def run(self, study: optuna.Study, trial: optuna.Trial) -> tuple[float, float]:
        """The trial's (metric, figure).

        Raises:
            optuna.TrialPruned: Stopped early, or over the budget.
            EvaluationError: From the user's `evaluate`; recorded.
        """
        import optuna

        started = time.perf_counter()
        options = self._propose(trial)
        rows = rows_of(options)
        figures = self.problem.figures(options)
        record: dict[str, Any] = {"key": key_of(rows), "rows": rows, "figures": figures}
        warm = trial.user_attrs.get("warm")
        if warm is not None:
            record["warm"] = warm
        figure = float(figures[self.space.axis])
        values: list[tuple[float, float]] = []
        evaluating = 0.0
        try:
            over = self._excess(trial, figures)
            if over and warm is None:
                record["stopped"] = over
                raise optuna.TrialPruned(over)
            known = self._same(study, record["key"])
            if known is not None:
                return self._answer(known, record)
            rivals = self._rivals(study, figure)
            drop, dense = self._allowed_drop(study)
            options = self.problem.settled(options)
            record["rows"] = rows_of(options)
            decisions = self.problem.decisions(options)
            assert self.problem.evaluate is not None
            begun = time.perf_counter()
            try:
                with contextlib.closing(self.problem.evaluate(decisions)) as stream:  # type: ignore[type-var]
                    for value in stream:
                        values.append(value)
                        if self.confidence is None or warm is not None:
                            continue
                        record_why = hopeless(
                            values, rivals, maximise=self.maximise, drop=drop, dense=dense,
                            total=self.batches, confidence=self.confidence,
                        )  # fmt: skip
                        if record_why:
                            record["stopped"] = record_why
                            raise optuna.TrialPruned(record_why)
            finally:
                evaluating = time.perf_counter() - begun
            return mean(values), figure
        except RECORDED as error:
            record["error"] = str(error)
            raise
        finally:
            if values:
                record["batches"] = [list(value) for value in values]
            elapsed = time.perf_counter() - started
            record["seconds"] = {
                "trial": round(elapsed, 4), "evaluating": round(evaluating, 4),
            }  # fmt: skip
            trial.set_user_attr(ATTRIBUTE, record)

    def _propose(self, trial: optuna.Trial) -> list[Option]:
        """The options of a queued plan, or those of the parameters the sampler suggests."""
        params = {
            name: trial.suggest_float(name, low, high)
            for name, (low, high) in self.space.bounds.items()
        }
        rows = trial.user_attrs.get("plan")
        if rows is not None:
            return options_of(self.problem, rows, "chosen before the study")
        return self.space.options(params)

    def _excess(self, trial: optuna.Trial, figures: Any) -> str | None:
        """Tell the sampler how far each share of the budget is exceeded; in words."""
        over = []
        for axis, share in self.space.shares.items():
            used = figures[axis] / self.problem.totals[axis]
            trial.set_constraint(axis, used - share)
            if figures[axis] > share * self.problem.totals[axis]:
                over.append(f"{axis} {used:.1%} of at most {share:.1%}")
        return f"over the budget: {', '.join(over)}" if over else None

    def _same(self, study: optuna.Study, key: str) -> optuna.trial.FrozenTrial | None:
        """A finished trial of the same configuration."""
        from optuna.trial import TrialState

        states = (TrialState.COMPLETE, TrialState.PRUNED)
        for trial in study.get_trials(deepcopy=False, states=states):
            if trial.user_attrs.get(ATTRIBUTE, {}).get("key") == key:
                return trial
        return None

    @staticmethod
    def _answer(known: optuna.trial.FrozenTrial, record: dict[str, Any]) -> tuple[float, float]:
        import optuna

        record["duplicate"] = {"of": known.number}
        if known.values is None:
            why = f"trial {known.number} of the same configuration was stopped"
            record["stopped"] = why
            raise optuna.TrialPruned(why)
        return known.values[0], known.values[1]

    def _rivals(self, study: optuna.Study, figure: float) -> Sequence[Rival]:
        """Finished trials that cost no more, the best first."""
        from optuna.trial import TrialState

        found = [
            trial
            for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            if trial.values[1] <= figure and trial.user_attrs.get(ATTRIBUTE, {}).get("batches")
        ]
        found.sort(key=lambda trial: trial.values[0], reverse=self.maximise)
        return [Rival(trial.number, _batches_of(trial)) for trial in found[:RIVALS]]

    def _allowed_drop(self, study: optuna.Study) -> tuple[float | None, Values]:
        """What a budget on ``metric_drop`` admits, and the dense model's batches, if known."""
        from optuna.trial import TrialState

        budget: Budget | None = self.problem.budget
        if budget is None or budget.metric_drop is None:
            return None, ()
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if trial.user_attrs.get("warm") == "dense":
                return budget.metric_drop, _batches_of(trial)
        return None, ()


def _batches_of(trial: optuna.trial.FrozenTrial) -> Values:
    """(value, weight) of every batch a finished trial was evaluated on."""
    return [(value, weight) for value, weight in record_of(trial).get("batches", ())]

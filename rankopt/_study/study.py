"""Study: trials on the real metric, their Pareto front, and the best plan within a budget."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rankopt._metric_drop import lost
from rankopt._progress import progress_bar
from rankopt._study.records import ATTRIBUTE, Point, read_request, to_plan
from rankopt._study.storage import (
    Leases,
    close_storage,
    open_storage,
    retry,
    shown,
    storage_errors,
)
from rankopt.budget import RATIO_AXES, Budget
from rankopt.errors import BudgetInfeasible, DeadlineExceeded, EvaluationError, StudyError
from rankopt.plan import RankPlan

if TYPE_CHECKING:
    import optuna

    from rankopt._study.trial import Runner

__all__ = ["DEFAULT_NAME", "Study", "quiet"]

DEFAULT_NAME: Final = "rankopt"
# How often a worker that has nothing left to start looks at those that still run.
POLL_SECONDS: Final = 0.5


class Study:
    """Trials of one model, in a storage that several processes may share.

    Made by `rankopt.study` (which can run trials), or read with `Study.load`.

    Attributes:
        optuna: The Optuna study, for its visualisations and the dashboard.
        where: The storage, in words.
    """

    def __init__(
        self,
        study: optuna.Study,
        *,
        where: str,
        heartbeat: int,
        runner: Runner | None = None,
        finish: Callable[[RankPlan], RankPlan] | None = None,
    ) -> None:
        self.optuna, self.where = study, where
        self._runner, self._finish = runner, finish
        self._leases = Leases(study, heartbeat)

    @classmethod
    def load(cls, storage: Any, *, name: str | None = None) -> Study:
        """Open a study to read it; no model is needed.

        Args:
            storage: As of `rankopt.study`.
            name: The study's name; may be left out where the storage holds a single one.

        Raises:
            StudyError: The storage fails, or holds no such study.
        """
        where = shown(storage)
        return cls(load_optuna(open_storage(storage), name, where=where), where=where, heartbeat=1)

    def close(self) -> None:
        """Give back database connections; also at the end of a ``with`` block."""
        close_storage(self.optuna._storage)

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def request(self) -> Mapping[str, Any]:
        """What the study was made for."""
        with storage_errors(self.where):
            return read_request(self.optuna.user_attrs, self.optuna.study_name)

    @property
    def objective(self) -> str:
        """The figure made small, such as ``macs``."""
        return str(self.request["objective"])

    @property
    def maximise(self) -> bool:
        """Whether a higher metric is better."""
        return bool(self.request["direction"] == "maximize")

    # Running

    def run(
        self,
        n_trials: int | None = None,
        *,
        timeout: float | None = None,
        progress: bool | None = None,
    ) -> Study:
        """Run trials until the study has `n_trials` of them, whoever ran them.

        So the same call after a crash goes on where the study stood, and several workers
        share one number; they may exceed it by one trial each less one. Trials that
        finished, were stopped early or failed with an error count; those of workers that
        died or were interrupted are run again and count once.

        Args:
            n_trials: Trials the study shall have in all.
            timeout: Seconds after which no trial is begun.
            progress: Whether to show a progress bar; None decides by the terminal.

        Returns:
            The study itself.

        Raises:
            StudyError: It was opened to be read, or the storage fails.
            KeyboardInterrupt: Ctrl-C; the trial at hand is queued again.
        """
        if self._runner is None:
            raise StudyError("this study was opened to be read; open it with rankopt.study(...)")
        if n_trials is None and timeout is None:
            raise StudyError("run(n_trials=…) or run(timeout=…): give at least one of them")
        if n_trials is not None and (isinstance(n_trials, bool) or n_trials < 1):
            raise StudyError(f"n_trials={n_trials!r}: expected at least 1")
        end = None if timeout is None else time.monotonic() + timeout
        label = f"study {self.optuna.study_name}"
        with (
            storage_errors(self.where),
            quiet(),
            progress_bar(label, n_trials, enabled=progress) as advance,
        ):
            done = 0
            while end is None or time.monotonic() < end:
                self._leases.reap()
                finished, running = self._counts()
                for _ in range(finished - done):
                    advance(self._summary())
                done = finished
                if n_trials is not None and finished + running >= n_trials:
                    if not running:
                        break
                    time.sleep(POLL_SECONDS)
                    continue
                self._run_one()
            finished, _ = self._counts()
            for _ in range(finished - done):
                advance(self._summary())
        return self

    def _run_one(self) -> None:
        """Ask for a trial, run it, tell the storage."""
        import optuna

        assert self._runner is not None
        claimed: list[int] = []

        def objective(trial: optuna.Trial) -> tuple[float, float]:
            assert self._runner is not None
            claimed.append(trial.number)
            with self._leases.held(trial, self._runner.worker):
                return self._runner.run(self.optuna, trial)

        try:
            self.optuna.optimize(objective, n_trials=1, catch=(EvaluationError,))
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            # Taken for dead, and given to another worker, while it was only slow.
            if not claimed or not self.optuna.trials[claimed[0]].state.is_finished():
                raise
        except (KeyboardInterrupt, DeadlineExceeded):
            if claimed:
                retry(self.optuna, self.optuna.trials[claimed[0]])
            raise

    def _counts(self) -> tuple[int, int]:
        """Trials that count as done, and trials that run."""
        from optuna.trial import TrialState

        trials = self.optuna.get_trials(deepcopy=False)
        running = sum(trial.state == TrialState.RUNNING for trial in trials)
        return sum(counts(trial) for trial in trials), running

    def _summary(self) -> str:
        points = self._points()
        if not points:
            return "no result yet"
        budget = self._own_budget
        fitting = [p for p in points if budget is None or budget.fits(p.figures, self._dense)]
        best = self._best_of(fitting) if fitting else None
        return f"front {len(self._pareto(points))}" + (
            "" if best is None else f", best {best.metric:.5g} at {self._share(best):.0%}"
        )

    # Reading

    @property
    def _dense(self) -> Mapping[str, float]:
        totals = self.request["plan"]["totals"]
        return {axis: float(entry["before"]) for axis, entry in totals.items()}

    @property
    def _own_budget(self) -> Budget | None:
        budget = self.request["budget"]
        return None if budget is None else Budget.from_dict(budget)

    def _share(self, point: Point) -> float:
        return point.figures[self.objective] / self._dense[self.objective]

    def _points(self) -> list[Point]:
        """Every completed trial, without its plan built."""
        from optuna.trial import TrialState

        with storage_errors(self.where):
            trials = self.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        found = []
        for trial in trials:
            record = trial.user_attrs.get(ATTRIBUTE)
            if record is not None and trial.values is not None:
                found.append(
                    _LazyPoint(trial.number, trial.values[0], record["figures"], record, self)
                )
        return found  # type: ignore[return-value]

    @property
    def points(self) -> tuple[Point, ...]:
        """Every completed trial, in order."""
        return tuple(point.full() for point in self._points())  # type: ignore[attr-defined]

    @property
    def front(self) -> tuple[Point, ...]:
        """Every Pareto point, smallest first: no other is both smaller and better.

        Raises:
            StudyError: No trial has completed; says what the last one failed with.
        """
        points = self._points()
        if not points:
            raise self._nothing_yet()
        return tuple(point.full() for point in self._pareto(points))  # type: ignore[attr-defined]

    def _pareto(self, points: list[Point]) -> list[Point]:
        sign = -1 if self.maximise else 1
        ordered = sorted(points, key=lambda p: (p.figures[self.objective], sign * p.metric))
        front: list[Point] = []
        for point in ordered:
            if not front or sign * point.metric < sign * front[-1].metric:
                front.append(point)
        return front

    def _best_of(self, points: list[Point]) -> Point:
        sign = -1 if self.maximise else 1
        return min(points, key=lambda p: (sign * p.metric, p.figures[self.objective]))

    @property
    def dense_metric(self) -> float | None:
        """The metric of the model as it is; None until that trial has run."""
        dense = [p for p in self._points() if self._share(p) == 1 and p.warm == "dense"]
        return dense[0].metric if dense else None

    def best(self, budget: str | Budget | None = None) -> RankPlan:
        """The plan with the best metric within a budget.

        With ``metric_drop`` it is the smallest plan whose metric is close enough to the
        dense model's. The metric is the one its trial measured: the best of many is
        flattered by chance, so report it on data the study has not seen.

        Args:
            budget: As of `rankopt.search`; None takes the study's own.

        Raises:
            BudgetInfeasible: No completed trial meets it; says the smallest figures seen.
            StudyError: No trial has completed.
        """
        wanted = Budget.parse(budget) if budget is not None else self._own_budget
        points = self._points()
        if not points:
            raise self._nothing_yet()
        unknown = [a for a in (wanted.axes if wanted else ()) if a not in self._dense]
        unknown = [axis for axis in unknown if axis != "metric_drop"]
        if unknown:
            raise StudyError(
                f"the study knows {', '.join(self._dense)} of its plans, not {', '.join(unknown)}"
            )
        fitting = [p for p in points if wanted is None or wanted.fits(p.figures, self._dense)]
        if wanted is not None and wanted.metric_drop is not None:
            chosen = self._within_drop(fitting, wanted)
        else:
            chosen = self._best_of(fitting) if fitting else None
        if chosen is None:
            assert wanted is not None
            axes = [axis for axis in wanted.axes if axis in RATIO_AXES]
            least = {a: min(p.figures[a] for p in points) / self._dense[a] for a in axes}
            seen = ", ".join(f"{axis} {share:.1%}" for axis, share in least.items()) or "–"
            raise BudgetInfeasible(
                f"{wanted.explain()}: none of {len(points)} trials meets it (smallest: {seen}); "
                "run more trials, or loosen the budget",
                least,
            )
        plan = replace(chosen.full().plan, budget=wanted)  # type: ignore[attr-defined]
        return plan if self._finish is None else self._finish(plan)

    def _within_drop(self, points: list[Point], budget: Budget) -> Point | None:
        dense = self.dense_metric
        if dense is None:
            raise StudyError("metric_drop needs the dense model's metric, whose trial has not run")
        axis = budget.minimize or self.objective
        if axis not in self._dense:
            raise StudyError(f"minimize={axis}: the study knows {', '.join(self._dense)}")
        drop = budget.metric_drop or 0.0
        kept = [p for p in points if lost(budget, dense, p.metric) <= drop]
        return min(kept, key=lambda p: p.figures[axis], default=None)

    def _nothing_yet(self) -> StudyError:
        failed = [
            record["error"]
            for trial in self.optuna.get_trials(deepcopy=False)
            if (record := trial.user_attrs.get(ATTRIBUTE)) and record.get("error")
        ]
        last = f"; {len(failed)} failed, the last with: {failed[-1]}" if failed else "; run some"
        return StudyError(f"study {self.optuna.study_name!r} has no completed trial{last}")

    def figures(self) -> dict[str, Any]:
        """Plotly figures ``pareto``, ``history`` and ``importances``; needs rankopt[report]."""
        from rankopt._study.views import figures

        return figures(self)

    def export(self, folder: str | os.PathLike[str], *, figures: bool = False) -> tuple[Path, ...]:
        """Write every Pareto plan as a file, and the status; see `rankopt study export`."""
        from rankopt._study.views import export

        return export(self, folder, figures=figures)

    def status(self) -> dict[str, Any]:
        """Counts and the state of things, as plain data."""
        with storage_errors(self.where):
            trials = self.optuna.get_trials(deepcopy=False)
        states: dict[str, int] = {}
        for trial in trials:
            lost_one = trial.state.name == "FAIL" and not counts(trial)
            name = "lost" if lost_one else trial.state.name.lower()
            states[name] = states.get(name, 0) + 1
        points = self._points()
        errors = sorted({str(e) for t in trials if (e := _record(t).get("error"))})
        return {
            "study": self.optuna.study_name,
            "objective": self.objective,
            "direction": self.request["direction"],
            "space": self.request["space"]["kind"],
            "rankopt": self.request["version"],
            "counted": sum(counts(trial) for trial in trials),
            "trials": states,
            "workers": sorted({t.user_attrs["worker"] for t in trials if "worker" in t.user_attrs}),
            "dense_metric": self.dense_metric,
            "duplicates": sum("duplicate" in _record(trial) for trial in trials),
            "errors": errors,
            "front": [
                {"trial": p.trial, "metric": p.metric, "share": self._share(p), "warm": p.warm}
                for p in self._pareto(points)
            ],
        }


class _LazyPoint:
    """A point whose plan is read only when it is asked for."""

    def __init__(
        self, trial: int, metric: float, figures: Mapping[str, int], record: Any, study: Study
    ) -> None:
        self.trial, self.metric, self.figures = trial, metric, figures
        self.warm = record.get("warm")
        self._record, self._study = record, study

    def full(self) -> Point:
        plan = to_plan(self._study.request, self._record, self.trial, self.metric)
        return Point(self.trial, self.metric, dict(self.figures), plan, self.warm)


def _record(trial: optuna.trial.FrozenTrial) -> Mapping[str, Any]:
    found = trial.user_attrs.get(ATTRIBUTE, {})
    return found if isinstance(found, dict) else {}


def counts(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a trial counts: done, stopped early, or failed with an error of its own."""
    state = trial.state.name
    return state in ("COMPLETE", "PRUNED") or (state == "FAIL" and "error" in _record(trial))


def load_optuna(opened: Any, name: str | None, *, where: str) -> optuna.Study:
    """An existing Optuna study; `StudyError` where there is none."""
    import optuna

    with storage_errors(where):
        names = optuna.get_all_study_names(opened)
        if name is None and len(names) == 1:
            name = names[0]
        if name not in names:
            have = f"it has {', '.join(sorted(names)[:5])}" if names else "it has none"
            asked = "none was named" if name is None else f"there is no study {name!r}"
            raise StudyError(f"storage {where}: {asked}; {have}")
        with quiet():
            return optuna.load_study(study_name=name, storage=opened)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Optuna's own messages off: rankopt says what there is to say."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)

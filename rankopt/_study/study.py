"""Study: trials on the real metric, their Pareto front, and the best plan within a budget."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from rankopt._study.devices import timing_lock
from rankopt._study.front import Front, timed
from rankopt._study.front_times import time_front
from rankopt._study.reading import counts, load_optuna, nothing_yet, quiet, record_of
from rankopt._study.records import Point, read_request
from rankopt._study.storage import (
    LOST,
    Leases,
    close_storage,
    open_storage,
    retry,
    shown,
    storage_errors,
)
from rankopt._study.trial import RECORDED
from rankopt._timing.noise import warn_of_noise
from rankopt._utils.progress import progress_bar
from rankopt.budget import Budget
from rankopt.errors import DeadlineExceeded, StudyError, warn
from rankopt.plan import RankPlan
from rankopt.strategy import check_timeout

if TYPE_CHECKING:
    import optuna

    from rankopt._study.trial import Runner

__all__ = ["Study"]

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
        opened = open_storage(storage, create=False)
        return cls(load_optuna(opened, name, where=where), where=where, heartbeat=1)

    def close(self) -> None:
        """Give back database connections; also at the end of a ``with`` block."""
        close_storage(self.optuna._storage)

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        name = f"{self.optuna.study_name!r}, {self.where}"
        try:
            counted, _, _ = self._counts()
            return f"<Study {name}: {counted} trials, {self._summary()}>"
        except Exception as error:  # a storage that does not answer is still a study
            return f"<Study {name}: cannot be read ({type(error).__name__})>"

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
        share one number; they may exceed it by one trial each less one, and by as many again
        for each trial that a dead worker left. Trials that finished, were stopped early or
        failed with an error count; those of workers that died or were interrupted are run
        again and count once. A study of latency times the models of its front at the end,
        see `measure`.

        Args:
            n_trials: Trials the study shall have in all.
            timeout: Seconds after which no trial is begun.
            progress: Whether to show a progress bar; None decides by the terminal.

        Returns:
            The study itself.

        Warns:
            RankoptWarning: Not one trial came to a result.

        Raises:
            StudyError: It was opened to be read, `n_trials` is no integer of at least 1, or the
                storage fails.
            ValueError: `timeout` is no number of seconds.
            KeyboardInterrupt: Ctrl-C; the trial at hand is queued again.
        """
        if self._runner is None:
            raise StudyError("this study was opened to be read; open it with rankopt.study(...)")
        if n_trials is None and timeout is None:
            raise StudyError("run(n_trials=…) or run(timeout=…): give at least one of them")
        if n_trials is not None and (type(n_trials) is not int or n_trials < 1):
            raise StudyError(f"n_trials={n_trials!r}: expected an integer of at least 1")
        check_timeout(timeout)
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
                finished, running, given_up = self._counts()
                for _ in range(finished - done):
                    advance(self._summary())
                done = finished
                enough = n_trials is not None and finished + running >= n_trials
                if enough and not given_up:
                    if not running:
                        break
                    time.sleep(POLL_SECONDS)
                    continue
                self._run_one()
            finished, *_ = self._counts()
            for _ in range(finished - done):
                advance(self._summary())
        self._warn_of_failure()
        if self._times_models:
            self.measure(progress=progress)
        return self

    def _warn_of_failure(self) -> None:
        """Say so where not one trial came to a result."""
        with storage_errors(self.where):
            trials = [trial for trial in self.optuna.get_trials(deepcopy=False) if counts(trial)]
        failed = [error for trial in trials if (error := record_of(trial).get("error"))]
        if failed and len(failed) == len(trials):
            warn(
                f"{len(failed)} of {len(trials)} trials failed, the last with: {failed[-1]}; put "
                "it right and run more trials"
            )

    @property
    def _times_models(self) -> bool:
        return self._runner is not None and self._runner.measure is not None

    def measure(self, *, progress: bool | None = None) -> Study:
        """Time the whole models of the front against the dense one, where that was not done.

        `run` does so at its end. Trials predict a time from layers alone; from here on the
        study knows only the models that were timed, by the measured times. What varied too
        much to decide by is timed again. One process of a machine measures at a time.

        Args:
            progress: Whether to show a progress bar; None decides by the terminal.

        Warns:
            RankoptWarning: Times vary too much to decide by.

        Raises:
            StudyError: It knows no times, was opened to be read, or the storage fails.
        """
        if not self._times_models:
            raise StudyError(
                "nothing to time: open the study with rankopt.study(…, objective='latency') or "
                "with a budget on latency"
            )
        self._time_front(renew=True, progress=progress)
        return self

    def _time_front(self, *, renew: bool, progress: bool | None = None) -> None:
        """Time models of the front; `renew` also those whose time varied too much."""
        assert self._runner is not None
        assert self._runner.measure is not None
        with storage_errors(self.where), timing_lock(), quiet():
            front = self._front(predicted=True)
            found = time_front(
                self.optuna, front, self._runner.measure, renew=renew, progress=progress
            )
        noisy = sum(ratio.noisy for ratio in found)
        warn_of_noise(
            found,
            what=f"the times of {noisy} of the {len(found)} models timed now vary",
            again="call Study.measure or run again, which times these anew",
        )

    def _run_one(self) -> None:
        """Ask for a trial, run it, tell the storage."""
        import optuna

        assert self._runner is not None
        claimed: list[int] = []
        raised: list[BaseException] = []

        def objective(trial: optuna.Trial) -> tuple[float, float]:
            assert self._runner is not None
            claimed.append(trial.number)
            try:
                with self._leases.held(trial, self._runner.worker):
                    return self._runner.run(self.optuna, trial)
            except BaseException as error:
                raised.append(error)
                raise

        try:
            with torch.enable_grad():  # which samplers such as Gaussian processes need
                self.optuna.optimize(objective, n_trials=1, catch=RECORDED)
        except BaseException as error:
            given_away = isinstance(error, optuna.exceptions.UpdateFinishedTrialError) or (
                isinstance(error, ValueError) and error not in raised
            )
            if claimed and given_away and self.optuna.trials[claimed[0]].state.is_finished():
                return  # taken for dead, and given to another worker, while it was only slow
            if claimed:
                by_hand = isinstance(error, (KeyboardInterrupt, DeadlineExceeded))
                self._hand_back(claimed[0], interrupted=by_hand)
            raise

    def _hand_back(self, number: int, *, interrupted: bool) -> None:
        """Let a trial that did not end of itself be run again, unless that is seen to already."""
        trials = self.optuna.get_trials(deepcopy=False)
        trial = trials[number]
        if trial.state.name == "RUNNING":
            self._leases.give_up(trial, interrupted=interrupted)
            return
        queued = any(number in other.user_attrs.get(LOST, ()) for other in trials)
        if trial.state.name == "FAIL" and not counts(trial) and not queued:
            retry(self.optuna, trial, interrupted=interrupted)

    def _counts(self) -> tuple[int, int, int]:
        """Trials that count as done, that run, and that wait next after a worker lost them.

        The last are run even where other workers have made up the number meanwhile: they
        may be a plan that the study was to begin with.
        """
        from optuna.trial import TrialState

        trials = self.optuna.get_trials(deepcopy=False)
        running = sum(trial.state == TrialState.RUNNING for trial in trials)
        waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
        given_up = sum(itertools.takewhile(bool, (LOST in trial.user_attrs for trial in waiting)))
        return sum(counts(trial) for trial in trials), running, given_up

    def _summary(self) -> str:
        front = self._front()
        if not front.points:
            return "no result yet"
        fitting = front.fitting(self._own_budget)
        best = front.best_of(fitting) if fitting else None
        return f"front {len(front.pareto())}" + (
            "" if best is None else f", best {best.metric:.5g} at {front.share(best):.0%}"
        )

    # Reading

    @property
    def _own_budget(self) -> Budget | None:
        budget = self.request["budget"]
        return None if budget is None else Budget.from_dict(budget)

    def _front(self, *, predicted: bool = False) -> Front:
        """What there is now, without plans built; `predicted` leaves measured times out."""
        from optuna.trial import TrialState

        with storage_errors(self.where):
            trials = self.optuna.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            times = {} if predicted else timed(self.optuna)
        return Front(self.request, trials, times)

    @property
    def points(self) -> tuple[Point, ...]:
        """Every completed trial, in order; see `measure` for times."""
        return tuple(point.point(self.request) for point in self._front().every)

    @property
    def front(self) -> tuple[Point, ...]:
        """Every Pareto point, smallest first: no other is both smaller and better.

        Raises:
            StudyError: No trial has completed; says what the last one failed with.
        """
        front = self._front()
        if not front.points:
            raise nothing_yet(self.optuna)
        return tuple(point.point(self.request) for point in front.pareto())

    @property
    def dense_metric(self) -> float | None:
        """The metric of the model as it is; None until that trial has run."""
        return self._front().dense_metric

    def best(self, budget: str | Budget | None = None) -> RankPlan:
        """The plan with the best metric within a budget.

        With ``metric_drop`` it is the smallest plan whose metric is close enough to the
        dense model's. The metric is the one its trial measured: the best of many is
        flattered by chance, so report it on data the study has not seen. Its lead over the best
        of the plans the study began with is in ``plan.extensions["study"]["lead"]``, with the
        standard error over the batches. A time is within a budget if the upper end of its
        measured interval is.

        Args:
            budget: As of `rankopt.search`; None takes the study's own.

        Raises:
            BudgetInfeasible: No completed trial meets it; says the smallest figures seen.
            StudyError: No trial has completed.
        """
        wanted = Budget.parse(budget) if budget is not None else self._own_budget
        front = self._front()
        if not front.points:
            raise nothing_yet(self.optuna)
        if self._times_models:
            self._time_front(renew=False)
            front = self._front()
        chosen = front.best(wanted)
        plan = replace(chosen.plan(self.request), budget=wanted)
        if wanted is None or wanted.metric_drop is None:
            facts = {**plan.extensions["study"], "lead": front.lead(chosen, wanted)}
            plan = replace(plan, extensions={**plan.extensions, "study": facts})
        return plan if self._finish is None else self._finish(plan)

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
        from rankopt._study.views import status

        with storage_errors(self.where):
            trials = self.optuna.get_trials(deepcopy=False)
        return status(self.optuna.study_name, self.request, trials, self._front())

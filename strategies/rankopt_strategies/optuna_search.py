"""`optuna`: trials on the task's own metric, begun from what the other strategies know."""

from __future__ import annotations

import contextlib
import time
import warnings
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from rankopt._study import open_study
from rankopt._study.samplers import SAMPLERS
from rankopt._study.space import SPACES
from rankopt._utils.arguments import check_choice, check_integer, check_path, is_number
from rankopt.errors import DeadlineExceeded, RankoptWarning
from rankopt.plan import RankPlan
from rankopt.strategy import LATENCY, Problem, Strategy, Tags

__all__ = ["OptunaSearch"]


@dataclass(frozen=True)
class OptunaSearch(Strategy):
    """Search plans by trials on `evaluate`, with Optuna; the best within the budget.

    The plans of `knapsack` and others are the first trials, so that the answer is never
    worse than theirs on the data `evaluate` uses. For a front, several workers or a
    study that survives a crash use `rankopt.study`.

    Args:
        n_trials: Trials in all, the queued ones included.
        space: ``warp``, ``tilt``, ``stage`` or ``layer``; see `rankopt.study`.
        sampler: ``tpe``, ``local``, ``nsgaii``, ``nsgaiii``, ``gp``, ``random``, ….
        direction: Whether the metric is better when higher or lower; a budget on
            ``metric_drop`` that says ``direction=minimize`` need not be told again.
        confidence: Of stopping a trial early where `evaluate` yields batches.
        storage: Path or URL to keep the study in; None for memory.
        study: The study's name in the storage.
    """

    name: ClassVar[str] = "optuna"
    tags: ClassVar[Tags] = Tags(
        monotone=False,
        unbudgeted=False,
        metric_drop=True,
        latency=True,
        needs=frozenset({"evaluate"}),
    )
    n_trials: int = 60
    space: Literal["warp", "tilt", "stage", "layer"] = "warp"
    sampler: str = "tpe"
    direction: Literal["maximize", "minimize"] = "maximize"
    confidence: float = 0.99
    storage: str | None = None
    study: str = "rankopt"

    def __post_init__(self) -> None:
        check_integer("n_trials", self.n_trials, 1)
        check_choice("space", self.space, SPACES)
        check_choice("sampler", self.sampler, SAMPLERS)
        check_choice("direction", self.direction, ("maximize", "minimize"))
        check_path("storage", self.storage)
        if not isinstance(self.study, str) or not self.study:
            raise ValueError(f"study={self.study!r}: expected a name")
        if not is_number(self.confidence) or not 0.5 < self.confidence < 1:
            raise ValueError(f"confidence={self.confidence!r}: expected above 0.5 and below 1")

    def search(self, problem: Problem) -> RankPlan:
        """Run the study and take its best; see `Strategy.search`."""
        assert problem.budget is not None
        problem.check_deadline()
        first = problem.budget.minimize or problem.budget.axes[0]
        objective = LATENCY if first == "latency_ms" else first
        losses = problem.budget.metric_drop is not None and problem.budget.direction == "minimize"
        study = open_study(
            problem,
            storage=self.storage,
            where=self.storage or "memory",
            name=f"{self.study}, {problem.variant}" if problem.variant else self.study,
            objective=objective,
            direction="minimize" if losses else self.direction,
            space=self.space,
            asymmetric=problem.asymmetric is True,
            sampler=self.sampler,
            confidence=self.confidence,
            seed=problem.seed,
        )
        # A trial under way when the time runs out is given up; what finished counts.
        with contextlib.suppress(DeadlineExceeded), warnings.catch_warnings():
            # Where every trial failed, there is no best one, and that is an error.
            warnings.filterwarnings("ignore", r"\d+ of \d+ trials failed", RankoptWarning)
            end = problem.deadline
            left = None if end is None else max(0.0, end - time.monotonic())
            study.run(self.n_trials, timeout=left, progress=problem.progress)
        if not study.points:
            problem.check_deadline()
        return replace(study.best(problem.budget), strategy=self.describe(problem.seed))

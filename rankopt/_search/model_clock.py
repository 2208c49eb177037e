"""Times of whole models: a model's clock, and time as a cost of its layers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Final

from torch import nn

from rankopt._build.skeletons import build_random
from rankopt._model import measure, surgery
from rankopt._model.probe import Probe
from rankopt._timing.latency import Interval, Measured, Timings
from rankopt._timing.profile_table import ProfileTable
from rankopt.budget import Budget
from rankopt.errors import ModelError
from rankopt.plan import RankPlan
from rankopt.strategy import LATENCY, Option, Problem, decide
from rankopt.strategy.site_times import SiteTimes

__all__ = ["SLACK", "ModelClock", "adopt_times", "bounds_latency", "price_time"]

# A plan that meets a budget on time and leaves less of it than this unused is good enough.
SLACK: Final = 0.01
# More rounds are timed, this often at most, while an interval is wider than this share.
MAX_EXTENSIONS: Final = 5
WIDTH: Final = 0.03
# And this often, or this long, until it is decided whether a model meets a limit.
MAX_DECIDING: Final = 24
DECIDING_SECONDS: Final = 60.0
# Whether a model meets a limit is told by no fewer builds of it.
LEAST_BUILDS: Final = 3


class ModelClock:
    """Times plans of one model, built with random factors, against the dense model.

    Args:
        model: Not changed; a copy is timed.
        example_inputs: A tensor, a tuple or a mapping.
        table: Says in which mode, with how many rounds and by which clock.

    Attributes:
        check: Called between measurements; may raise to stop.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, table: ProfileTable) -> None:
        self.table = table
        self.check: Callable[[], None] = lambda: None
        self.device = surgery.device_of(model)
        self._inputs = measure.copied(measure.to_device(example_inputs, self.device))
        self._dense = self._ready(surgery.clone(model))

    def _ready(self, model: nn.Module) -> nn.Module:
        return model.train(self.table.mode == "training")

    @cached_property
    def dense_ms(self) -> float:
        """Median milliseconds of the dense model."""
        return self._timed({"dense": self._run_dense}).interval("dense").median

    @cached_property
    def _run_dense(self) -> Callable[[], Any]:
        return self.table.runner(self._dense, self._inputs)

    def measure(self, plan: RankPlan, limit: float | None = None) -> Measured:
        """Build the model of a plan and time it against the dense one.

        Args:
            plan: Of this model.
            limit: A share of the dense time: rounds are added until it is told whether the
                model keeps to it, and leaves little of it. None for an interval that is narrow.
        """
        runners = self._runners(plan)
        # Where in memory a model lies moves its time by several percent, for as long as it lives.
        builds = 1 if limit is None or self._keeps_builds else LEAST_BUILDS
        started = time.monotonic()
        timings = self._timed(runners)
        for done in range(1, 1 + (MAX_EXTENSIONS if limit is None else MAX_DECIDING)):
            late = limit is not None and time.monotonic() - started > DECIDING_SECONDS
            if late or (done >= builds and _told(timings.ratio("plan", "dense"), limit)):
                break
            self.check()
            if builds > 1:
                runners = self._runners(plan)
            timings += self._timed(runners)
        ratio = timings.ratio("plan", "dense")
        return Measured(ratio, timings.interval("plan"), timings.interval("dense"))

    @property
    def _keeps_builds(self) -> bool:
        """Whether a model is made ready once: it takes long, or its place is nothing to time."""
        return self.table.compile or self.table.cuda_graph or self.table.clock_name == "custom"

    def _runners(self, plan: RankPlan) -> dict[str, Callable[[], Any]]:
        built = self._ready(build_random(self._dense, plan))
        return {"dense": self._run_dense, "plan": self.table.runner(built, self._inputs)}

    def _timed(self, runners: dict[str, Callable[[], Any]]) -> Timings:
        try:
            return self.table.time_runners(runners, device=self.device)
        except RuntimeError as error:
            raise ModelError(
                f"{type(self._dense).__name__} cannot be timed for {self.table.mode}: {error}"
            ) from error


def _told(ratio: Interval, limit: float | None) -> bool:
    """Whether more rounds would change nothing that matters."""
    width = ratio.high - ratio.low
    narrow = width <= WIDTH * ratio.median
    if limit is None:
        return narrow
    used_up = (1 - SLACK) * limit
    if used_up <= ratio.median and ratio.high <= limit:
        return True
    # What surely misses the mark corrects the next target: by how much has to be known, too.
    margin = max(used_up - ratio.high, ratio.low - limit)
    return margin > (0.0 if narrow else width)


def price_time(
    problem: Problem,
    clock: ModelClock,
    seen: Probe,
    *,
    axis: bool | None = None,
    known: Mapping[str, Any] | None = None,
) -> None:
    """Give a problem its layer times and, where it is asked for, that cost axis.

    Args:
        problem: Changed.
        clock: Times whole models.
        seen: The layers' inputs.
        axis: Whether latency becomes a cost axis; None for under a budget on it.
        known: Times of layers and of the dense model, as `adopt_times` takes them; they
            are measured where it is None.
    """
    times = SiteTimes(
        clock.table,
        seen.calls,
        device=clock.device,
        step=problem.step,
        check=problem.check_deadline,
    )
    problem.times = times
    clock.check = problem.check_deadline

    def measured(options: Sequence[Option]) -> Measured:
        problem.check_deadline()
        pairs = zip(problem.sites, options, strict=True)
        decisions = tuple(decide(site, option) for site, option in pairs if not option.keeps)
        return clock.measure(RankPlan(model={}, decisions=decisions))

    problem.measure = measured
    if not (bounds_latency(problem.budget) if axis is None else axis):
        return
    if known is None:
        times.prepare(problem.sites, progress=problem.progress)
        _add_axis(problem, times, clock.dense_ms)
    else:
        adopt_times(problem, known)


def adopt_times(problem: Problem, known: Mapping[str, Any]) -> None:
    """Let a problem price time as another process does.

    Args:
        problem: With `times`; changed.
        known: What `SiteTimes.to_dict` gave there, and ``dense_ms`` of the whole model.
    """
    assert problem.times is not None
    problem.times.restore(known)
    _add_axis(problem, problem.times, float(known["dense_ms"]))


def _add_axis(problem: Problem, times: SiteTimes, dense_ms: float) -> None:
    problem.totals = {**problem.totals, LATENCY: dense_ms}
    problem.sites = tuple(
        replace(site, cost={**site.cost, LATENCY: times.dense_ms(site)}, times=times)
        for site in problem.sites
    )


def bounds_latency(budget: Budget | None) -> bool:
    """Whether `budget` is on time: as a share, in milliseconds, or to be made small."""
    if budget is None:
        return False
    named = (budget.latency, budget.latency_ms)
    return budget.minimize == LATENCY or any(value is not None for value in named)

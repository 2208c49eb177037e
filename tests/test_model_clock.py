"""The clock of whole models: when it is sure, and what it says of noise."""

from __future__ import annotations

import warnings
from collections import deque

import numpy as np
import torch
from timing import SHARED, searched

import rankopt
from rankopt._search.model_clock import ModelClock
from rankopt.errors import BudgetInfeasible
from rankopt.testing import ModelledClock, Operations, planted_inputs, planted_model


def test_rounds_are_timed_until_the_limit_is_decided():
    noise = np.random.default_rng(0)
    calls = []

    def clock(run):
        run()
        calls.append(1)
        return 1 + 0.05 * noise.standard_normal()

    timer = ModelClock(
        planted_model(), planted_inputs(), rankopt.ProfileTable(clock=clock, rounds=5)
    )
    plan = rankopt.search(planted_model(), "params<=60%")
    counts = {}
    for limit in (0.5, 1.5, 1.003):
        calls.clear()
        found = timer.measure(plan, limit).ratio
        counts[limit] = len(calls)
        assert (found.high <= limit) if limit == 1.5 else True
        assert (found.low > limit) if limit == 0.5 else True
    assert counts[1.003] > max(counts[0.5], counts[1.5])


def test_a_noisy_machine_is_named():
    noise = deque(np.random.default_rng(0).uniform(0.5, 1.5, 997))

    class Noisy(ModelledClock):
        """Layers take the same time each time, models do not."""

        def __call__(self, function):
            with Operations() as seen, torch.no_grad():
                function()
            noise.rotate(1)
            return super().__call__(function) * (noise[0] if len(seen.found) > 5 else 1)

    clock = rankopt.ProfileTable(clock=Noisy(), rounds=3)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            searched("latency<=90%", clock=clock)
            said = str(warned[0].message)
        except BudgetInfeasible as error:
            said = str(error)
    assert "varies too much" in said
    assert "busy, throttled" in said


def test_the_environment_says_what_times_depend_on():
    plan = searched("latency<=90%")
    assert plan.environment["memory_format"] == "contiguous"
    assert plan.environment["input"] == [2, 3, 12, 12]
    assert plan.environment["threads"] == torch.get_num_threads()


def test_models_are_made_ready_once(monkeypatch):
    """Under torch.compile or as a CUDA graph, making a model ready takes far longer than a run."""
    made = []
    runner = rankopt.ProfileTable.runner

    def counted(self, module, inputs):
        made.append(sum(p.numel() for p in module.parameters()))
        return runner(self, module, inputs)

    times = iter(np.random.default_rng(0).uniform(1, 2, 10**6))
    noisy = rankopt.ProfileTable(clock=lambda run: (run(), next(times))[1], rounds=3)
    model = planted_model()
    clock = ModelClock(model, planted_inputs(), noisy)
    monkeypatch.setattr(rankopt.ProfileTable, "runner", counted)
    plans = [rankopt.search(model, f"params<={share}%") for share in (40, 60)]
    assert clock.dense_ms > 0
    for plan in plans:  # so noisy that each is extended to the full
        clock.measure(plan)
    assert len(made) == 1 + len(plans)


def test_a_limit_is_told_by_several_builds(monkeypatch):
    """Where in memory a model lies moves its time for as long as it lives."""
    made = []
    runner = rankopt.ProfileTable.runner

    def counted(self, module, inputs):
        made.append(module)
        return runner(self, module, inputs)

    monkeypatch.setattr(rankopt.ProfileTable, "runner", counted)
    model, plan = planted_model(), rankopt.search(planted_model(), "params<=60%")
    for timer, builds in ((rankopt.ProfileTable(rounds=3), 3), (SHARED, 1)):
        made.clear()
        ModelClock(model, planted_inputs(), timer).measure(plan, limit=1e6)
        assert len(made) == 1 + builds

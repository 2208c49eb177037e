"""A planted model under latency budgets, timed by a modelled clock."""

from __future__ import annotations

import rankopt
from rankopt.testing import ModelledClock, planted_inputs, planted_model


def table(**settings):
    return rankopt.ProfileTable(clock=ModelledClock(**settings), rounds=3)


SHARED = table()  # layer times are the same for every test that does not change the clock


def searched(budget, strategy="knapsack", model=None, clock=None, **more):
    return rankopt.search(
        model or planted_model(),
        budget,
        strategy=strategy,
        example_inputs=planted_inputs(),
        profile=clock or SHARED,
        **more,
    )

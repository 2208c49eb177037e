"""The plan that tests of `relaxed` ask for."""

from __future__ import annotations

import rankopt
from rankopt.testing import planted_inputs, planted_model
from rankopt_strategies import Relaxed


def plan_for(budget, *, model=None, **arguments):
    strategy = arguments.pop("strategy", None) or Relaxed()
    return rankopt.search(
        planted_model(noise=0.4) if model is None else model,
        budget,
        strategy=strategy,
        example_inputs=planted_inputs(),
        **arguments,
    )

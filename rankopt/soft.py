"""soften(): soft ranks for anyone's training loop: wrap, train with one more term, discretise."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from rankopt._decompositions.base import Decomposition
from rankopt._model import measure, surgery
from rankopt._model.inputs import MAX_SAMPLES
from rankopt._model.patterns import Patterns
from rankopt._search.model_clock import ModelClock, bounds_latency, price_time
from rankopt._search.opening import Opened, check_request, open_problem
from rankopt._soft.model import FIRST_ENTROPY, SoftModel, Trained
from rankopt._timing.profile_table import ProfileTable, check_table
from rankopt.budget import Budget
from rankopt.errors import BudgetError, ModelError
from rankopt.strategy import Strategy
from rankopt.strategy.relaxation import Relaxation
from rankopt.strategy.settings import Settings

__all__ = ["SoftModel", "soften"]


@measure.outside_inference_mode
def soften(
    model: nn.Module,
    budget: str | Budget,
    *,
    example_inputs: Any = None,
    calibration: Any = None,
    calibration_samples: int | None = MAX_SAMPLES,
    methods: str | Decomposition | Sequence[str | Decomposition] = Strategy.methods,
    only: Patterns = (),
    ignore: Patterns = (),
    profile: ProfileTable | None = None,
    progress: bool | None = None,
) -> SoftModel:
    """A copy of `model` whose ranks are learned as it trains.

    Add `SoftModel.penalty` to the loss, train both `SoftModel.weights` and
    `SoftModel.logits` as usual, then `SoftModel.discretise` the ranks and
    `SoftModel.build` the small model.

    Args:
        model: A trained model; not changed.
        budget: As of `rankopt.search`. On latency the expected cost is the mean of measured
            times: a profile table, interpolated by the probabilities of its ranks.
        example_inputs: As of `rankopt.search`; needed for MACs and latency.
        calibration: Inputs; ranks are then truncations that keep the layers' outputs.
        calibration_samples: Where to stop reading.
        methods: Decompositions to choose from; of cp, tt and branched_tucker all factors but
            the last stay as fitted to the weights of `model`.
        only: Layers to soften, as of `rankopt.search`.
        ignore: Layers to leave dense.
        profile: Where layer times are kept, and how they are taken; needed for latency only.
        progress: Whether to show progress bars.

    Raises:
        BudgetError: The budget cannot be read, or needs inputs not given.
        BudgetInfeasible: Even the smallest ranks exceed it.
        ModelError: No layer can be decomposed, or every weight is frozen.

    Example:
        >>> model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> soft = rankopt.soften(model, "params<=50%")
        >>> loss = soft(torch.randn(8, 32)).square().mean() + soft.penalty(0.0)
        >>> loss.backward()
        >>> plan = soft.discretise()
        >>> soft.build(plan)(torch.randn(8, 32)).shape
        torch.Size([8, 4])
    """
    started = time.perf_counter()
    allowed = Budget.parse(budget)
    if allowed is not None and allowed.metric_drop is not None:
        raise BudgetError(
            "soft ranks are held to params, macs, memory or latency; for a budget on metric_drop "
            "use rankopt.search"
        )
    check_request(allowed, Trained(), example_inputs, calibration, None)
    with torch.no_grad(), measure.preserve_rng():
        opened = open_problem(
            model,
            allowed,
            example_inputs=example_inputs,
            calibration=calibration,
            calibration_samples=calibration_samples,
            methods=methods,
            only=only,
            ignore=ignore,
            settings=Settings(progress=progress),
        )
        clock = None
        if bounds_latency(allowed):
            assert opened.seen is not None
            clock = ModelClock(opened.source, example_inputs, check_table(profile, "profile"))
            opened = _timed(opened, clock)
        opened.problem.prepare()
        trained = surgery.clone(opened.view)
        names = [site.name for site in opened.problem.sites]
        if not any(parameter.requires_grad for parameter in trained.parameters()):
            raise ModelError(
                "every parameter of the model is frozen (requires_grad=False); free those to "
                f"train, such as {names[0]}.weight, or use rankopt.search"
            )
        relaxation = Relaxation(opened.problem, soft=True)
        soft = SoftModel(trained, relaxation)
        soft.opened, soft.clock, soft.allowed = opened, clock, allowed
        scores = np.square(relaxation.error)
        temperature = float(np.ptp(scores)) or 1.0
        for _ in range(60):
            probabilities, _ = relaxation.priced(scores, temperature)
            if relaxation.entropy(probabilities).mean() <= FIRST_ENTROPY:
                break
            temperature *= 0.7
        soft.set_probabilities(probabilities)
        soft.seconds = time.perf_counter() - started
    return soft


def _timed(opened: Opened, clock: ModelClock) -> Opened:
    """With layer times as a cost, and milliseconds as a share of the dense time."""
    problem, budget = opened.problem, opened.problem.budget
    assert budget is not None
    assert opened.seen is not None
    price_time(problem, clock, opened.seen)
    shares = [budget.latency or 1.0, (budget.latency_ms or clock.dense_ms) / clock.dense_ms]
    held = replace(budget, latency=min(shares), latency_ms=None)
    return replace(opened, problem=problem.with_budget(held))

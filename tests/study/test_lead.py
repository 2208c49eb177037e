"""How far the best of a study is above the plans it began with, and how sure that is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from study_common import INPUTS, WANT, open_study

from rankopt._study.front import _paired_error
from rankopt.cli import main


def by_batch(model, batch):
    x, want = batch
    with torch.no_grad():
        return 1 - float((model(x) - want).square().sum() / want.square().sum())


def batches():
    return list(zip(INPUTS.split(8), WANT.split(8), strict=True))


def test_the_best_says_what_it_is_better_than():
    study = open_study(evaluate=by_batch, batches=batches(), space="tilt", sampler="local", seed=0)
    study.run(n_trials=30)
    plan = study.best("macs<=70%")
    fitting = [
        p for p in study.points
        if p.figures["macs"] <= 0.7 * plan.totals["macs"]["before"] and p.warm
    ]  # fmt: skip
    facts = plan.extensions["study"]
    assert facts["warm"] is None
    first = max(fitting, key=lambda point: point.metric)
    lead = facts["lead"]
    assert (lead["over"], lead["trial"]) == (first.warm, first.trial)
    assert lead["gain"] == pytest.approx(facts["metric"] - first.metric)
    assert lead["gain"] > 0
    assert 0 < lead["standard_error"] < 1
    assert study.best("metric_drop<=0.5, minimize=macs").extensions["study"].get("lead") is None


def test_a_queued_plan_leads_over_nothing():
    study = open_study()
    study.run(n_trials=study.status()["trials"]["waiting"])
    assert study.best("macs<=70%").extensions["study"]["lead"] is None


def test_the_error_is_that_of_paired_batches():
    rng = np.random.default_rng(0)
    weights, shared = rng.uniform(1, 3, 40), rng.normal(size=40)
    gain = rng.normal(0.5, 0.1, 40)
    ours = [[a, w] for a, w in zip(shared + gain, weights, strict=True)]
    theirs = [[a, w] for a, w in zip(shared, weights, strict=True)]
    # What all batches share cancels out.
    assert _paired_error(ours, theirs) == pytest.approx(0.1 / 40**0.5, rel=0.3)
    even = [[value, 1.0] for value in gain]
    zeros = [[0.0, 1.0]] * 40
    assert _paired_error(even, zeros) == pytest.approx(np.std(gain, ddof=1) / 40**0.5)
    assert _paired_error(ours[:1], theirs[:1]) is None
    assert _paired_error(ours, theirs[:-1]) is None


def test_the_command_says_it(tmp_path, capsys):
    storage = tmp_path / "s.db"
    with open_study(storage, evaluate=by_batch, batches=batches(), space="tilt",
                    sampler="local", seed=0) as study:  # fmt: skip
        study.run(n_trials=30)
    capsys.readouterr()
    assert main(["study", "best", "--storage", str(storage), "--budget", "macs<=70%"]) == 0
    assert "(standard error) against" in capsys.readouterr().out

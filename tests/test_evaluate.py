"""What `evaluate` may give, in every function that takes one."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from finetuning import in_batches, problem

import rankopt
from rankopt.errors import EvaluationError, RankoptWarning

pytest.importorskip("accelerate")

TEACHER, SMALL, X, Y = problem(count=64)
TRAIN = in_batches(X, Y)
BUDGET = "params<=60%"


def compare(evaluate):
    return rankopt.compare(TEACHER, SMALL, evaluate=evaluate).metric.before


def compress(evaluate):
    done = rankopt.compress(TEACHER, BUDGET, evaluate=evaluate)
    return done.comparison.metric.before


def finetune(evaluate):
    return rankopt.finetune(SMALL, TRAIN, epochs=1, evaluate=evaluate).before


def search(evaluate):
    plan = rankopt.search(TEACHER, "metric_drop<=1, minimize=params", evaluate=evaluate)
    return plan.extensions["metric_drop"]["dense"]


def study(evaluate):
    made = rankopt.study(TEACHER, evaluate=evaluate, storage=None)
    with warnings.catch_warnings():  # a trial that fails is on record
        warnings.simplefilter("ignore", RankoptWarning)
        made.run(n_trials=1)
    for error in made.status()["errors"]:
        raise EvaluationError(error)
    return made.front[0].metric


EVERY = [compare, compress, finetune, search, study]


@pytest.mark.parametrize("function", EVERY)
@pytest.mark.parametrize(
    "evaluate",
    [
        lambda model: 2.5,
        lambda model: torch.tensor(2.5),
        lambda model: iter([1.0, 4.0]),
        lambda model: (pair for pair in [(1.0, 1.0), (torch.tensor(3.0), 3)]),
    ],
    ids=["number", "tensor", "numbers", "pairs"],
)
def test_a_number_or_one_for_each_batch(function, evaluate):
    assert function(evaluate) == 2.5


def test_agreement_is_a_metric_to_train_by():
    done = rankopt.finetune(
        SMALL, TRAIN, epochs=1, evaluate=rankopt.Agreement(TEACHER, [X]), learning_rate=1e-9
    )
    assert done.before < 0
    assert math.isfinite(done.metric)


@pytest.mark.parametrize("function", EVERY)
@pytest.mark.parametrize(
    ("evaluate", "match"),
    [
        (lambda model: {}["accuracy"], "evaluate raised KeyError: 'accuracy'"),
        (lambda model: (1 / n for n in [1.0, 0.0]), "evaluate raised ZeroDivisionError"),
        (lambda model: None, "evaluate gave a NoneType; expected a number"),
        (lambda model: "0.9", "evaluate gave a str; expected a number"),
        (lambda model: [0.9], "evaluate gave a list; expected a number"),
        (lambda model: iter(()), "evaluate yielded no value"),
        (lambda model: math.nan, "evaluate gave nan; expected a finite number"),
    ],
    ids=["raises", "raises later", "None", "text", "list", "nothing", "NaN"],
)
def test_what_is_no_metric(function, evaluate, match):
    if function in (compress, finetune) and match.endswith("finite number"):
        assert math.isnan(function(evaluate))  # models that broke are told by it
        return
    with pytest.raises(EvaluationError, match=match):
        function(evaluate)

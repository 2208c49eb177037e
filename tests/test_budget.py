from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankopt import Budget
from rankopt.errors import BudgetError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("macs<=50%", Budget(macs=0.5)),
        ("params<=0.4, latency<=70%", Budget(params=0.4, latency=0.7)),
        ("latency_ms<=8", Budget(latency_ms=8.0)),
        (" memory <= 1e-1 ", Budget(memory=0.1)),
        ("metric_drop<=0.01, minimize=latency", Budget(metric_drop=0.01, minimize="latency")),
        ("MACs<=50%, Latency_ms<=8", Budget(macs=0.5, latency_ms=8)),
        (
            "metric_drop<=2, minimise=MACs, direction=Minimise",
            Budget(metric_drop=2, minimize="macs", direction="minimize"),
        ),
        (
            "metric_drop<=2,minimize=macs,direction=minimize",
            Budget(metric_drop=2, minimize="macs", direction="minimize"),
        ),
    ],
)
def test_spellings(text, expected):
    assert Budget.parse(text) == expected


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (0.5, "does not say of what.*params<=50%"),
        ("0.5", "does not say of what"),
        ("50%", "does not say of what"),
        ("flops<=50%", "unknown quantity 'flops'.*params, macs"),
        ("GFLOPs<=2", "unknown quantity 'GFLOPs'.*write macs, 1 MAC = 2 FLOPs"),
        ("macs<=50% params<=40%", "separate bounds with a comma"),
        ("macs<=50%; params<=40%", "separate bounds with a comma"),
        ("macs<=50% and params<=40%", "separate bounds with a comma"),
        ("params<=1000", r"shares of the original model's figure, not counts: write 'params<=50%'"),
        ("params<=5M", r"'5M' is not a number; budgets are shares.*write 'params<=50%'"),
        ("memory<=4 MiB", r"'4 MiB' is not a number; budgets are shares.*write 'memory<=50%'"),
        ("macs<50%", "write 'macs<=50%'"),
        ("macs>=50%", "only <= is a budget"),
        ("macs<=half", "'half' is not a number"),
        ("macs<=50", r"write 'macs<=50%'"),
        ("macs<=0%", "above 0%"),
        ("macs<=150%", "at most at 100%"),
        ("macs<=50%, macs<=40%", "bounds macs twice"),
        ("latency_ms<=8%", "not a share"),
        ("metric_drop<=0.01", "metric_drop and minimize go together"),
        ("metric_drop<=0.1, minimize=size", "minimize='size'"),
        ("", "cannot read"),
        (["macs"], "not list"),
    ],
)
def test_refusals(spec, match):
    with pytest.raises(BudgetError, match=match):
        Budget.parse(spec)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 0, 1.5, "x", True])
def test_values_out_of_range(value):
    with pytest.raises(BudgetError, match="params"):
        Budget(params=value)


@given(st.floats(0.01, 1), st.integers(1, 10**12), st.integers(0, 10**12))
def test_fits_is_the_ratio(share, total, figure):
    assert Budget(macs=share).fits({"macs": figure}, {"macs": total}) == (figure <= share * total)


@given(st.floats(1e-6, 1), st.none() | st.floats(1e-6, 1))
def test_dict_round_trip(macs, params):
    budget = Budget(macs=macs, params=params)
    assert Budget.from_dict(budget.to_dict()) == budget


def test_nothing_bounded():
    with pytest.raises(BudgetError, match="bounds nothing"):
        Budget()
    assert Budget.parse(None) is None


def test_numbers_of_numpy():
    assert Budget(params=np.float32(0.5)) == Budget(params=0.5)


def test_one_percent_sign():
    with pytest.raises(BudgetError, match="'50%%' is not a number"):
        Budget.parse("macs<=50%%")


def test_a_direction_is_of_a_metric():
    with pytest.raises(BudgetError, match="direction='minimize' is of a metric"):
        Budget.parse("macs<=50%, direction=minimize")

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import rankopt
from rankopt._build import compare as compare_module
from rankopt._build.compare import Figure
from rankopt._model import inputs
from rankopt._plan_tables import plan_table, totals_table
from rankopt._timing.latency import Interval, Timings, time_interleaved
from rankopt._utils.tables import count, to_text
from rankopt.errors import EvaluationError, ModelError
from rankopt.testing import planted_inputs, planted_model


def test_counts_without_inputs():
    model = planted_model()
    small = rankopt.apply(model, rankopt.search(model, "params<=60%"))
    found = rankopt.compare(model, small)
    assert found.params.before == sum(p.numel() for p in model.parameters())
    assert found.params.ratio <= 0.6
    assert found.macs is None
    assert "not measured: pass example_inputs" in found.verdict


def test_measures_and_leaves_modes_alone():
    model = planted_model().train()
    small = rankopt.apply(model, rankopt.search(model, "params<=60%"))
    found = rankopt.compare(
        model, small, example_inputs=planted_inputs(), rounds=5, evaluate=lambda m: 1.0
    )
    assert model.training
    assert small.training
    assert found.latency_ratio.low <= found.latency_ratio.median <= found.latency_ratio.high
    text = str(found)
    assert "macs" in text
    assert found.verdict.split(";")[0][:20] in text
    assert found.to_dict()["metric"] == {"before": 1.0, "after": 1.0}


def test_outputs_are_compared():
    model = planted_model()
    x = planted_inputs()
    small = rankopt.apply(model, rankopt.search(model, "params<=30%"))
    found = rankopt.compare(model, small, example_inputs=x, rounds=3)
    with torch.no_grad():
        before, after = model(x), small(x)
    assert found.output_error == pytest.approx(float((after - before).norm() / before.norm()))
    assert found.agreement == float((before.argmax(1) == after.argmax(1)).double().mean())
    assert "same class" in str(found)
    assert "metric: not measured" in str(found)
    same = rankopt.compare(model, model, example_inputs=x, rounds=3)
    assert (same.output_error, same.agreement) == (0.0, 1.0)
    broken = nn.Sequential(model, nn.Threshold(torch.inf, torch.nan))
    found = rankopt.compare(model, broken, example_inputs=x, rounds=3)
    assert found.output_error is None
    assert "not finite" in str(found)
    indices = nn.Sequential(nn.Linear(4, 4), Index())
    assert rankopt.compare(indices, indices, example_inputs=x[0, 0, :4, :4]).output_error is None


class Index(nn.Module):
    def forward(self, x):
        return x.argmax(1)


def test_outputs_are_summed_in_pieces(monkeypatch):
    model, x = planted_model(), planted_inputs()
    small = rankopt.apply(model, rankopt.search(model, "params<=30%"))
    whole = rankopt.compare(model, small, example_inputs=x, rounds=3)
    monkeypatch.setattr(inputs, "PIECE", 7)
    parts = rankopt.compare(model, small, example_inputs=x, rounds=3)
    assert parts.output_error == pytest.approx(whole.output_error, rel=1e-12)


def test_inputs_that_are_computed_can_be_compared():
    model = nn.Linear(4, 4)
    x = 2 * torch.ones(2, 4, requires_grad=True)
    assert rankopt.compare(model, model, example_inputs=x, rounds=3).output_error == 0


def test_outputs_that_find_no_memory_are_not_compared():
    calls = []

    class Large(nn.Linear):
        def forward(self, x):
            calls.append(x)
            if len(calls) == 2:  # after MACs were counted
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    found = rankopt.compare(Large(4, 4), nn.Linear(4, 4), example_inputs=torch.ones(2, 4), rounds=3)
    assert (found.output_error, found.agreement) == (None, None)
    assert found.latency_ratio is not None


def test_training_is_timed_on_copies():
    model = planted_model()
    small = rankopt.apply(model, rankopt.search(model, "params<=60%"))
    before = model.norm.running_mean.clone()
    found = rankopt.compare(
        model, small, example_inputs=planted_inputs(), rounds=3, mode="training"
    )
    assert found.latency_ratio.median > 0
    assert found.conditions["mode"] == "training"
    assert found.conditions["threads"] == str(torch.get_num_threads())
    assert torch.equal(model.norm.running_mean, before)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="mode='fast'"):
        rankopt.compare(model, model, example_inputs=planted_inputs(), mode="fast")


@pytest.mark.parametrize(
    ("evaluate", "match"),
    [
        (lambda model: float("nan"), "evaluate gave nan; expected a finite number"),
        (lambda model: None, "evaluate gave a NoneType; expected a number"),
        (lambda model: model.nope, "evaluate raised AttributeError"),
        (lambda model: iter(()), "evaluate yielded no value"),
    ],
)
def test_a_metric_that_is_no_number(evaluate, match):
    with pytest.raises(EvaluationError, match=match):
        rankopt.compare(planted_model(), planted_model(), evaluate=evaluate)


def test_a_metric_in_batches():
    found = rankopt.compare(
        planted_model(), planted_model(), evaluate=lambda model: iter([1.0, (4.0, 2.0)])
    )
    assert found.metric.before == found.metric.after == 3.0


def comparison(low, median, high):
    figure = Figure(100, 50)
    return rankopt.Comparison(figure, figure, latency_ratio=Interval(median, low, high))


def test_compiled_models_are_timed_compiled():
    runs = []

    def backend(graph, inputs):
        def run(*arguments):
            runs.append(1)
            return graph.forward(*arguments)

        return run

    model = planted_model()
    small = rankopt.apply(model, rankopt.search(model, "params<=60%"))
    pair = torch.compile(model, backend=backend), torch.compile(small, backend=backend)
    found = rankopt.compare(*pair, example_inputs=planted_inputs(), rounds=5)
    assert len(runs) >= 10
    assert found.params.ratio <= 0.6
    with pytest.raises(ModelError, match="would run without torch.compile; pass compile=True"):
        rankopt.compare(*pair, example_inputs=planted_inputs(), rounds=5, mode="training")


def test_verdicts_are_plain():
    assert comparison(0.48, 0.5, 0.52).verdict == "2.00x as fast as the original"
    assert "takes 1.50 times as long" in comparison(1.4, 1.5, 1.6).verdict
    assert "keep the original" in comparison(1.4, 1.5, 1.6).verdict
    assert "computes less" not in comparison(1.4, 1.5, 1.6).verdict  # no MACs were counted
    assert comparison(0.98, 1.0, 1.02).verdict.startswith("no faster and no slower")
    for noisy in ((0.8, 1.0, 1.2), (0.4, 0.5, 0.6), (1.2, 1.5, 1.8)):  # whichever way it decides
        assert "the machine is noisy, measure again" in comparison(*noisy).verdict


def test_bad_inputs():
    model = planted_model()
    with pytest.raises(ModelError, match="fails on example_inputs"):
        rankopt.compare(model, model, example_inputs=torch.zeros(1, 4))
    with pytest.raises(ModelError, match="example_inputs is a int"):
        rankopt.compare(model, model, example_inputs=3)
    with pytest.raises(ValueError, match="rounds=1"):
        rankopt.compare(model, model, example_inputs=planted_inputs(), rounds=1)


def test_paired_ratios_cancel_common_noise():
    noise = np.random.default_rng(0).uniform(1, 5, size=40)
    ratio = Timings({"a": noise, "b": 2 * noise}).ratio("b", "a")
    assert ratio.median == pytest.approx(2)
    assert not ratio.noisy
    assert Timings({"a": noise}).interval("a").noisy


def test_every_round_times_every_candidate():
    calls = []
    timings = time_interleaved(
        {name: lambda name=name: calls.append(name) for name in "abc"}, rounds=4
    )
    assert {len(times) for times in timings.latency_ms.values()} == {4}
    last = calls[-12:]
    assert all(sorted(last[i : i + 3]) == ["a", "b", "c"] for i in range(0, 12, 3))


def test_tables_say_what_and_why():
    plan = rankopt.search(planted_model(), "macs<=50%", example_inputs=planted_inputs())
    text = to_text(plan_table(plan), totals_table(plan))
    for word in ("conv", "tucker2", "knapsack", "depthwise", "measured", "kept"):
        assert word in text
    assert [count(x) for x in (None, 5, 1500, 2.5e6, 3e9)] == ["–", "5", "1.5 k", "2.5 M", "3 G"]


def test_models_compiled_in_place_are_treated_as_wrapped_ones(monkeypatch):
    model, x = nn.Sequential(nn.Linear(8, 8)).eval(), torch.zeros(2, 8)
    model.compile(backend="eager")
    with pytest.raises(ModelError, match="Sequential is compiled, and mode='training'"):
        rankopt.compare(model, model, example_inputs=x, rounds=3, mode="training")
    timed = []

    def eager(given, *_, **settings):
        timed.append(given)
        return lambda: None

    monkeypatch.setattr(compare_module, "runner", eager)
    rankopt.compare(model, model, example_inputs=x, rounds=3, compile=True)
    assert [given._compiled_call_impl for given in timed] == [None, None]
    assert timed[0][0].weight is model[0].weight

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import nn

from rankopt._timing.conditions import tf32
from rankopt._timing.latency import Interval, Timings, process_ms, runner, time_interleaved
from rankopt.testing import ModelledClock, planted_inputs, planted_model


def test_every_run_is_counted():
    counts = dict.fromkeys("ab", 0)

    def run(name):
        counts[name] += 1

    found = time_interleaved(
        {name: lambda name=name: run(name) for name in "ab"},
        rounds=5,
        clock=lambda function: (function(), 0.25)[1],
        min_ms=1.0,
    )
    assert found.calls == sum(counts.values())
    assert counts["a"] == 3 + 5 * 4  # warm-up, then five rounds of four repeats
    assert found.latency_ms["a"].tolist() == [0.0625] * 5


def test_warm_up_ends_when_steady_or_at_the_limit():
    times = iter([9.0, 5.0, 3.0, 1.0, 1.0, 1.0] + [1.0] * 10)
    found = time_interleaved({"a": lambda: None}, rounds=3, clock=lambda _: next(times))
    assert found.calls == 6 + 3
    assert found.latency_ms["a"].tolist() == [1.0] * 3
    restless = iter(np.geomspace(1, 1e6, 40))
    found = time_interleaved(
        {"a": lambda: None}, rounds=3, clock=lambda _: next(restless), max_warmup=4
    )
    assert found.calls == 4 + 3


def test_more_rounds_add_up():
    first = Timings({"a": np.ones(3), "b": np.full(3, 2.0)}, calls=6)
    both = first + Timings({"a": np.full(2, 3.0), "b": np.full(2, 6.0)}, calls=4)
    assert both.latency_ms["a"].tolist() == [1, 1, 1, 3, 3]
    assert both.ratio("b", "a") == Interval(2.0, 2.0, 2.0)
    assert both.calls == 10


def test_training_runs_backward_and_leaves_no_gradients():
    model = planted_model().train()
    seen = []
    model.conv.register_full_backward_hook(lambda *_: seen.append("back"))
    x = planted_inputs()
    step = runner(model, x, mode="training")
    with torch.no_grad():  # as inside search
        step()
    assert seen == ["back"]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not x.requires_grad
    seen.clear()
    runner(model.eval(), x)()
    assert seen == []


def test_training_of_other_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.fc = nn.Embedding(5, 4), nn.Linear(4, 4)

        def forward(self, ids, scale):
            return {"out": [self.fc(self.embedding(ids)) * scale]}

    runner(Two(), {"ids": torch.tensor([[1, 2]]), "scale": torch.ones(1)}, mode="training")()


def test_bad_requests():
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="mode='fast'"):
        runner(model, torch.zeros(1, 4), mode="fast")
    with pytest.raises(ValueError, match="no mode='training'"):
        runner(model, torch.zeros(1, 4), mode="training", cuda_graph=True)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA device"):
            runner(model, torch.zeros(1, 4), cuda_graph=True)


def test_process_time_leaves_out_waiting():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert process_ms(lambda: time.sleep(0.05)) < 25
        torch.set_num_threads(2)
        with pytest.raises(ValueError, match=r"one thread only, torch has 2"):
            process_ms(lambda: None)
    finally:
        torch.set_num_threads(threads)


def test_the_modelled_clock_counts_what_runs():
    clock = ModelledClock(overhead_ms=1.0, macs_per_ms=1.0, multiple=4)
    conv = nn.Conv2d(4, 6, 3, padding=1, bias=False)
    assert clock(lambda: conv(torch.zeros(2, 4, 5, 5))) == 1 + 50 * 4 * 8 * 9
    chain = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8))
    assert clock(lambda: chain(torch.zeros(3, 8))) == 2 + 2 * 3 * 8 * 4


def test_settings_of_tf32_under_either_name():
    assert all(isinstance(value, bool) for value in tf32())
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # the old name cannot be read any more
        assert tf32()[0] == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before

from __future__ import annotations

import sqlite3
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import rankopt
from rankopt._model.layers import find_layers
from rankopt._model.probe import Call
from rankopt._timing.layer_time import Chain, LayerTime
from rankopt._timing.profile_table import LOOK_WARMUP, ProfileTable
from rankopt.errors import LayerError
from rankopt.testing import ModelledClock

CPU = torch.device("cpu")
SVD = rankopt.decompositions.create("svd")


def layer(module=None):
    (found,) = find_layers(nn.Sequential(module or nn.Linear(64, 64)))
    return found


def counting_table(**settings):
    """A table whose clock says how often it was asked, and stores on disk all the same."""
    table = ProfileTable(clock=ModelledClock(), rounds=3)
    table.path = settings.get("path")
    return table


CHAINS = [Chain(), Chain(SVD, (8,)), Chain(SVD, (16,))]
CALL = Call((4, 64))


def test_equal_layers_are_timed_once_and_remembered_on_disk(tmp_path):
    table = counting_table(path=tmp_path / "p.sqlite")
    first = table.time(layer(), CALL, CHAINS, device=CPU)
    runs = table.calls
    assert runs > 0
    again = table.time(layer(), CALL, CHAINS[1:], device=CPU)
    assert table.calls == runs
    assert again[CHAINS[1]] is first[CHAINS[1]]
    other = counting_table(path=tmp_path / "p.sqlite")
    found = other.time(layer(), CALL, CHAINS, device=CPU)
    assert other.calls == 0
    assert found[CHAINS[2]].ratio == first[CHAINS[2]].ratio
    other.time(layer(), CALL, [Chain(SVD, (24,))], device=CPU)
    assert other.calls > 0


def busy_file(path):
    """A file of times taken on a busy machine: each is off by a factor of its own."""
    clock, noise = ModelledClock(), np.random.default_rng(0)
    table = counting_table(path=path)
    table.clock = lambda run: clock(run) * noise.uniform(1, 3)
    first = table.time(layer(), CALL, CHAINS, device=CPU)
    assert first[CHAINS[1]].ratio.noisy
    return table, first


def test_stored_times_that_vary_too_much_are_taken_anew(tmp_path):
    path = tmp_path / "p.sqlite"
    busy, first = busy_file(path)
    runs = busy.calls
    assert busy.time(layer(), CALL, CHAINS, device=CPU)[CHAINS[1]] is first[CHAINS[1]]
    assert busy.calls == runs  # a table keeps what it measured, or it would never end
    frozen = ProfileTable(clock=ModelledClock(), rounds=3, refresh=False)
    frozen.path = path
    kept = frozen.time(layer(), CALL, CHAINS, device=CPU)
    assert frozen.calls == 0
    stored = first[CHAINS[1]].to_json()["ms"]
    assert kept[CHAINS[1]].chain_ms.tolist() == stored
    calm = counting_table(path=path)
    assert not calm.time(layer(), CALL, CHAINS, device=CPU)[CHAINS[1]].ratio.noisy
    assert calm.calls > 0
    after = counting_table(path=path)
    assert not after.time(layer(), CALL, CHAINS, device=CPU)[CHAINS[1]].ratio.noisy
    assert after.calls == 0  # the file holds the calm times now
    again = ProfileTable(clock=ModelledClock(), rounds=3, refresh=True)
    again.path = path
    again.time(layer(), CALL, CHAINS, device=CPU)
    assert again.calls > 0


@pytest.mark.parametrize(
    "value",
    [
        "{}",
        "[]",
        '{"ms": [], "dense_ms": [], "session": ""}',
        '{"ms": ["a"], "dense_ms": [1.0], "session": ""}',
        '{"ms": [null], "dense_ms": [1.0], "session": ""}',
        '{"ms": [1.0, 1.0, 1.0], "dense_ms": [1.0, 1.0], "session": ""}',
        '{"ms": [0.0, 0.0], "dense_ms": [0.0, 0.0], "session": ""}',
    ],
)
def test_stored_times_of_a_wrong_form_are_taken_anew(tmp_path, value):
    path = tmp_path / "p.sqlite"
    counting_table(path=path).time(layer(), CALL, CHAINS, device=CPU)
    connection = sqlite3.connect(path)
    connection.execute("UPDATE timings SET value = ?", (value,))
    connection.commit()
    connection.close()
    table = counting_table(path=path)
    found = table.time(layer(), CALL, CHAINS, device=CPU)
    assert table.calls > 0
    assert all(np.isfinite(found[chain].ratio.median) for chain in CHAINS)


@pytest.mark.parametrize(
    ("module", "call"),
    [
        (nn.Linear(64, 64, bias=False), CALL),
        (nn.Linear(64, 32), CALL),
        (nn.Linear(64, 64), Call((8, 64))),
        (nn.Linear(64, 64).double(), Call((4, 64), "float64")),
        (nn.Conv2d(64, 64, 1), Call((1, 64, 4, 4))),
        (nn.Conv2d(64, 64, 1, stride=2), Call((1, 64, 4, 4))),
        (nn.Conv2d(64, 64, 1), Call((1, 64, 4, 4), memory_format="channels_last")),
    ],
)
def test_what_differs_is_timed_again(module, call, tmp_path):
    table = counting_table(path=tmp_path / "p.sqlite")
    for known_module, known_call in (
        (nn.Linear(64, 64), CALL),
        (nn.Conv2d(64, 64, 1), Call((1, 64, 8, 8))),
    ):
        table.time(layer(known_module), known_call, CHAINS, device=CPU)
    runs = table.calls
    table.time(layer(module), call, CHAINS, device=CPU)
    assert table.calls > runs


def test_conditions_tell_modes_threads_and_clocks_apart():
    base = ProfileTable(":memory:").conditions(CPU, CALL)
    assert base["threads"] == str(torch.get_num_threads())
    assert base["torch"] == torch.__version__
    assert base["device"].startswith("cpu ")
    assert ProfileTable(":memory:", mode="training").conditions(CPU, CALL) != base
    assert ProfileTable(":memory:", clock="process").conditions(CPU, CALL) != base
    assert ProfileTable(":memory:").conditions(CPU, Call((4, 64), "float64")) != base


def test_conditions_tell_allocators_apart(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "")
    base = ProfileTable(":memory:").conditions(CPU, CALL)
    for name, value in (("LD_PRELOAD", "libjemalloc.so.2"), ("MALLOC_TRIM_THRESHOLD_", "1")):
        with monkeypatch.context() as process:
            process.setenv(name, value)
            assert ProfileTable(":memory:").conditions(CPU, CALL) != base
    assert ProfileTable(":memory:").conditions(CPU, CALL) == base


def test_a_layer_runs_under_the_autocast_of_its_call():
    seen = []

    def clock(function):
        function()
        seen.append(torch.is_autocast_enabled("cpu"))
        return 1.0

    table = ProfileTable(clock=clock, rounds=3)
    cast = Call((4, 64), "bfloat16", autocast="bfloat16")
    assert CHAINS[1] in table.time(layer(), cast, CHAINS, device=CPU)
    assert not any(seen)  # the layers were, the caller is not
    assert table.conditions(CPU, cast)["settings"] != table.conditions(CPU, CALL)["settings"]
    with torch.autocast("cpu", torch.bfloat16):
        assert Call.of(torch.zeros(4, 64, dtype=torch.bfloat16)) == cast


def test_times_are_those_of_the_clock():
    table = ProfileTable(clock=ModelledClock(overhead_ms=1, macs_per_ms=64, multiple=8), rounds=3)
    found = table.time(layer(), Call((1, 64)), CHAINS, device=CPU)
    dense = 1 + 64
    assert found[Chain()].latency_ms.median == dense
    assert found[CHAINS[1]].latency_ms.median == 2 + 8 * 2
    assert found[CHAINS[2]].ratio.median == pytest.approx((2 + 16 * 2) / dense)


def test_training_takes_the_backward_pass_too():
    seen = []

    def clock(function):
        function()
        seen.append(torch.is_grad_enabled())
        return 1.0

    table = ProfileTable(mode="training", clock=clock, rounds=3)
    with torch.no_grad():
        assert table.time(layer(), CALL, CHAINS, device=CPU)
    assert seen


def test_real_clocks_and_layouts():
    table = ProfileTable(":memory:", rounds=3)
    conv = nn.Conv2d(16, 16, 3, padding=1, groups=2)
    tucker = rankopt.decompositions.create("tucker2")
    call = Call((2, 16, 8, 8), memory_format="channels_last")
    found = table.time(layer(conv), call, [Chain(tucker, (4, 4))], device=CPU)
    assert found[Chain(tucker, (4, 4))].latency_ms.median > 0


def test_a_look_is_extended_to_a_measurement():
    table = ProfileTable(clock=ModelledClock(), rounds=9)
    looked = table.time(layer(), CALL, CHAINS, device=CPU, rounds=3)
    assert len(looked[CHAINS[1]].chain_ms) == 3
    runs = table.calls
    measured = table.time(layer(), CALL, CHAINS[:2], device=CPU)
    assert len(measured[CHAINS[1]].chain_ms) == 9
    assert table.calls - runs == 2 * (1 + LOOK_WARMUP + 6)
    assert measured[CHAINS[1]].session.startswith(looked[CHAINS[1]].session)
    # Chains and the dense layer that were extended together stay comparable round by round.
    assert measured[CHAINS[1]].session == measured[Chain()].session
    assert measured[CHAINS[1]].dense_ms.tolist() == measured[Chain()].chain_ms.tolist()
    runs = table.calls
    kept = table.time(layer(), CALL, CHAINS[:2], device=CPU, rounds=3)
    assert len(kept[CHAINS[1]].chain_ms) == 9
    assert table.calls == runs


def test_a_chain_that_runs_out_of_memory_is_skipped(monkeypatch):
    from rankopt._timing import profile_table

    build = profile_table._build

    def failing(layer, chain, call, device):
        if chain.ranks == (16,):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return build(layer, chain, call, device)

    monkeypatch.setattr(profile_table, "_build", failing)
    table = ProfileTable(clock=ModelledClock(), rounds=3)
    found = table.time(layer(), CALL, CHAINS, device=CPU)
    assert set(found) == set(CHAINS[:2])
    assert next(iter(table.skipped.values())).startswith("CUDA out of memory")


def test_a_layer_that_does_not_fit_its_input():
    table = ProfileTable(clock=ModelledClock(), rounds=3)
    with pytest.raises(LayerError, match=r"layer 0: it cannot be timed alone on \[4, 63\]"):
        table.time(layer(), Call((4, 63)), CHAINS, device=CPU)


def test_large_chains_run_in_several_sessions(monkeypatch):
    monkeypatch.setattr("rankopt._timing.profile_table.SESSION_BYTES", 10_000)
    table = ProfileTable(clock=ModelledClock(), rounds=3)
    found = table.time(layer(), CALL, CHAINS, device=CPU)
    assert found[CHAINS[1]].session != found[CHAINS[2]].session
    assert found[CHAINS[2]].versus(found[CHAINS[1]]).median > 1


def test_ranks_are_compared_round_by_round():
    noise = np.random.default_rng(0).uniform(1, 5, 30)
    one, two = (LayerTime(x * noise, 3 * noise, "s") for x in (1.0, 1.1))
    assert two.versus(one).low == pytest.approx(1.1)
    assert one.ratio.median == pytest.approx(1 / 3)
    apart = LayerTime(1.1 * noise, 3 * noise, "t").versus(one)
    assert apart.median == pytest.approx(1.1, rel=0.01)
    both = one + two
    assert both.ratio.median == pytest.approx(2.1 / 6)


def test_settings_are_validated():
    for bad, match in (
        ({"mode": "fast"}, "mode='fast'"),
        ({"rounds": 2}, "rounds=2"),
        ({"rounds": True}, "rounds=True"),
        ({"clock": "sun"}, "clock='sun'"),
        ({"refresh": "all"}, "refresh='all'"),
        ({"mode": "training", "cuda_graph": True}, "cuda_graph=True"),
    ):
        with pytest.raises(ValueError, match=match):
            ProfileTable(":memory:", **bad)


def test_times_of_other_kernels_are_told_apart():
    base = ProfileTable(":memory:").conditions(CPU, CALL)
    warnings.simplefilter("ignore")  # torch's, on Intel's GPUs; pytest restores the filters
    with torch.backends.mkldnn.flags(enabled=False):
        assert ProfileTable(":memory:").conditions(CPU, CALL) != base
    torch.set_float32_matmul_precision("medium")
    try:
        assert ProfileTable(":memory:").conditions(CPU, CALL) != base
    finally:
        torch.set_float32_matmul_precision("highest")
    assert ProfileTable(":memory:").conditions(CPU, CALL) == base

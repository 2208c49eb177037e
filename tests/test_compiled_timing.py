"""Timing under torch.compile: what is timed is really compiled, each candidate by itself."""

from __future__ import annotations

import functools
import json
import shutil

import pytest
import torch
from torch import nn

import rankopt
from rankopt._model.layers import find_layers
from rankopt._model.probe import Call
from rankopt._timing.latency import runner
from rankopt._timing.layer_time import Chain
from rankopt.cli import main
from rankopt.errors import ModelError
from rankopt.testing import planted_inputs, planted_model

CPU = torch.device("cpu")
SVD = rankopt.decompositions.create("svd")


class Graphs:
    """A backend that runs what Dynamo captured, and counts graphs and the work they do."""

    def __init__(self):
        self.graphs = 0
        self.work = 0.0

    def __call__(self, graph, inputs):
        self.graphs += 1
        work = 100.0 + sum(x.numel() for x in inputs if isinstance(x, nn.Parameter))

        def run(*arguments):
            self.work += work
            return graph.forward(*arguments)

        return run

    def clock(self, function):
        """Milliseconds for compiled work only: what ran eagerly took no time at all."""
        before = self.work
        function()
        return self.work - before


@pytest.fixture
def graphs(monkeypatch):
    found = Graphs()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=found))
    return found


def test_many_modules_of_one_class_are_all_compiled(graphs):
    """More of them than Dynamo compiles of one function before it gives up in silence."""
    count = torch._dynamo.config.recompile_limit + 3
    x = torch.zeros(4, 8)
    for width in range(1, count + 1):
        run = runner(nn.Sequential(nn.Linear(8, width)), x, compile=True)
        assert graphs.clock(run) > 0
        assert graphs.clock(run) > 0
    assert graphs.graphs == count


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_layers_and_their_chains(graphs, mode):
    table = rankopt.ProfileTable(clock=graphs.clock, rounds=3, mode=mode, compile=True)
    (layer,) = find_layers(nn.Sequential(nn.Linear(64, 64)))
    chains = [Chain(SVD, (rank,)) for rank in range(1, 13)]
    found = table.time(layer, Call((4, 64)), [Chain(), *chains], device=CPU)
    assert not table.skipped
    assert graphs.graphs == 1 + len(chains)
    assert found[Chain()].latency_ms.median == 100 + 64 * 64 + 64
    assert found[chains[3]].latency_ms.median == 100 + 4 * 128 + 64


def test_compiled_and_eager_times_are_kept_apart():
    tables = [rankopt.ProfileTable(":memory:", compile=compile) for compile in (False, True)]
    eager, compiled = (table.conditions(CPU, Call((4, 64))) for table in tables)
    assert "compile" not in eager["settings"]  # as in files of earlier versions
    assert json.loads(compiled["settings"])["compile"] is True


def test_a_latency_budget_is_met_by_the_compiled_model(graphs):
    model = planted_model()
    table = rankopt.ProfileTable(clock=graphs.clock, rounds=3, compile=True)
    x = planted_inputs()
    plan = rankopt.search(model, "latency<=60%", example_inputs=x, profile=table)
    small = rankopt.apply(model, plan)
    dense_ms, small_ms = (graphs.clock(runner(m, x, compile=True)) for m in (model, small))
    assert 0 < small_ms <= 0.6 * dense_ms
    assert plan.totals["latency"]["measured"] == pytest.approx(small_ms)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_compare(graphs, mode, wrapped):
    model = planted_model()
    small = rankopt.apply(model, rankopt.search(model, "params<=60%"))
    pair = [torch.compile(each) for each in (model, small)] if wrapped else [model, small]
    found = rankopt.compare(
        *pair, example_inputs=planted_inputs(), rounds=3, mode=mode, compile=True
    )
    assert graphs.graphs == 2
    assert json.loads(found.conditions["settings"])["compile"] is True
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_training_steps_of_compiled_models_need_the_option():
    model = torch.compile(planted_model(), backend="eager")
    with pytest.raises(ModelError, match="pass compile=True to compile the copies"):
        rankopt.compare(model, model, example_inputs=planted_inputs(), rounds=3, mode="training")


def test_commands(graphs, tmp_path, capsys):
    (tmp_path / "models.py").write_text(
        "from rankopt.testing import planted_model\ndef build():\n    return planted_model()\n"
    )
    spec = (f"{tmp_path / 'models.py'}:build", "--input", "2,3,8,8")
    plan = str(tmp_path / "plan.json")
    assert main(["search", *spec, "--budget", "macs<=60%", "-o", plan]) == 0
    capsys.readouterr()
    assert main(["compare", *spec, plan, "--compile", "--rounds", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["conditions"]["settings"].count("compile")
    assert graphs.graphs == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler of CPU kernels is g++")
def test_with_the_real_compiler():
    model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256)).eval()
    x = torch.randn(64, 256)
    table = rankopt.ProfileTable(":memory:", rounds=3, compile=True)
    found = rankopt.profile(model, "0", example_inputs=x, ranks=[16, 32], table=table)
    assert all(row.latency_ms.median > 0 for row in found.rows)
    assert not table.skipped
    small = rankopt.apply(model, rankopt.search(model, "macs<=50%", example_inputs=x))
    for mode in ("inference", "training"):
        result = rankopt.compare(model, small, example_inputs=x, rounds=3, mode=mode, compile=True)
        assert result.latency_ratio.median > 0

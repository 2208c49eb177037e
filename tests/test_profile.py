from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

import rankopt
from rankopt.cli import main
from rankopt.errors import LayerError, MissingDependency, ModelError, RankoptError
from rankopt.testing import ModelledClock, planted_inputs, planted_model


def table(**settings):
    return rankopt.ProfileTable(clock=ModelledClock(**settings), rounds=3)


WIDE = nn.Sequential(nn.Linear(512, 512, bias=False))


def wide(clock=None, **more):
    clock = clock or table(multiple=64, overhead_ms=0.001)
    return rankopt.profile(WIDE, "0", example_inputs=torch.zeros(8, 512), table=clock, **more)


def test_time_against_rank():
    found = wide()
    assert found.method == "svd"
    assert [row.ranks for row in found.rows] == sorted(row.ranks for row in found.rows)
    assert found.dense_ms.median == pytest.approx(0.001 + 8 * 512 * 512 / 2e6)
    by_rank = {row.ranks[0]: row for row in found.rows}
    # Ranks are padded to 64: two products of 8 x 512 x 64 each.
    assert by_rank[64].latency_ms.median == pytest.approx(0.002 + 2 * 8 * 512 * 64 / 2e6)
    assert by_rank[64].work == 0.25
    assert by_rank[16].ratio == by_rank[64].ratio
    assert by_rank[192].verdict == "faster"
    assert by_rank[512].verdict == "slower"
    assert "faster than dense up to rank 192" in found.verdict
    assert not found.noisy


def test_cliffs_are_found_and_looked_at_closely():
    found = wide(table(multiple=128, overhead_ms=0.001))
    assert ((128,), (129,)) in found.cliffs
    assert {(128,), (129,)} <= {row.ranks for row in found.rows}
    assert "cliffs above rank" in found.verdict


def test_ranks_of_ones_own():
    assert [row.ranks for row in wide(ranks=[8, 24]).rows] == [(8,), (24,)]
    found = rankopt.profile(
        planted_model(),
        "conv",
        example_inputs=planted_inputs(),
        ranks=[16, (3, 5)],
        table=table(),
    )
    assert found.method == "tucker2"
    assert {row.ranks for row in found.rows} == {(8, 16), (3, 5)}
    other = rankopt.profile(
        planted_model(),
        "conv",
        example_inputs=planted_inputs(),
        method="spatial_svd",
        ranks=[4],
        table=table(),
    )
    assert other.method == "spatial_svd"


def test_nothing_is_timed_twice():
    clock = table()
    assert wide(clock).runs > 0
    assert wide(clock).runs == 0


def test_where_dense_wins_it_says_so():
    assert "no rank is surely faster than dense" in wide(table(overhead_ms=10.0)).verdict


def test_tables_and_json():
    found = wide(ranks=[64])
    text = str(found)
    for word in ("[512, 512]", "svd", "inference", "64", "faster", "contiguous"):
        assert word in text
    data = json.loads(json.dumps(found.to_dict()))
    assert data["rows"][0]["ranks"] == [64]
    assert data["verdict"] == found.verdict


def test_the_model_is_left_alone():
    model = planted_model().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    rankopt.profile(model, "conv", example_inputs=planted_inputs(), ranks=[4], table=table())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("layer", "arguments", "error", "match"),
    [
        ("cnv", {}, ModelError, "no layer 'cnv' with a weight; the layers are stem, conv"),
        ("depthwise", {}, LayerError, "layer depthwise: it cannot be decomposed: depthwise"),
        ("conv", {"method": "svd"}, LayerError, "svd takes linear layers"),
        ("conv", {"ranks": [17]}, LayerError, None),
        ("hidden", {"ranks": [49]}, LayerError, "rank 49 is outside 1 to 48"),
        ("hidden", {"ranks": [(1, 2)]}, LayerError, r"svd takes 1 rank\(s\)"),
        ("conv", {"example_inputs": torch.zeros(1, 2)}, ModelError, "fails on example_inputs"),
        ("conv", {"example_inputs": None}, ModelError, "example_inputs is a NoneType; expected"),
        ("conv", {"ranks": 8}, ValueError, "ranks=8: expected a sequence"),
        ("conv", {"ranks": "8"}, ValueError, "ranks='8': expected a sequence"),
        ("conv", {"ranks": []}, ValueError, "ranks: expected at least one"),
        ("conv", {"ranks": [8.0]}, ValueError, "ranks: 8.0 is no rank; expected whole numbers"),
        ("conv", {"ranks": ["8"]}, ValueError, "ranks: '8' is no rank"),
        ("conv", {"table": "x"}, ValueError, "table='x': expected a rankopt.ProfileTable"),
    ],
)
def test_bad_requests(layer, arguments, error, match):
    arguments = {"example_inputs": planted_inputs(), "table": table(), **arguments}
    if match is None:
        arguments["ranks"] = [33]
        match = "rank 33 is outside 1 to 32"
    with pytest.raises(error, match=match):
        rankopt.profile(planted_model(), layer, **arguments)


def test_tables_that_are_none():
    model, inputs = planted_model(), planted_inputs()
    for ask in (
        lambda: rankopt.search(model, "latency<=90%", example_inputs=inputs, profile="x.sqlite"),
        lambda: rankopt.soften(model, "latency<=90%", example_inputs=inputs, profile="x.sqlite"),
        lambda: rankopt.study(
            model, evaluate=len, objective="latency", example_inputs=inputs, storage=None,
            profile="x.sqlite",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"profile='x.sqlite': expected a .*ProfileTable"):
            ask()


def test_plots_are_pages(tmp_path):
    pytest.importorskip("plotly")
    path = tmp_path / "p.html"
    wide(table(multiple=256)).plot(path)
    page = path.read_text(encoding="utf-8")
    assert "rank 256" in page
    assert "time, ms" in page
    assert "cliff" in page
    widest = max(
        len(line)
        for line in re.search(r'"subtitle":{.*?"text":"(.*?)"', page)[1].split("\\u003cbr\\u003e")
    )
    assert widest <= 125  # longer lines would leave the page
    with pytest.raises(RankoptError, match=r"end the name in \.html"):
        wide().plot(tmp_path / "p.png")


def test_plots_need_plotly(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "plotly.graph_objects", None)
    with pytest.raises(MissingDependency, match="pip install plotly"):
        wide(ranks=[8]).plot(tmp_path / "p.html")


def test_from_the_shell(tmp_path, capsys):
    source = tmp_path / "shell_models.py"
    source.write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Conv2d(8, 16, 3))\n"
    )
    spec = f"{source}:build"
    arguments = ["profile", spec, "--layer", "0", "--ranks", "4:16:4", "--rounds", "3"]
    assert main([*arguments, "--input", "1,8,6,6", "--channels-last", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["ranks"] for row in found["rows"]] == [[2, 4], [4, 8], [6, 12], [8, 16]]
    assert found["conditions"]["memory_format"] == "channels_last"
    assert main([*arguments, "--input", "1,8,6,6", "--training"]) == 0
    assert "training" in capsys.readouterr().out
    assert main([*arguments, "--input", "1,8,6,6", "--refresh", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] > 0
    assert main([*arguments, "--input", "1,8,6,6", "--cuda-graph"]) == 1
    assert "cuda_graph=True needs a CUDA device; what is timed is on cpu" in capsys.readouterr().err
    search, compare = ["search", spec, "--budget", "params<=60%"], ["compare", spec, "plan.json"]
    for command in ([*arguments, "--input", "1,8,6,6"], search, compare):
        assert main([*command, "--device", "cuda:99"]) == 1
        assert "--device cuda:99: " in capsys.readouterr().err
    assert main(arguments) == 1
    assert "profile needs --input" in capsys.readouterr().err
    assert main([*arguments, "--input", "1,8,6,6", "--ranks", "a"]) == 1
    assert "--ranks 'a'" in capsys.readouterr().err


class Routed(nn.Module):
    """Two experts, one of which no row is sent to; autocast of its own where asked for."""

    def __init__(self, *, autocast=False):
        super().__init__()
        self.first, self.autocast = nn.Linear(64, 64), autocast
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            hidden = self.first(x)
            return self.experts[0](hidden) + self.experts[1](hidden[:0]).sum()


@pytest.mark.parametrize("autocast", [False, True])
def test_layers_without_work_and_autocast_inside_the_model(autocast):
    model, inputs = Routed(autocast=autocast).eval(), torch.zeros(32, 64)
    plan = rankopt.search(
        model, None, strategy="profiled", example_inputs=inputs, profile=table(overhead_ms=0)
    )
    assert plan["experts.0"].method == "svd"
    assert "example_inputs give it nothing to compute" in plan["experts.1"].reason
    plan = rankopt.search(
        model, "latency<=90%", example_inputs=inputs, profile=table(overhead_ms=0)
    )
    assert "experts.1" not in {decision.targets[0] for decision in plan.changes}
    with pytest.raises(LayerError, match=r"layer experts.1: .* give it nothing to compute"):
        rankopt.profile(model, "experts.1", example_inputs=inputs, table=table())
    with pytest.raises(LayerError, match="give it nothing to compute"):
        rankopt.profile(model, "first", example_inputs=inputs[:0], table=table())

"""`rankopt recover`, ranks rounded as the shell says, and errors that name its options."""

from __future__ import annotations

import json

import pytest
import torch

import rankopt
from rankopt.cli import main
from rankopt.errors import BudgetError, RankoptWarning
from rankopt.training.repair import MOST_RISE

MODELS = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))

def train():
    torch.manual_seed(0)
    return [(torch.randn(32, 48), torch.randint(10, (32,))) for _ in range(3)]
"""


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(MODELS)
    return f"{path}:build"


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_recover(spec, tmp_path, capsys):
    plan, small, out = (tmp_path / n for n in ("p.json", "s.safetensors", "o.safetensors"))
    assert run("search", spec, "--budget", "params<=60%", "-o", plan) == 0
    assert run("apply", spec, plan, "-o", small) == 0
    capsys.readouterr()
    data = ("--calibration", spec.replace(":build", ":train"), "--seconds", 1, "--batch-size", 16)
    assert run("recover", spec, small, *data, "-o", out) == 0
    text = capsys.readouterr().out
    assert "divergence from the teacher on held-out inputs" in text
    assert f"{out} written" in text
    assert rankopt.load_plan(out) == rankopt.load_plan(small)
    assert run("recover", spec, out, *data, "-o", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["output"] == str(out)
    assert found["after"] <= (1 + MOST_RISE) * found["before"]
    with pytest.warns(RankoptWarning, match="other weights.*trained towards the wrong outputs"):
        assert run("recover", spec, small, *data, "-o", out, "--seed", 1) == 0
    assert run("recover", spec, small, *data, "-o", tmp_path / "out.pt") == 1
    assert "name the file *.safetensors" in capsys.readouterr().err


def test_rounding(spec, tmp_path, capsys):
    ranks = []
    for rounding in ("down", "up"):
        rounded = ("--round-to", 4, "--rounding", rounding)
        asked = ("--strategy", "parameter_ratio", "--set", "ratio=2.5", *rounded, "--json")
        assert run("search", spec, *asked) == 0
        decisions = json.loads(capsys.readouterr().out)["decisions"]
        ranks.append([d["args"]["ranks"] for d in decisions])
    assert ranks == [[[8], [4]], [[12], [4]]]


def test_errors_name_arguments_in_python_and_options_in_the_shell(spec, capsys):
    model = torch.nn.Linear(48, 48)
    with pytest.raises(BudgetError, match="needs example_inputs") as found:
        rankopt.search(model, "macs<=50%")
    assert "--" not in str(found.value)
    assert "--" not in rankopt.compare(model, model).verdict
    assert run("search", spec, "--budget", "macs<=50%") == 1
    assert (
        "\nrankopt: on the command line: --input SHAPE, such as --input 1,3"
        in capsys.readouterr().err
    )
    assert run("search", spec, "--budget", "params<=50%", "--strategy", "optuna") == 1
    assert "needs evaluate=\nrankopt: on the command line: --evaluate" in capsys.readouterr().err

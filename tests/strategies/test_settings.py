"""Settings of the wrong type, as `--set KEY=VALUE` may give, get a sentence that names them."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest

import rankopt
from rankopt.cli import main
from rankopt.errors import RankoptError
from rankopt_strategies.relaxed import RelaxedSettings

WRONG = ("x", "", [1], ["a"], {"a": 1}, -1, 1.5, None, True, math.nan, math.inf, 10**400)
# What of these a setting may be.
FINE = {
    ("knapsack", "exact"): (True,),
    ("optuna", "n_trials"): (10**400,),
    ("optuna", "storage"): ("x", None),
    ("optuna", "study"): ("x",),
    ("parameter_ratio", "ratio"): (1.5,),
    ("parameter_ratio", "beta"): (1.5, None),
    ("parameter_ratio", "overrides"): ({"a": 1},),
    ("profiled", "base"): ("x", ""),  # a name, refused when it is looked up
    ("relaxed", "rounds"): (10**400,),
    ("relaxed", "batch_size"): (10**400,),
    ("relaxed", "temperature"): (1.5,),
    ("relaxed", "data"): (None,),
    ("relaxed", "criterion"): (None,),
    ("relaxed", "log"): ("x", None),
    ("relaxed", "tensorboard"): ("x", None),
    ("relaxed", "folder"): ("x", None),
}
SETTINGS = [
    (name, field.name)
    for name in ("energy", "knapsack", "optuna", "parameter_ratio", "profiled", "relaxed", "vbmf")
    for field in fields(rankopt.strategies.get(name))
]


@pytest.mark.parametrize(("name", "setting"), SETTINGS)
def test_wrong_types(name, setting):
    for value in WRONG:
        if value in FINE.get((name, setting), ()):
            rankopt.strategies.create(name, **{setting: value})
            continue
        with pytest.raises((ValueError, RankoptError), match=rf"{setting}|objective='task'"):
            rankopt.strategies.create(name, **{setting: value})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("paper=3", "paper=3: expected a RelaxedSettings, or a mapping of its settings"),
        ("paper=null", "paper=None: expected a RelaxedSettings"),
        ('paper={"lo": 1}', "paper has no setting lo; it has low, high, step"),
        ('paper={"low": "x"}', "low='x': expected an integer of at least 1"),
        ("log=[1]", r"log=[1]: expected a path, or None"),
        ("rounds=many", "rounds='many': expected an integer of at least 1"),
    ],
)
def test_settings_of_relaxed_from_the_shell(tmp_path, capsys, text, message):
    model = tmp_path / "nets.py"
    model.write_text("import torch\ndef net():\n    return torch.nn.Linear(32, 32)\n")
    asked = ["search", f"{model}:net", "--budget", "params<=60%", "--strategy", "relaxed"]
    assert main([*asked, "--set", text]) == 1
    assert message in capsys.readouterr().err


def test_settings_of_the_published_search_from_a_mapping():
    made = rankopt.strategies.create("relaxed", paper={"low": 5, "step": 5})
    assert made.paper == RelaxedSettings(low=5, step=5)


def test_base_settings_of_profiled():
    with pytest.raises(ValueError, match=r"base=.*'settings': 3.*expected a mapping"):
        rankopt.strategies.create("profiled", base={"name": "energy", "settings": 3})


def test_a_tensorboard_folder_that_is_a_file(tmp_path):
    pytest.importorskip("tensorboard")
    import torch

    (tmp_path / "events").write_text("in the way")
    relaxed = rankopt.strategies.create("relaxed", tensorboard=str(tmp_path / "events"))
    with pytest.raises(RankoptError, match="cannot write tensorboard="):
        rankopt.search(torch.nn.Linear(32, 32), "params<=60%", strategy=relaxed)

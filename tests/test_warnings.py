"""Warnings name the line that called rankopt, so that each one is seen."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import rankopt
from rankopt.errors import RankoptWarning, warn
from rankopt.testing import planted_inputs, planted_model
from rankopt_strategies import Knapsack

# A layer that warns as rankopt's own code does, below whatever frames of torch lead there.
INSIDE = """
class Warns(nn.BatchNorm1d):
    def forward(self, x):
        warn("from within")
        return super().forward(x)
"""


def warning_model():
    names = {"__name__": "rankopt.inside", "nn": nn, "warn": warn}
    exec(INSIDE, names)
    return nn.Sequential(nn.Linear(32, 32), names["Warns"](32))


def compare():
    model = warning_model().eval()
    rankopt.compare(model, model, example_inputs=torch.randn(4, 32), rounds=3)


def recalibrate():
    rankopt.recalibrate(warning_model(), [torch.randn(4, 32)])


def probe():
    rankopt.search(warning_model(), "params<=80%", example_inputs=torch.randn(4, 32))


def search():
    small = rankopt.apply(planted_model(), rankopt.search(planted_model(), "params<=60%"))
    rankopt.search(small, "params<=90%")


def apply():
    plan = rankopt.search(planted_model(), "params<=60%")
    other = planted_model()
    nn.init.ones_(other.head.weight)
    rankopt.apply(other, plan)


class Ragged(nn.Module):
    """Gives as many rows as its values say."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 32))

    def forward(self, x):
        y = self.body(x)
        return y[: 1 + int(y.abs().sum() * 1e4) % 7]


def strategy():
    data = [torch.randn(8, 32) for _ in range(4)]
    rankopt.search(Ragged(), "params<=80%", strategy=Knapsack(), calibration=data)


@pytest.mark.parametrize("call", [compare, recalibrate, probe, search, apply, strategy])
def test_the_callers_line_is_named(call):
    torch.manual_seed(0)
    with pytest.warns(RankoptWarning) as seen:
        call()
    first = call.__code__.co_firstlineno
    for warning in seen:
        assert warning.filename == __file__
        assert first < warning.lineno <= first + 5


def test_each_line_of_a_program_is_warned():
    plan = rankopt.search(planted_model(), "params<=60%")
    other = copy.deepcopy(planted_model())
    nn.init.ones_(other.head.weight)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(2):  # Python's rule: once per line
            rankopt.apply(other, plan)
        rankopt.apply(other, plan)(planted_inputs())
    assert len(seen) == 2


def test_the_shell_says_them_in_a_sentence(tmp_path):
    """Without the line of the launcher that Python would name."""
    (tmp_path / "nets.py").write_text(
        "from torch import nn\nfrom rankopt.errors import warn\n"
        "def build():\n    warn('look out')\n    return nn.Linear(64, 64)\n"
    )
    command = [
        sys.executable,
        "-m",
        "rankopt",
        "search",
        "nets.py:build",
        "--budget",
        "params<=50%",
    ]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stderr == "rankopt: warning: look out\n"

"""The README's snippets, the docstrings' examples and the example scripts run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import rankopt
import rankopt_strategies

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_snippets(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(snippets) >= 4
    try:
        for snippet in snippets:
            exec(compile(snippet, "README.md", "exec", dont_inherit=True), namespace)
    finally:
        rankopt.strategies.unregister("uniform")
    assert (tmp_path / "plan.json").exists()
    assert "latency" in capsys.readouterr().out


def test_readme_names_every_strategy():
    for name in rankopt.strategies.names():
        assert f"| `{name}`" in README


def test_readme_commands_parse():
    from rankopt.cli import _parser

    commands = re.findall(r"^\$ rankopt (.*)$", README, flags=re.MULTILINE)
    assert len(commands) >= 5
    import shlex

    for command in commands:
        _parser().parse_args(shlex.split(command))


def modules():
    for package in (rankopt, rankopt_strategies):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            yield info.name


@pytest.mark.parametrize("name", sorted(modules()))
def test_docstring_examples(name):
    module = importlib.import_module(name)
    shared = {"torch": torch, "nn": nn, "np": np, "rankopt": rankopt}
    failures, _ = doctest.testmod(module, extraglobs=shared)
    assert not failures


SLOW_EXAMPLES = {
    "digits_in_one_call.py",
    "soft_ranks.py",
    "vision_transformer.py",
}  # they train a network


def example(path):
    slow = [pytest.mark.slow] if path.name in SLOW_EXAMPLES else []
    return pytest.param(path, id=path.name, marks=slow)


@pytest.mark.parametrize(
    "path", [example(path) for path in sorted((ROOT / "examples").glob("*.py"))]
)
def test_examples(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")

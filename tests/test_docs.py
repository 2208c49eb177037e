"""The documents' snippets and commands, the docstrings' examples and the example scripts run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import rankopt
import rankopt_strategies
from rankopt.cli import _parser

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *GUIDES, *(ROOT / name for name in ("CONTRIBUTING.md", "benchmarks/README.md"))]


def page(path):
    return pytest.param(path, id=str(path.relative_to(ROOT)))


def blocks(path, language):
    text = path.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path):
    """What GitHub makes of the page's headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture
def registries():
    """Forget what a page registers."""
    kinds = (rankopt.strategies, rankopt.decompositions)
    before = [set(kind.names()) for kind in kinds]
    yield
    for kind, known in zip(kinds, before, strict=True):
        for name in set(kind.names()) - known:
            kind.unregister(name)


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("path", [page(p) for p in PAGES if blocks(p, "python")])
def test_snippets(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for snippet in blocks(path, "python"):
        exec(compile(snippet, path.name, "exec", dont_inherit=True), namespace)


def test_every_guide_but_the_index_and_the_shell_has_snippets():
    without = {path.name for path in GUIDES if not blocks(path, "python")}
    assert without == {"README.md", "cli.md"}


@pytest.mark.parametrize("path", [page(p) for p in PAGES if blocks(p, "console")])
def test_commands_parse(path):
    text = "".join(blocks(path, "console"))
    for command in re.findall(r"^\$ rankopt (.*)$", text, flags=re.MULTILINE):
        _parser().parse_args(shlex.split(command, comments=True))


@pytest.mark.parametrize("path", [page(path) for path in PAGES])
def test_benchmarks_exist(path):
    for name in re.findall(r"python -m benchmarks\.(\w+)", path.read_text(encoding="utf-8")):
        assert (ROOT / "benchmarks" / f"{name}.py").exists(), name


@pytest.mark.parametrize("path", [page(path) for path in [*PAGES, ROOT / "CHANGELOG.md"]])
def test_links(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("registry", ["strategies", "decompositions"])
def test_readme_names_everything_registered(registry):
    for name in getattr(rankopt, registry).names():
        assert f"| `{name}`" in README.read_text(encoding="utf-8")


def test_every_guide_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for path in GUIDES:
        assert path.name == "README.md" or f"({path.name})" in index


def test_every_public_name_is_documented():
    text = "".join(path.read_text(encoding="utf-8") for path in (README, *GUIDES))
    documented = set(re.findall(r"(?:`(?:rankopt\.)?|rankopt\.)(\w+)", text))
    assert set(rankopt.__all__) <= documented


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

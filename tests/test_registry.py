from __future__ import annotations

import dataclasses
import inspect
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import rankopt
from rankopt.errors import RegistryError
from rankopt.registry import Registry
from rankopt.strategy import Strategy


def registry(*points):
    made = Registry("no.such.group", "strategy", Strategy)
    found = {}
    for name, value in points:
        found.setdefault(name, []).append(EntryPoint(name, value, "no.such.group"))
    made.__dict__["_installed"] = found
    return made


def test_built_in_names():
    assert {"energy", "parameter_ratio", "vbmf"} <= set(rankopt.strategies.names())
    assert {"svd", "tucker2"} <= set(rankopt.decompositions.names())
    assert rankopt.strategies.origin("energy") == "rankopt"
    assert list(rankopt.strategies) == list(rankopt.strategies.names())
    assert "svd" in rankopt.decompositions
    assert len(rankopt.decompositions) == len(rankopt.decompositions.names())
    assert "rankopt.strategies: energy, knapsack" in repr(rankopt.strategies)


def test_a_class_is_no_strategy_yet():
    cls = rankopt.strategies.get("energy")
    with pytest.raises(RegistryError, match=r"Energy is the class of a strategy.*write Energy\(\)"):
        rankopt.strategies.create(cls)


def test_registering_in_this_process():
    made = registry(("energy", "rankopt_strategies.energy:Energy"))

    @made.register("mine")
    @dataclasses.dataclass(frozen=True)
    class Mine(Strategy):
        name = "mine"
        amount: int = 1

        def search(self, problem):
            raise NotImplementedError

    assert made.names() == ("energy", "mine")
    assert made.create("mine", amount=3).amount == 3
    for taken in ("mine", "energy"):
        with pytest.raises(RegistryError, match=f"'{taken}' is registered already by"):
            made.register(taken)(Mine)
    with pytest.raises(RegistryError, match="has no setting nope; it has amount"):
        made.create("mine", nope=1)
    with pytest.raises(RegistryError, match="made already"):
        made.create(Mine(), amount=2)
    made.unregister("mine")
    assert made.names() == ("energy",)


def test_duplicates_name_both():
    made = registry(("x", "one:A"), ("x", "two:B"))
    with pytest.raises(RegistryError, match="'x' is provided by one:A and two:B"):
        made.get("x")


def test_broken_plug_ins_do_not_break_others():
    made = registry(("bad", "no_such_module:A"), ("wrong", "math:pi"), ("type", "json:JSONDecoder"),
                    ("energy", "rankopt_strategies.energy:Energy"))  # fmt: skip
    with pytest.raises(RegistryError, match="'bad' of no_such_module:A failed to import: Module"):
        made.get("bad")
    for name in ("wrong", "type"):
        with pytest.raises(RegistryError, match="not a subclass of rankopt.strategy.base.Strategy"):
            made.get(name)
    assert made.get("energy").name == "energy"
    with pytest.raises(RegistryError, match="unknown strategy 'engery'; known: bad, energy"):
        made.get("engery")


def test_no_public_name_hides_a_module():
    """`import rankopt.NAME` and `rankopt.NAME` are the same thing."""
    folder = Path(rankopt.__file__).parent
    modules = {path.stem for path in folder.glob("*.py")} | {
        path.parent.name for path in folder.glob("*/__init__.py")
    }
    for name in set(rankopt.__all__) & modules:
        assert inspect.ismodule(getattr(rankopt, name)), name


def test_a_plug_in_that_leaves_python_breaks_no_others(tmp_path, monkeypatch):
    (tmp_path / "leaving_plug_in.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(str(tmp_path))
    made = registry(("leaving", "leaving_plug_in:X"))
    with pytest.raises(RegistryError, match="failed to import: SystemExit: 3"):
        made.get("leaving")


def test_plug_ins_that_cannot_be_made_and_names_that_are_none():
    made = registry()

    @made.register("abstract")
    class Abstract(Strategy):
        name = "abstract"

    with pytest.raises(RegistryError, match="'abstract' of .* cannot be made: Can't instantiate"):
        made.create("abstract")
    with pytest.raises(RegistryError, match="register takes the name of a strategy"):
        made.register(Abstract)

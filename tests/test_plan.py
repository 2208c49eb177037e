from __future__ import annotations

import dataclasses
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankopt import Budget, Decision, RankPlan
from rankopt.errors import PlanError, RankoptError
from rankopt.plan import Factors

MERGE = Decision(
    targets=("layer1.0.conv1", "layer1.0.conv2", "layer1.0.conv3"),
    shapes=((64, 256, 1, 1), (64, 64, 3, 3), (256, 64, 1, 1)),
    method="merge",
    args={"ranks": [32, 32], "nonlinearity": "keep", "fit": "ridge"},
    reason="saves 55% of the block",
    cost={"params": (69632, 25600), "macs": (218103808, 80281600)},
    error=0.21,
    factors=Factors("whitened+output", "ab" * 32),
)
PACKED = Decision(
    targets=("encoder.attn.q", "encoder.attn.k", "encoder.attn.v"),
    shapes=((64, 64),) * 3,
    method="svd",
    args={"ranks": [24], "packed": True},
    cost={"params": (12288, 6144)},
    error=0.1,
)
BRANCHED = Decision(
    targets=("conv",),
    shapes=((64, 64, 3, 3),),
    method="branched_tucker",
    args={"ranks": [32, 32], "branches": 2, "init": "deflate"},
    error=0.279,
    factors=Factors("learned", "cd" * 32),
)
KEPT = Decision(("fc",), ((10, 64),), "keep", reason="keep: slower than dense", error=0.0)


def plan_of(*decisions):
    return RankPlan(
        model={"class": "Net", "structure": "x", "weights": "y"},
        decisions=decisions,
        budget=Budget(macs=0.5),
        strategy={"name": "energy", "settings": {"threshold": 0.9}, "seed": 0},
        environment={"torch": "2.13.0"},
        seconds=1.5,
        totals={"macs": {"before": 100, "predicted": 49, "measured": 49}},
        extensions={"note": {"anything": [1, 2.5, None]}},
    )


FULL = plan_of(MERGE, PACKED, BRANCHED, KEPT)


def test_every_form_of_decision_round_trips(tmp_path):
    path = tmp_path / "plan.json"
    FULL.save(path)
    assert RankPlan.load(path) == FULL
    assert list(tmp_path.iterdir()) == [path]


def test_reads_well_in_a_diff():
    lines = FULL.to_json().splitlines()
    assert '      "args": {"ranks": [24], "packed": true},' in lines
    assert max(map(len, lines)) < 130


def test_prints_as_a_table():
    assert repr(FULL) == (
        "<RankPlan of Net, energy, macs at most 50% of the original model: 3 of 4 sites changed>"
    )
    text = str(FULL)
    assert "layer1.0.conv1" in text
    assert "64x64x3x3" in text
    assert "32 x 32" in text
    assert "49.00%" in text
    assert "3 sites decomposed" in text
    one = plan_of(PACKED, KEPT)
    totals = {"memory": {"before": 4096, "predicted": 2048, "measured": None}}
    text = str(dataclasses.replace(one, totals=totals))
    assert "1 site decomposed" in text
    assert "2.05 kB" in text
    assert len(FULL) == len(list(FULL)) == 4


def test_lookup():
    assert FULL["layer1.0.conv2"] is MERGE
    assert FULL.changes == (MERGE, PACKED, BRANCHED)
    with pytest.raises(KeyError, match="no decision covers layer 'nope'"):
        FULL["nope"]


names = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=8)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
)


@given(
    st.lists(
        st.tuples(names, st.lists(st.integers(1, 9), min_size=1, max_size=4), scalars),
        unique_by=lambda t: t[0],
        min_size=1,
        max_size=4,
    )
)
def test_any_plan_round_trips(rows):
    decisions = tuple(
        Decision((name,), (tuple(ranks),), "m", {"ranks": ranks, "extra": extra}, error=0.5)
        for name, ranks, extra in rows
    )
    plan = plan_of(*decisions)
    assert RankPlan.from_json(plan.to_json()) == plan


def edited(change):
    values = json.loads(FULL.to_json())
    change(values)
    return json.dumps(values)


def set_in(*path, value):
    def change(values):
        for key in path[:-1]:
            values = values[key]
        values[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (set_in("schema", value="rankopt.plan/9"), "'rankopt.plan/9': this rankopt reads"),
        (set_in("surprise", value=1), "unknown surprise; .*'extensions'"),
        (set_in("decisions", 0, "surprise", value=1), "layer1.0.conv1.*unknown surprise"),
        (set_in("decisions", 1, "args", value={"ranks": [0]}), "encoder.attn.q.*rank 0"),
        (set_in("decisions", 1, "args", value={"ranks": [2.5]}), "rank 2.5: ranks are integers"),
        (set_in("decisions", 1, "args", value={"ranks": [True]}), "rank True"),
        (set_in("decisions", 1, "args", value={"ranks": "12"}), "is not a list"),
        (set_in("decisions", 1, "error", value=-1.0), "error -1.0"),
        (set_in("decisions", 1, "cost", value={"params": 3}), "encoder.attn.q.*malformed"),
        (set_in("decisions", 3, "targets", value=["conv"]), "layer conv: covered by two"),
        (set_in("decisions", 3, "targets", value=[]), "without targets"),
        (set_in("decisions", 3, "targets", value="0"), "expected a list, got '0'"),
        (set_in("decisions", 3, "shapes", value=[[64, 64.5]]), "expected a int, got 64.5"),
        (set_in("decisions", 1, "error", value=True), "expected a finite number, got True"),
        (set_in("totals", value={"params": 5}), "plan totals of params: expected a dict"),
        (set_in("totals", "macs", "before", value="x"), "totals of macs: .* got 'x'"),
        (lambda v: v["totals"]["macs"].pop("measured"), "totals of macs: missing measured"),
        (set_in("totals", "macs", "after", value=1), "totals of macs: unknown after"),
        (set_in("decisions", 3, "shapes", value=[]), "1 targets but 0 shapes"),
        (set_in("decisions", 2, "factors", value={"kind": "weights", "digest": "ab"}), "digest"),
        (set_in("decisions", 2, "factors", value={"kind": "magic"}), "factors kind 'magic'"),
        (set_in("decisions", value="none"), "expected a list"),
        (set_in("budget", value={"macs": 7}), "plan budget: .*macs=7"),
        (lambda v: v.pop("totals"), "missing totals"),
    ],
)
def test_damaged_plans(change, match):
    with pytest.raises(PlanError, match=match):
        RankPlan.from_json(edited(change))


def test_numbers_are_finite():
    text = FULL.to_json().replace("0.21", "NaN")
    with pytest.raises(PlanError, match="holds NaN"):
        RankPlan.from_json(text)


def test_truncated_missing_and_foreign_files(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(FULL.to_json()[:300])
    with pytest.raises(PlanError, match=r"plan.json: .*no valid JSON.*truncated"):
        RankPlan.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="not UTF-8"):
        RankPlan.load(path)
    with pytest.raises(PlanError, match="cannot read plan"):
        RankPlan.load(tmp_path / "missing.json")
    with pytest.raises(PlanError, match="a plan is a JSON object"):
        RankPlan.from_json("[1]")
    with pytest.raises(PlanError, match="nested too deeply"):
        RankPlan.from_json("[" * 100_000)


def test_unwritable_folder(tmp_path):
    with pytest.raises(RankoptError, match="cannot write .*choose a folder that exists"):
        FULL.save(tmp_path / "missing" / "plan.json")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a file system it may remount")
def test_unwritable_folder_of_proc():
    with pytest.raises(RankoptError, match="cannot write /proc/plan.json"):
        FULL.save("/proc/plan.json")


def test_files_are_synced_through_a_handle_that_may_write(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    modes = []
    monkeypatch.setattr(os, "fsync", lambda fd: modes.append(fcntl.fcntl(fd, fcntl.F_GETFL)))
    FULL.save(tmp_path / "plan.json")
    assert [mode & os.O_ACCMODE for mode in modes] == [os.O_RDWR]


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(RankoptError, match="No space left"):
        FULL.save(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]

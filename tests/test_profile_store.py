from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import warnings

import pytest

from rankopt._timing.profile_store import CONDITIONS, SCHEMA_VERSION, ProfileStore, cache_folder
from rankopt.errors import RankoptWarning

HERE = dict.fromkeys(CONDITIONS, "x")


def rows(path, layer="layer"):
    store = ProfileStore(path)
    try:
        return store.rows(HERE, layer)
    finally:
        store.close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "profile.sqlite"


def filled(path, layer="layer", **values):
    store = ProfileStore(path)
    store.put(HERE, layer, values or {"dense": {"ms": [1.0]}})
    store.close()


def test_what_is_put_is_found_again_under_the_same_conditions(path):
    filled(path, dense={"ms": [1.0, 2.0]}, svd={"ms": [0.5]})
    assert rows(path) == {"dense": {"ms": [1.0, 2.0]}, "svd": {"ms": [0.5]}}
    assert rows(path, "another") == {}
    store = ProfileStore(path)
    for column in CONDITIONS:
        assert store.rows({**HERE, column: "y"}, "layer") == {}
    store.put(HERE, "layer", {"svd": {"ms": [0.25]}})
    assert store.rows(HERE, "layer")["svd"] == {"ms": [0.25]}
    store.close()


def test_the_file_uses_write_ahead_logging_and_a_version(path):
    filled(path)
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert connection.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION
    connection.close()


def damage(path, how):
    if how == "no database":
        path.write_bytes(b"not a database at all" * 100)
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    else:
        statement = {
            "newer": f"PRAGMA user_version = {SCHEMA_VERSION + 1}",
            "another program": "PRAGMA application_id = 7",
            "no table": "DROP TABLE timings",
        }[how]
        connection = sqlite3.connect(path)
        connection.execute(statement)
        connection.commit()
        connection.close()


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("no database", "not a database"),
        ("newer", f"schema {SCHEMA_VERSION + 1} is newer than this rankopt's {SCHEMA_VERSION}"),
        ("another program", "another program"),
        ("no table", "table is missing"),
    ],
)
def test_unusable_files_are_set_aside(path, how, why):
    filled(path)
    damage(path, how)
    before = path.read_bytes()
    with pytest.warns(RankoptWarning, match=f"cannot be used .*{why}.*renamed to"):
        assert rows(path) == {}
    (kept,) = path.parent.glob("*.set-aside-*")
    assert kept.read_bytes() == before
    filled(path)
    assert rows(path) == {"dense": {"ms": [1.0]}}


def test_damage_found_while_reading(path):
    filled(path, **{f"chain{i}": {"ms": [float(j) for j in range(200)]} for i in range(40)})
    damage(path, "truncated")
    with pytest.warns(RankoptWarning, match="set-aside"):
        assert rows(path) == {}
    filled(path)
    assert rows(path)


def test_a_row_that_is_no_json_is_left_out(path):
    filled(path, svd={"ms": [0.5]}, dense={"ms": [1.0]})
    connection = sqlite3.connect(path)
    connection.execute("UPDATE timings SET value = '{' WHERE chain = 'svd'")
    connection.commit()
    connection.close()
    assert rows(path) == {"dense": {"ms": [1.0]}}


def test_a_file_that_another_process_has_begun_anew_is_left_alone(path, monkeypatch):
    path.parent.mkdir()
    path.write_bytes(b"not a database at all" * 100)
    set_aside = ProfileStore._set_aside
    faster = []

    def late(self, *found):
        monkeypatch.setattr(ProfileStore, "_set_aside", set_aside)
        faster.append(ProfileStore(path))
        faster[0].put(HERE, "layer", {"theirs": {"ms": [1.0]}})
        set_aside(self, *found)

    monkeypatch.setattr(ProfileStore, "_set_aside", late)
    with pytest.warns(RankoptWarning, match="not a database"):
        store = ProfileStore(path)
    store.put(HERE, "layer", {"ours": {"ms": [2.0]}})
    faster[0].put(HERE, "layer", {"later": {"ms": [3.0]}})
    assert set(store.rows(HERE, "layer")) == {"theirs", "ours", "later"}
    for one in (store, *faster):
        one.close()
    assert len(list(path.parent.glob("*.set-aside-*"))) == 1


def test_damage_while_in_use(path):
    store = ProfileStore(path)
    store.put(HERE, "layer", {"dense": {"ms": [1.0]}})
    store._connection.execute("DROP TABLE timings")
    with pytest.warns(RankoptWarning, match="table is missing"):
        store.put(HERE, "layer", {"dense": {"ms": [2.0]}})
    assert store.rows(HERE, "layer") == {"dense": {"ms": [2.0]}}
    store.close()


def test_a_folder_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.warns(RankoptWarning, match=r"cannot be written.*in memory.*RANKOPT_CACHE"):
        store = ProfileStore(blocked / "cache" / "profile.sqlite")
    store.put(HERE, "layer", {"dense": {"ms": [1.0]}})
    assert store.rows(HERE, "layer") == {"dense": {"ms": [1.0]}}
    store.close()


def test_a_read_only_folder(path, monkeypatch):
    filled(path)

    def refuse(*_, **__):
        raise sqlite3.OperationalError("attempt to write a readonly database")

    monkeypatch.setattr("rankopt._timing.profile_store._write_ahead", refuse)
    with pytest.warns(RankoptWarning, match="readonly"):
        store = ProfileStore(path)
    store.put(HERE, "layer", {"dense": {"ms": [1.0]}})
    assert store.rows(HERE, "layer")
    store.close()
    assert list(path.parent.glob("*set-aside*")) == []


WRITER = """
import sys, warnings
warnings.simplefilter("error")
from rankopt._timing.profile_store import CONDITIONS, ProfileStore
store = ProfileStore(sys.argv[1])
here = dict.fromkeys(CONDITIONS, "x")
print("ready", flush=True)
sys.stdin.readline()
for i in range(int(sys.argv[3])):
    store.put(here, "layer", {f"{sys.argv[2]}-{i}": {"ms": [float(i)]}})
    assert f"{sys.argv[2]}-{i}" in store.rows(here, "layer")
"""


def writer(path, name, count):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(path), name, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_several_processes_write_one_file_and_one_is_killed(path):
    path.parent.mkdir()
    processes = [writer(path, name, 8) for name in "ab"]
    killed = writer(path, "k", 100_000)
    for process in (*processes, killed):
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.wait(60) for process in processes] == [0, 0]
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    for process in (*processes, killed):
        process.stdin.close()
        process.stdout.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = rows(path)
    for name in "ab":
        assert all(found[f"{name}-{i}"] == {"ms": [float(i)]} for i in range(8))


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("RANKOPT_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("RANKOPT_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "rankopt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder().parts[-2:] == (".cache", "rankopt")
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_folder().parts[-3:] == ("Library", "Caches", "rankopt")

"""What may be written over, and what may not."""

from __future__ import annotations

import os
import stat

import pytest
from torch import nn

import rankopt
from rankopt._utils.files import atomic_path, atomic_paths, check_writable, write_text
from rankopt.errors import RankoptError


def test_links_stay_and_what_they_lead_to_is_written(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old.json").write_text("old")
    for name in ("old.json", "new.json"):  # the second leads to a file that is not there yet
        link = tmp_path / name
        link.symlink_to(folder / name)
        check_writable(link)
        write_text(link, "new")
        assert link.is_symlink()
        assert (folder / name).read_text() == "new"
    with atomic_paths(tmp_path / "old.json") as temporary:
        temporary.write_text("newer")
    assert (folder / "old.json").read_text() == "newer"
    assert sorted(os.listdir(folder)) == ["new.json", "old.json"]


def test_checkpoints_follow_links(tmp_path):
    net = nn.Sequential(nn.Linear(16, 16))
    small = rankopt.apply(net, rankopt.search(net, "params<=60%"))
    link, file = tmp_path / "m.safetensors", tmp_path / "real.safetensors"
    link.symlink_to(file)
    rankopt.save(small, link)
    assert link.is_symlink()
    assert rankopt.load_plan(file) == rankopt.load_plan(link)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no named pipes")
@pytest.mark.parametrize("linked", [False, True])
def test_pipes_are_not_replaced(tmp_path, linked):
    """Devices take the same way; none is at risk here."""
    pipe = path = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    if linked:
        path = tmp_path / "link.json"
        path.symlink_to(pipe)
    for write in (check_writable, lambda p: write_text(p, "x"), lambda p: _several(p)):
        with pytest.raises(RankoptError, match=rf"cannot write {path}: it is a device, pipe"):
            write(path)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert path.is_symlink() is linked


def _several(path):
    with atomic_paths(path):
        pass


def test_folders_are_named_as_such(tmp_path):
    with (
        pytest.raises(RankoptError, match="it is a folder; name a file in it"),
        atomic_path(tmp_path),
    ):
        pass

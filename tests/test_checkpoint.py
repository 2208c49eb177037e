from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import rankopt
from rankopt import checkpoint, export
from rankopt._build.state import cast_unstored
from rankopt.errors import CheckpointError, ModelError, PlanError, RankoptError
from rankopt.testing import planted_inputs, planted_model


@pytest.fixture
def small():
    return rankopt.apply(planted_model(), rankopt.search(planted_model(), "params<=60%"))


def test_round_trip_is_bitwise(small, tmp_path):
    path = tmp_path / "small.safetensors"
    rankopt.save(small, path)
    fresh = planted_model(7)
    again = rankopt.load(fresh, path)
    x = planted_inputs()
    with torch.no_grad():
        assert torch.equal(again(x), small(x))
        assert not torch.equal(fresh(x), small(x))
    assert rankopt.load_plan(path) == small.rankopt_plan
    assert list(tmp_path.iterdir()) == [path]
    rankopt.save(again, path)  # what was loaded can be saved again


def test_dtype_memory_format_and_flags(tmp_path):
    model = planted_model().to(torch.bfloat16).to(memory_format=torch.channels_last)
    small = rankopt.apply(model, rankopt.search(model, "params<=60%", strategy="energy"))
    rankopt.save(small, tmp_path / "s.safetensors")
    fresh = planted_model()
    fresh.head.weight.requires_grad_(False)
    again = rankopt.load(fresh, tmp_path / "s.safetensors")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert again.conv.core.weight.stride() == small.conv.core.weight.stride()
    assert not again.head.first.weight.requires_grad
    assert again.conv.core.weight.requires_grad


def test_trained_weights_are_what_is_saved(small, tmp_path):
    with torch.no_grad():
        small.conv.core.weight.add_(0.5)
    rankopt.save(torch.compile(small, backend="eager"), tmp_path / "s.safetensors")
    again = rankopt.load(planted_model(), tmp_path / "s.safetensors")
    assert torch.equal(again.conv.core.weight, small.conv.core.weight)


def test_shards(small, tmp_path):
    path = tmp_path / "s.safetensors"
    rankopt.save(small, path, max_shard_bytes=4000)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert len(names) > 2
    assert "s.safetensors.index.json" in names
    again = rankopt.load(planted_model(), path)
    assert torch.equal(again(planted_inputs()), small(planted_inputs()))
    assert rankopt.load_plan(path) == small.rankopt_plan
    index = json.loads((tmp_path / "s.safetensors.index.json").read_text())
    (tmp_path / next(iter(index["weight_map"].values()))).unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        rankopt.load(planted_model(), path)


def test_rounded_buffers_outside_the_state_come_back(tmp_path):
    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 32)
            self.register_buffer("angles", torch.linspace(0, 1, 32) / 3, persistent=False)

        def forward(self, x):
            return self.fc(x) * self.angles

    model = Rotary().to(torch.bfloat16)
    small = rankopt.apply(model, rankopt.search(model, "params<=60%"))
    rankopt.save(small, tmp_path / "r.safetensors")
    again = rankopt.load(Rotary(), tmp_path / "r.safetensors")
    x = torch.randn(2, 32).to(torch.bfloat16)
    assert torch.equal(again(x), small(x))


def test_damaged_files(small, tmp_path):
    path = tmp_path / "s.safetensors"
    rankopt.save(small, path)
    whole = path.read_bytes()
    for cut in (4, 100, len(whole) - 10):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="not a complete safetensors file.*truncated"):
            rankopt.load(planted_model(), path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a complete"):
        rankopt.load(planted_model(), path)
    with pytest.raises(CheckpointError, match="does not exist"):
        rankopt.load(planted_model(), tmp_path / "nope.safetensors")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"weight_map": [1]}, "weight_map is no object of texts"),
        ({"weight_map": {"conv.core.weight": 3}}, "weight_map is no object of texts"),
        (
            {"weight_map": {"w": "../x/y.safetensors"}},
            r".*names '\.\./x/.*'; shards lie",
        ),
        ({"weight_map": {"w": ""}}, ".*names ''; shards lie"),
        ({"metadata": []}, "metadata is no object of texts"),
    ],
)
def test_damaged_indices(small, tmp_path, change, match):
    path, index = tmp_path / "s.safetensors", tmp_path / "s.safetensors.index.json"
    rankopt.save(small, path, max_shard_bytes=4000)
    index.write_text(json.dumps({**json.loads(index.read_text()), **change}))
    with pytest.raises(CheckpointError, match=f"index.json is damaged: {match}"):
        rankopt.load(planted_model(), path)
    for text in ("[" * 100_000, "[1]", "{}"):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=r"index.json is damaged"):
            rankopt.load_plan(path)


@pytest.mark.parametrize("name", [".", "..", "folder"])
def test_folders_are_no_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="is a folder"):
        rankopt.load(planted_model(), name)


def rewritten(path, change):
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as handle:
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
        metadata = handle.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda t, m: t.pop("conv.core.weight"), CheckpointError, "lacks conv.core.weight"),
        (lambda t, m: t.update(x=torch.ones(1)), CheckpointError, "holds x, which has no place"),
        (
            lambda t, m: t.update({"conv.core.weight": torch.ones(2)}),
            CheckpointError,
            r"conv.core.weight is \[2\], the model expects",
        ),
        (lambda t, m: m.pop("rankopt.plan"), CheckpointError, "holds no rankopt plan"),
        (lambda t, m: m.update({"rankopt.plan": "{"}), PlanError, "no valid JSON"),
    ],
)
def test_files_that_do_not_fit(small, tmp_path, change, error, match):
    path = tmp_path / "s.safetensors"
    rankopt.save(small, path)
    rewritten(path, change)
    with pytest.raises(error, match=match):
        rankopt.load(planted_model(), path)


@pytest.mark.parametrize("key", ["aliases", "layouts", "buffers"])
@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}'])
def test_damaged_metadata(small, tmp_path, key, text):
    path = tmp_path / "s.safetensors"
    rankopt.save(small, path)
    rewritten(path, lambda tensors, metadata: metadata.update({f"rankopt.{key}": text}))
    with pytest.raises(CheckpointError, match=rf"metadata are damaged: rankopt.{key}: "):
        rankopt.load(planted_model(), path)


def test_a_dtype_that_torch_does_not_know(small):
    small.register_buffer("scale", torch.ones(1), persistent=False)
    cast_unstored(small, {"scale": "float64"})
    assert small.scale.dtype == torch.float64
    for name in ("float1", "nn"):
        with pytest.raises(CheckpointError, match=f"'{name}' is no dtype of torch"):
            cast_unstored(small, {"scale": name})


def test_another_plan_is_refused(small, tmp_path):
    path = tmp_path / "s.safetensors"
    plan = rankopt.search(planted_model(), "params<=80%", strategy="energy")
    with pytest.raises(CheckpointError, match=r"plan= is not the one this .* was built by"):
        rankopt.save(small, path, plan=plan)
    assert not path.exists()
    rankopt.save(small, path, plan=rankopt.RankPlan.from_json(small.rankopt_plan.to_json()))
    assert rankopt.load_plan(path) == small.rankopt_plan


@pytest.mark.parametrize("limit", [None, 0, -1])
def test_shards_have_a_size(small, tmp_path, limit):
    with pytest.raises(ValueError, match=f"max_shard_bytes={limit}: expected an integer"):
        rankopt.save(small, tmp_path / "s.safetensors", max_shard_bytes=limit)


def test_another_architecture(small, tmp_path):
    path = tmp_path / "s.safetensors"
    rankopt.save(small, path)
    other = planted_model()
    other.hidden = nn.Linear(48, 65)
    with pytest.raises(PlanError, match=r"layer hidden: the plan expected a weight \[64, 48\]"):
        rankopt.load(other, path)


def test_what_cannot_be_saved(small, tmp_path):
    with pytest.raises(CheckpointError, match=r"was not built by rankopt.apply.*plan="):
        rankopt.save(planted_model(), tmp_path / "s.safetensors")
    with pytest.raises(CheckpointError, match=r"name the file \*.safetensors"):
        rankopt.save(small, tmp_path / "s.pt")
    with pytest.raises(RankoptError, match="cannot write /proc/s.safetensors"):
        rankopt.save(small, "/proc/s.safetensors")
    small.head.get_extra_state = lambda: {"a": 1}
    small.head.set_extra_state = lambda state: None
    type(small.head).get_extra_state = lambda self: {"a": 1}
    try:
        with pytest.raises(CheckpointError, match=r"extra state of type dict is no tensor"):
            rankopt.save(small, tmp_path / "s.safetensors")
    finally:
        del type(small.head).get_extra_state
    assert not list(tmp_path.iterdir())


def test_a_sharded_save_that_is_cut_short_leaves_the_earlier_one(small, tmp_path, monkeypatch):
    path = tmp_path / "s.safetensors"
    rankopt.save(small, path, max_shard_bytes=4000)
    expected = small(planted_inputs())
    changed = copy.deepcopy(small)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(2)

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_text", killed)  # all shards are written by then
    with pytest.raises(KeyboardInterrupt):
        rankopt.save(changed, path, max_shard_bytes=4000)
    assert torch.equal(rankopt.load(planted_model(), path)(planted_inputs()), expected)
    monkeypatch.undo()
    rankopt.save(changed, path, max_shard_bytes=4000)
    again = rankopt.load(planted_model(), path)
    assert torch.equal(again(planted_inputs()), changed(planted_inputs()))
    named = json.loads((tmp_path / "s.safetensors.index.json").read_text())["weight_map"].values()
    rankopt.save(small, path)
    assert not any((tmp_path / name).exists() for name in named)
    assert torch.equal(rankopt.load(planted_model(), path)(planted_inputs()), expected)


def test_an_index_whose_shards_are_gone_takes_no_new_ones_with_it(small, tmp_path):
    path = tmp_path / "s.safetensors"
    rankopt.save(small, path, max_shard_bytes=4000)
    for shard in tmp_path.glob("s-*.safetensors"):
        shard.unlink()
    rankopt.save(small, path, max_shard_bytes=4000)
    again = rankopt.load(planted_model(), path)
    assert torch.equal(again(planted_inputs()), small(planted_inputs()))


@pytest.mark.parametrize(
    "index", ['{"metadata": {"total_size": 8}, "weight_map": {"w": "m-1.safetensors"}}', "{"]
)
def test_shards_of_another_model_are_left_alone(small, tmp_path, index):
    (tmp_path / "m.safetensors.index.json").write_text(index)
    (tmp_path / "m-1.safetensors").write_bytes(b"weights")
    for limit in (4000, 10**9):
        with pytest.raises(CheckpointError, match=r"index.json belongs to another model"):
            rankopt.save(small, tmp_path / "m.safetensors", max_shard_bytes=limit)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["m-1.safetensors", "m.safetensors.index.json"]


def test_shards_never_replace_files_that_no_index_names(small, tmp_path):
    rankopt.save(small, tmp_path / "s.safetensors", max_shard_bytes=4000)
    (tmp_path / "s.safetensors.index.json").unlink()
    theirs = list(tmp_path.iterdir())
    for path in theirs:
        path.write_bytes(b"weights")
    rankopt.save(small, tmp_path / "s.safetensors", max_shard_bytes=4000)
    assert {path.read_bytes() for path in theirs} == {b"weights"}


def test_a_model_of_another_structure_is_refused(tmp_path):
    dense = nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.Flatten(), nn.Linear(32, 32))
    small = rankopt.apply(dense, rankopt.search(dense, "params<=60%"))
    merged = export.merge_norms(small, torch.randn(1, 16, 3, 3))
    with pytest.raises(CheckpointError, match=r"changed since.*\(1.weight is gone, it was"):
        rankopt.save(merged, tmp_path / "m.safetensors")
    small[3] = nn.Linear(32, 5)
    with pytest.raises(CheckpointError, match=r"changed since.*search on that"):
        rankopt.save(small, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_tensors_that_are_no_plain_ones(small, tmp_path):
    with pytest.raises(CheckpointError, match="is on the meta device"):
        rankopt.save(copy.deepcopy(small).to("meta"), tmp_path / "s.safetensors")
    small.head.weight = nn.Parameter(small.head.weight.to_sparse())
    with pytest.raises(CheckpointError, match=r"head.weight is a .*sparse.*before quantising"):
        rankopt.save(small, tmp_path / "s.safetensors")


def test_a_full_disk_leaves_no_shards(small, tmp_path, monkeypatch):
    import safetensors.torch

    real, written = safetensors.torch.save_file, []

    def failing(tensors, path, metadata):
        written.append(path)
        if len(written) == 3:
            raise safetensors.SafetensorError("No space left on device (os error 28)")
        real(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", failing)
    with pytest.raises(RankoptError, match="cannot write .*-00003-of.*No space left"):
        rankopt.save(small, tmp_path / "s.safetensors", max_shard_bytes=4000)
    assert len(written) == 3
    assert not list(tmp_path.iterdir())


class Counting(nn.Module):
    """A layer with state beside its parameters, which grows."""

    def __init__(self):
        super().__init__()
        self.seen = torch.zeros(0)

    def forward(self, x):
        return x

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state):
        self.seen = state


def test_extra_state_comes_back(tmp_path):
    dense = nn.Sequential(nn.Linear(32, 32), Counting())
    small = rankopt.apply(dense, rankopt.search(dense, "params<=60%"))
    small[1].seen = torch.arange(3)
    rankopt.save(small, tmp_path / "s.safetensors")
    again = rankopt.load(nn.Sequential(nn.Linear(32, 32), Counting()), tmp_path / "s.safetensors")
    assert again[1].seen.tolist() == [0, 1, 2]
    assert not list(again.buffers())


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_layouts_of_1x1_kernels_come_back(tmp_path, layout):
    def build():
        return nn.Sequential(
            nn.Conv2d(64, 64, 1), nn.Conv2d(64, 8, 1), nn.Conv2d(8, 8, 3, groups=8)
        )

    dense = build().to(memory_format=layout)
    small = rankopt.apply(dense, rankopt.search(dense, "params<=60%", only="0"))
    rankopt.save(small, tmp_path / "s.safetensors")
    again = rankopt.load(build(), tmp_path / "s.safetensors")
    assert [p.stride() for p in again.parameters()] == [p.stride() for p in small.parameters()]


class Tied(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.embedding, self.body = nn.Embedding(50, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 50, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.body(self.embedding(x)).relu())


def test_what_was_untied_is_not_lost(tmp_path):
    model, x = Tied().eval(), torch.arange(12).view(3, 4)
    small = rankopt.apply(model, rankopt.search(model, "params<=80%", example_inputs=x))
    rankopt.save(small, tmp_path / "tied.safetensors")
    again = rankopt.load(model, tmp_path / "tied.safetensors")
    assert again.head.weight is again.embedding.weight
    small.head.weight = nn.Parameter(torch.randn_like(small.head.weight))
    rankopt.save(small, tmp_path / "untied.safetensors")
    with pytest.raises(CheckpointError, match=r"other values for head.weight than for embedding"):
        rankopt.load(model, tmp_path / "untied.safetensors")
    with pytest.raises(ModelError, match=r"head.weight has other values than embedding.weight"):
        rankopt.fold(small, model)
    again = rankopt.load(Tied(tied=False), tmp_path / "untied.safetensors")
    assert torch.equal(again(x), small(x))


def test_shards_lie_where_a_link_leads(small, tmp_path):
    (tmp_path / "store").mkdir()
    target, link = tmp_path / "store/model.safetensors", tmp_path / "model.safetensors"
    rankopt.save(small, target)
    link.symlink_to(target)
    with torch.no_grad():
        next(small.parameters()).add_(1)
    rankopt.save(small, link, max_shard_bytes=2000)
    assert [path.name for path in tmp_path.iterdir() if not path.is_dir()] == [link.name]
    assert link.is_symlink()
    x = planted_inputs()
    for path in (link, target):
        assert torch.equal(rankopt.load(planted_model(), path)(x), small(x))

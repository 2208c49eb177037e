"""Unpacked parents compute what the originals compute, in every mode."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import rankopt
from rankopt._build.apply import unpacked_clone
from rankopt._model import surgery
from rankopt._model.layers import find_layers
from rankopt._model.unpack import UnpackedAttention, register
from rankopt.vision import import_torchvision

# Another order of the same float32 sums.
TOLERANCE = 2e-5


def close(a, b):
    return torch.allclose(a, b, atol=TOLERANCE, rtol=TOLERANCE)


MHA = [
    {},
    {"batch_first": True},
    {"bias": False, "batch_first": True},
    {"kdim": 12, "vdim": 20},
    {"add_bias_kv": True, "batch_first": True},
    {"add_zero_attn": True},
]


@pytest.mark.parametrize("settings", MHA, ids=str)
@pytest.mark.parametrize("split", [False, True])
def test_attention(settings, split):
    source = nn.MultiheadAttention(16, 4, **settings).eval()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_(std=0.3)
    unpacked = UnpackedAttention(source, split=split).eval()
    first = settings.get("batch_first", False)
    query = torch.randn((3, 5, 16) if first else (5, 3, 16))
    key = torch.randn((3, 7, source.kdim) if first else (7, 3, source.kdim))
    value = torch.randn((3, 7, source.vdim) if first else (7, 3, source.vdim))
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 5:] = True
    masks = [
        None,
        torch.randn(5, 7),
        torch.rand(5, 7) > 0.7,
        torch.randn(12, 5, 7),
    ]
    masks[2][:, 0] = False
    for mask in masks:
        for pads in (None, padding) if mask is None or mask.dtype == torch.bool else (None,):
            for weights in (True, False):
                arguments = {"attn_mask": mask, "key_padding_mask": pads, "need_weights": weights}
                expected = source(query, key, value, **arguments)
                found = unpacked(query, key, value, **arguments)
                assert close(expected[0], found[0])
                assert (expected[1] is None) == (found[1] is None)
                if weights:
                    assert close(expected[1], found[1])
    heads = source(query, key, value, average_attn_weights=False)[1]
    assert close(heads, unpacked(query, key, value, average_attn_weights=False)[1])
    if source._qkv_same_embed_dim:
        same = source(query, query, query)[0]
        assert close(same, unpacked(query, query, query)[0])
    single = [x[0] if first else x[:, 0] for x in (query, key, value)]
    expected, found = source(*single), unpacked(*single)
    assert close(expected[0], found[0])
    assert close(expected[1], found[1])


def test_causal_hint():
    source = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    unpacked = UnpackedAttention(source).eval()
    x = torch.randn(2, 6, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    for weights in (True, False):
        arguments = {"attn_mask": mask, "is_causal": True, "need_weights": weights}
        assert close(source(x, x, x, **arguments)[0], unpacked(x, x, x, **arguments)[0])


def encoder(**settings):
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors: torch says when it cannot
        return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize("settings", [{}, {"batch_first": True}, {"norm_first": True}], ids=str)
@pytest.mark.parametrize("targets", ["*", "*linear1", "*in_proj", "*out_proj"])
def test_transformer_encoder_runs_in_every_mode(settings, targets):
    model = encoder(**settings)
    shape = (3, 5, 32) if settings.get("batch_first") else (5, 3, 32)
    x = torch.randn(shape)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = True
    full = rankopt.search(model, "params<=90%", only=[targets] if targets != "*" else [])
    assert full.changes
    small = rankopt.apply(model, full)
    for mode in (True, False):
        small.train(mode)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                plain, padded = small(x), small(x, src_key_padding_mask=mask)
                assert plain.isfinite().all()
                assert padded.isfinite().all()
    # Modes agree with one another: there is no fused path left that reads old weights.
    small.eval()
    with torch.no_grad():
        fused = small(x)
    assert close(fused, small(x))


def test_unpacked_encoder_equals_the_original():
    model = encoder(batch_first=True).eval()
    view = unpacked_clone(model)
    x = torch.randn(3, 5, 32)
    with torch.no_grad():
        assert close(model(x), view(x))
    assert all(type(m) is not nn.MultiheadAttention for m in view.modules())


def test_cross_attention_is_split_and_plans_apply():
    model = nn.Transformer(32, 2, 1, 1, 64, dropout=0.0, batch_first=True).eval()
    inputs = (torch.randn(2, 5, 32), torch.randn(2, 4, 32))
    plan = rankopt.search(model, "macs<=60%", example_inputs=inputs)
    names = set(plan.layer_names)
    assert "decoder.layers.0.multihead_attn.q_proj" in names
    assert "decoder.layers.0.self_attn.in_proj" in names
    small = rankopt.apply(model, plan)
    assert rankopt.compare(model, small, example_inputs=inputs, rounds=3).macs.ratio <= 0.6


def test_bare_attention_is_decomposed_and_saved(tmp_path):
    model = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    plan = rankopt.search(model, "params<=60%", strategy="energy", example_inputs=(x, x, x))
    assert [d.targets for d in plan.changes] == [("in_proj",), ("out_proj",)]
    small = rankopt.apply(model, plan)
    rankopt.save(small, tmp_path / "a.safetensors")
    again = rankopt.load(nn.MultiheadAttention(32, 4, batch_first=True), tmp_path / "a.safetensors")
    assert torch.equal(small(x, x, x)[0], again.eval()(x, x, x)[0])
    with pytest.raises(rankopt.errors.PlanError, match="replaces the root module"):
        rankopt.apply_(model, plan)


@pytest.mark.parametrize("version", ["ShiftedWindowAttention", "ShiftedWindowAttentionV2"])
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (4, 4), (4, 9)])
@pytest.mark.parametrize("shift", [[0, 0], [2, 2]])
def test_window_attention(version, size, shift):
    swin = import_torchvision().models.swin_transformer
    source = getattr(swin, version)(24, [4, 4], list(shift), 3).eval()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_(std=0.3)
    before = {name: value.clone() for name, value in source.state_dict().items()}
    view = unpacked_clone(nn.Sequential(source))
    x = torch.randn(2, *size, 24)
    assert close(source(x), view(x))
    assert all(torch.equal(before[name], value) for name, value in source.state_dict().items())
    again = copy.deepcopy(view)
    assert close(again(x), view(x))


def test_subclasses_of_fused_layers_are_kept():
    class Mine(nn.TransformerEncoderLayer):
        pass

    model = Mine(32, 4, 64, batch_first=True)
    with pytest.raises(rankopt.errors.ModelError, match="no layer to decompose") as found:
        rankopt.search(model, "params<=90%", ignore=["self_attn*"])
    assert "linear1: its weight is read by Mine" in str(found.value)


def test_unpackers_are_registered_once():
    with pytest.raises(ValueError, match="registered already"):
        register("torch.nn.modules.activation.MultiheadAttention", lambda module, split: module)


def test_surgery_respects_shared_modules():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    new = nn.Linear(4, 4)
    surgery.replace(model, {shared: new})
    assert model["a"] is new
    assert model["b"][0] is new
    (layer,) = find_layers(model)
    assert layer.names == ("a", "b.0")

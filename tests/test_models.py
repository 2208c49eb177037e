"""search, apply, save and load on the architectures people have."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import rankopt
from rankopt.vision import import_torchvision

# Fitted decompositions take their time on networks of this size.
CLOSED_FORM = ("svd", "tucker2", "spatial_svd")
FAST = ["resnet18", "mobilenet_v3_small", "efficientnet_b0"]
SLOW = [
    "resnet50",
    "resnet101",
    "resnet152",
    "vgg16_bn",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "densenet121",
    "convnext_tiny",
    "vit_b_16",
    "swin_t",
    "swin_v2_t",
    "maxvit_t",
    "googlenet",
    "inception_v3",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
    "mnasnet1_0",
    "regnet_y_400mf",
    "resnext50_32x4d",
]


def build(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GoogLeNet and Inception announce their initialisation
        return import_torchvision().models.get_model(name).eval()


@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_torchvision(name, tmp_path):
    model = build(name)
    size = {"inception_v3": 299}.get(name, 224)
    x = torch.randn(1, 3, size, size)
    by_source = rankopt.search(model, "params<=50%", methods=CLOSED_FORM)
    plan = rankopt.search(model, "macs<=50%", strategy="parameter_ratio", example_inputs=x)
    for made, axis in ((by_source, "params"), (plan, "macs")):
        entry = made.totals[axis]
        assert 0.4 < entry["measured"] / entry["before"] <= 0.5
        assert all(decision.reason for decision in made)
    small = rankopt.apply(model, plan)
    rankopt.save(small, tmp_path / "m.safetensors")
    again = rankopt.load(build(name), tmp_path / "m.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(small(x), again(x))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layer"), [("vit_b_16", "in_proj"), ("swin_t", "qkv")])
def test_attention_is_decomposed(name, layer):
    model = build(name)
    by_default = rankopt.search(model, "params<=50%", methods=CLOSED_FORM)
    assert any(d.targets[0].endswith(layer) for d in by_default.changes)
    plan = rankopt.search(model, "params<=50%", strategy="energy")
    attention = [d for d in plan.changes if d.targets[0].endswith(layer)]
    assert len(attention) == 12
    small = rankopt.apply(model, plan)
    with torch.no_grad():
        assert small(torch.randn(1, 3, 224, 224)).shape == (1, 1000)


IDS = torch.arange(24).reshape(2, 12) + 5


def bert():
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=128,
        )
    )  # fmt: skip


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2,
                   n_positions=64)
    )  # fmt: skip


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=128,
        )
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [bert, gpt2, llama])
@pytest.mark.parametrize("probed", [True, False])
def test_hugging_face(make, dtype, probed, tmp_path):
    model = make().eval().to(dtype)
    inputs = {"input_ids": IDS}
    budget = "macs<=70%" if probed else "params<=80%"
    given = inputs if probed else None
    plan = rankopt.search(model, budget, strategy="energy", example_inputs=given)
    kept = {decision.targets[0]: decision.reason for decision in plan if decision.keeps}
    assert any("Embedding" in reason for reason in kept.values())
    if make is gpt2:
        assert kept["lm_head"] == "keep: its weight is tied to Embedding transformer.wte"
        assert plan["transformer.h.0.attn.c_attn"].method == "svd"
    small = rankopt.apply(model, plan)
    rankopt.save(small, tmp_path / "m.safetensors")
    again = rankopt.load(make(), tmp_path / "m.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(small(**inputs).logits, again(**inputs).logits)
    if make is bert:
        return
    told = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    words = small.generate(IDS, **told)
    assert torch.equal(words, again.generate(IDS, **told))
    if dtype is torch.float32:  # in bfloat16 the cache rounds otherwise
        assert torch.equal(words, small.generate(IDS, use_cache=False, **told))


def test_hugging_face_mixed_reads_are_kept():
    from transformers import T5Config, T5EncoderModel

    model = T5EncoderModel(
        T5Config(vocab_size=100, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4)
    )
    for inputs in (None, {"input_ids": IDS}):
        plan = rankopt.search(model.eval(), "params<=80%", example_inputs=inputs)
        assert "T5DenseActDense" in plan["encoder.block.0.layer.1.DenseReluDense.wo"].reason


def test_gpt2_layers_store_their_weight_transposed():
    model = gpt2().eval()
    shape = tuple(model.transformer.h[0].attn.c_attn.weight.shape)
    assert shape == (64, 192)
    decision = rankopt.Decision(("transformer.h.0.attn.c_attn",), (shape,), "svd", {"ranks": [64]})
    full = rankopt.apply(model, rankopt.RankPlan(model={}, decisions=(decision,)))
    assert type(full.transformer.h[0].attn.c_attn[0]) is nn.Linear
    with torch.no_grad():
        error = (full(IDS).logits - model(IDS).logits).abs().max()
    assert error < 1e-5

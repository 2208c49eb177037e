from __future__ import annotations

import copy
import sys
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import rankopt
from rankopt import export
from rankopt.errors import CheckpointError, ExportError, MissingDependency
from rankopt.testing import planted_inputs, planted_model

# Sums in another order.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def small():
    dense = planted_model()
    return rankopt.apply(dense, rankopt.search(dense, "macs<=50%", example_inputs=planted_inputs()))


class Residual(nn.Module):
    """A norm that can be merged and two that cannot."""

    def __init__(self):
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.norm_b = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.c, self.norm_c = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.norm_a(self.a(x)).relu()
        y = self.b(x)
        x = x + y + self.norm_b(y)  # the convolution is read twice
        return self.norm_c(self.c(self.norm_c(self.c(x))))  # used twice


def settled(model):
    """Norms with statistics and scales of their own."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
    return model.eval()


def test_norms_are_merged_where_that_is_right():
    model = settled(Residual())
    merged = export.merge_norms(model.train(), torch.randn(1, 3, 6, 6))
    x = torch.randn(5, 3, 6, 6)
    assert torch.allclose(merged(x), model.eval()(x), atol=TOLERANCE)
    kinds = [type(getattr(merged, f"norm_{name}")) for name in "abc"]
    assert kinds == [nn.Identity, nn.BatchNorm2d, nn.BatchNorm2d]
    assert isinstance(model.norm_a, nn.BatchNorm2d)


@pytest.mark.parametrize("name", ["a", "norm_a"])
def test_layers_with_hooks_are_not_merged(name):
    model, x = settled(Residual()).eval(), torch.randn(5, 3, 6, 6)
    model.get_submodule(name).register_forward_hook(lambda module, args, output: 2 * output)
    assert isinstance(export.merge_norms(model, x).norm_a, nn.BatchNorm2d)
    torch.testing.assert_close(export.to_program(model, x).module()(x), model(x))


def test_merged_into_the_last_factor():
    model = settled(nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU()))
    plan = rankopt.search(model, "params<=50%")
    compressed = rankopt.apply(model, plan)
    x = torch.randn(2, 16, 7, 7)
    merged = export.merge_norms(compressed, x)
    assert torch.allclose(merged(x), compressed(x), atol=TOLERANCE)
    assert isinstance(merged[1], nn.Identity)
    assert merged[0].last.bias is not None


def test_programs_take_any_batch(small):
    program = export.to_program(small, planted_inputs(1))
    x = planted_inputs(5)
    assert torch.allclose(program.module()(x), small(x), atol=TOLERANCE)


def test_keywords(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(20, 32), nn.Linear(32, 32)

        def forward(self, *, ids, scale):
            return {"out": self.head(self.table(ids)) * scale}

    dense = Net()
    inputs = {"ids": torch.randint(0, 20, (2, 5)), "scale": torch.randn(2, 1, 1)}
    plan = rankopt.search(dense, "params<=90%", example_inputs=inputs)
    compressed = rankopt.apply(dense, plan)
    program = export.to_program(compressed, inputs)
    assert torch.allclose(
        program.module()(**inputs)["out"], compressed(**inputs)["out"], atol=TOLERANCE
    )


@pytest.mark.slow
def test_onnx_computes_the_same(small, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "small.onnx"
    export.to_onnx(small, path, planted_inputs(1), check=True)
    session = onnxruntime.InferenceSession(path)
    (entry,) = session.get_inputs()
    assert not isinstance(entry.shape[0], int)
    x = planted_inputs(9)
    (found,) = session.run(None, {entry.name: x.numpy()})
    assert np.allclose(found, small(x).detach().numpy(), atol=1e-4)


@pytest.mark.slow
def test_an_onnx_file_that_computes_something_else_is_not_written(small, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    other = copy.deepcopy(small)
    with torch.no_grad():
        other.head.bias.add_(1.0)
    monkeypatch.setattr(export, "to_program", _of(other, export.to_program))
    with pytest.raises(ExportError, match=r"differ by up to 1.*nothing was written"):
        export.to_onnx(small, tmp_path / "s.onnx", planted_inputs(), check=True)
    assert not list(tmp_path.iterdir())


def _of(other, real):
    return lambda model, inputs, **settings: real(other, inputs, **settings)


def test_what_cannot_be_exported(small, tmp_path, monkeypatch):
    class Branching(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(ExportError, match="cannot capture Branching"):
        export.to_program(Branching(), torch.randn(2, 3))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingDependency, match=r"rankopt\[export\]"):
        export.to_onnx(small, tmp_path / "s.onnx", planted_inputs())


@pytest.mark.slow
def test_what_onnxruntime_has_no_kernel_for_is_written_unchecked(tmp_path):
    pytest.importorskip("onnxruntime")
    model, x, path = nn.Conv2d(3, 6, 3).double(), torch.randn(2, 3, 8, 8).double(), tmp_path / "s"
    with pytest.raises(ExportError, match=r"onnxruntime cannot run .* of Conv2d.*check=False"):
        export.to_onnx(model, path, x, check=True)
    assert not list(tmp_path.iterdir())
    export.to_onnx(model, path, x)
    assert path.exists()


@pytest.mark.parametrize("dim", [-1, 0.5, True])
def test_dimensions_count_from_the_first(dim):
    with pytest.raises(ValueError, match=f"got dimension {dim}; .* at least 0"):
        export.to_program(nn.Linear(4, 2), torch.zeros(2, 4), dynamic={dim: "width"})


class Pair(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


@pytest.mark.parametrize("kind", [list, tuple, Pair._make])
def test_inputs_in_lists(kind):
    class Joined(nn.Linear):
        def forward(self, parts):
            return super().forward(parts[0] + parts[1])

    def pair(size):
        return kind([torch.ones(size, 4), torch.ones(size, 4)])

    assert export.to_program(Joined(4, 2), [pair(2)]).module()(pair(7)).shape == (7, 2)
    named = export.to_program(Joined(4, 2), {"parts": pair(2)}).module()
    assert named(parts=pair(7)).shape == (7, 2)


def test_int8_weight_only(tmp_path):
    dense = planted_model()
    small = rankopt.apply(dense, rankopt.search(dense, "params<=40%"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization")
        quantised = copy.deepcopy(small)
        quantization.quantize_(quantised, quantization.Int8WeightOnlyConfig())
        x = planted_inputs()
        difference = (quantised(x) - small(x)).norm() / small(x).norm()
    assert type(quantised.hidden.first.weight).__name__ != "Parameter"
    assert 0 < difference < 0.03
    with pytest.raises(CheckpointError, match=r"is a Int8Tensor.*save the model before quantising"):
        rankopt.save(quantised, tmp_path / "s.safetensors")


@pytest.mark.slow
def test_torch_compile():
    dense = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    compressed = rankopt.apply(dense, rankopt.search(dense, "params<=60%"))
    x = torch.randn(4, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = torch.compile(compressed)(x)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            pytest.skip(f"no compiler: {str(error).splitlines()[0]}")
    assert torch.allclose(found, compressed(x), atol=TOLERANCE)


@pytest.mark.slow
def test_large_weights_lie_beside_the_file_under_its_name(small, tmp_path, monkeypatch):
    runtime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 0)
    export.to_onnx(small, tmp_path / "s.onnx", planted_inputs(), check=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.onnx", "s.onnx.data"]
    (tmp_path / "moved").mkdir()
    for part in list(tmp_path.glob("s.onnx*")):
        part.rename(tmp_path / "moved" / part.name)
    session = runtime.InferenceSession(tmp_path / "moved" / "s.onnx")
    x = planted_inputs(2)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.allclose(found, small(x).detach().numpy(), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precision(tmp_path, dtype):
    pytest.importorskip("onnxruntime")
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
    export.to_onnx(model.to(dtype), tmp_path / "s.onnx", torch.randn(4, 64).to(dtype))
    assert (tmp_path / "s.onnx").exists()


class Tagger(nn.Module):
    """Positions shared by all samples, a flag, and outputs that are no finite numbers."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 8), nn.Linear(8, 8)

    def forward(self, ids, positions, mask, flag=True):
        y = self.head(self.table(ids) + self.table(positions))
        y = y / mask.sum(1)[:, None, None]  # a mask without a one would make NaN
        endless, none = (torch.where(y > 0, y, other) for other in (-torch.inf, torch.nan))
        return y, y > 0, y.argmax(-1), endless, none


def tagger_inputs():
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    ids = torch.randint(9, (3, 5))
    return {"ids": ids, "positions": torch.arange(5)[None], "mask": mask, "flag": False}


def test_what_all_samples_share_stays_one():
    program = export.to_program(Tagger(), tagger_inputs())
    more = {k: v[[0, 1, 2, 2]] if k in ("ids", "mask") else v for k, v in tagger_inputs().items()}
    assert program.module()(**more)[0].shape == (4, 5, 8)


def test_one_sample_beside_a_longer_vector_is_still_a_batch():
    class Weighted(nn.Linear):
        def forward(self, x, weights):
            return super().forward(x) * weights.sum()

    program = export.to_program(Weighted(8, 8), (torch.randn(1, 8), torch.ones(5)))
    assert program.module()(torch.randn(4, 8), torch.ones(5)).shape == (4, 8)


def test_a_mask_of_more_dimensions_that_all_samples_share_stays_one():
    class Masked(nn.Linear):
        def forward(self, x, mask):
            return (super().forward(x)[:, None] * mask).sum(1)

    program = export.to_program(Masked(8, 8), (torch.randn(4, 5, 8), torch.ones(1, 1, 5, 8)))
    assert program.module()(torch.randn(3, 5, 8), torch.ones(1, 1, 5, 8)).shape == (3, 5, 8)


@pytest.mark.slow
def test_onnx_of_masks_flags_and_outputs_that_are_no_numbers(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    dynamic, model, inputs = {0: "batch", 1: "length"}, Tagger(), tagger_inputs()
    real, fed = export.measure.call, []
    monkeypatch.setattr(export.measure, "call", lambda m, x: fed.append(x) or real(m, x))
    export.to_onnx(model, tmp_path / "s.onnx", inputs, dynamic=dynamic, check=True)
    for x in fed:
        assert x["mask"].shape == x["ids"].shape > (3, 5)
        assert x["mask"].sum(1).min() > 0
        assert x["positions"].shape == (1, x["ids"].shape[1])
    with torch.no_grad():
        changed = copy.deepcopy(model)
        changed.head.bias.neg_()
    monkeypatch.setattr(export, "to_program", _of(changed, export.to_program))
    with pytest.raises(ExportError, match="computes something else"):
        export.to_onnx(model, tmp_path / "t.onnx", inputs, dynamic=dynamic, check=True)


class _Reread(nn.Module):
    """A convolution and a norm of which something else reads a parameter."""

    def __init__(self, read):
        super().__init__()
        self.conv, self.norm, self.read = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), read

    def forward(self, x):
        return self.norm(self.conv(x)).mean() + self.get_parameter(self.read).sum()


@pytest.mark.parametrize("read", ["conv.weight", "conv.bias", "norm.weight", "norm.bias"])
def test_norms_whose_parameters_are_read_elsewhere_stay(read):
    model, x = _Reread(read).eval(), torch.randn(2, 3, 8, 8)
    model.norm.running_mean.uniform_(1, 2)
    merged = export.merge_norms(model, x)
    assert isinstance(merged.norm, nn.BatchNorm2d)
    torch.testing.assert_close(merged(x), model(x))


def test_norms_without_running_statistics_stay():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)).eval()
    assert isinstance(export.merge_norms(model, torch.randn(2, 3, 8, 8))[1], nn.BatchNorm2d)


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_arguments_that_are_passed_on_may_vary_in_size(tmp_path):
    model = Wrapper(nn.Bilinear(4, 3, 2))
    program = export.to_program(model, (torch.zeros(1, 4), torch.zeros(1, 3)))
    assert program.module()(torch.zeros(7, 4), torch.zeros(7, 3)).shape == (7, 2)


def test_a_cache_among_the_outputs_is_named():
    class DynamicCache:
        pass

    class Decoder(nn.Linear):
        def forward(self, x):
            return super().forward(x), DynamicCache()

    with pytest.raises(ExportError, match="give the inputs with use_cache=False"):
        export.to_program(Decoder(4, 2), torch.zeros(1, 4))


def test_attention_with_key_and_value_biases_takes_any_batch():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, add_bias_kv=True, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    model, x = Attending().eval(), torch.randn(4, 6, 32)
    small = rankopt.apply(model, rankopt.search(model, "params<=70%", example_inputs=x))
    program = export.to_program(small, x)
    more = torch.randn(7, 6, 32)
    torch.testing.assert_close(program.module()(more), small(more))


class ByHand(nn.Module):
    """Runs its convolution without the bias it has, or its norm as a function."""

    def __init__(self, what):
        super().__init__()
        self.conv, self.norm, self.what = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), what

    def forward(self, x):
        if self.what == "conv":
            return self.norm(nn.functional.conv2d(x, self.conv.weight))
        norm = self.norm
        mean, variance = norm.running_mean, norm.running_var
        return nn.functional.batch_norm(self.conv(x), mean, variance, norm.weight, norm.bias)


@pytest.mark.parametrize("what", ["conv", "norm"])
def test_tensors_used_by_hand_are_not_merged(what):
    model, x = settled(ByHand(what)), torch.randn(5, 3, 6, 6)
    merged = export.merge_norms(model, x)
    assert torch.equal(merged(x), model(x))
    torch.testing.assert_close(export.to_program(model, x).module()(x), model(x))


def test_norms_that_stay_in_training_are_not_merged():
    class Training(nn.BatchNorm2d):
        def train(self, mode=True):
            return super().train(True)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Training(4)).eval()
    merged = export.merge_norms(model, torch.randn(5, 3, 6, 6))
    assert isinstance(merged[1], nn.BatchNorm2d)

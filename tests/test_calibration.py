from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rankopt
from rankopt._calibration import collect as calibration
from rankopt._calibration.collect import POSITIONS, collect, layer_inputs, patches
from rankopt._calibration.moments import Moments, damped_root
from rankopt._model.inputs import batches, digest, divergence, divergences, hold
from rankopt._model.layers import canonical_weight, find_layers
from rankopt.errors import CalibrationError, PlanError, RankoptWarning
from rankopt.testing import planted_inputs, planted_model

# Float32 products summed in float64 against float64 throughout.
MOMENTS = 1e-5
BUDGET = "params<=60%"


def data(count=6, batch=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, 12, 12, generator=generator) for _ in range(count)]


def moments_of(module, x):
    model = nn.Sequential(module)
    layers = find_layers(model)
    return layers[0], collect(model, layers, [x])["0"]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(6, 4), (5, 6)),
        (nn.Linear(6, 4), (5, 3, 6)),
        (nn.Conv1d(4, 4, 3, stride=2, padding=1), (5, 4, 9)),
        (nn.Conv2d(4, 8, 3, padding=1, groups=2, bias=False), (5, 4, 7, 6)),
        (nn.Conv2d(4, 8, (3, 2), dilation=2, padding_mode="reflect", padding=1), (5, 4, 7, 8)),
        (nn.Conv2d(4, 4, (3, 2), padding="same"), (5, 4, 7, 8)),
        (nn.Conv3d(4, 4, 2, stride=(1, 2, 1)), (2, 4, 4, 5, 4)),
    ],
    ids=str,
)
def test_moments_predict_the_output_energy(module, shape):
    """E‖y‖² without bias, or without mean, is the energy of the weight in the moments' metric."""
    x = torch.randn(shape) + 3
    _, found = moments_of(module, x)
    weight = canonical_weight(module).double().flatten(2)
    with torch.no_grad():
        out = module(x).double()
        bias = 0 if module.bias is None else module.bias.double()
        axis = -1 if isinstance(module, nn.Linear) else 1
        out = (out.movedim(axis, -1) - bias).flatten(0, -2)
        if found.mean is not None:
            out = out - out.mean(dim=0)
        out = out.square().sum()
    predicted = ((weight @ found.second) * weight).sum() * found.count
    assert predicted == pytest.approx(out.item(), rel=MOMENTS)


def test_large_kernels_keep_moments_of_channels(monkeypatch):
    monkeypatch.setattr("rankopt._calibration.collect.MAX_PATCH", 30)
    x = torch.randn(4, 4, 6, 6)
    _, found = moments_of(nn.Conv2d(4, 4, 3), x)
    assert found.pixels == 1
    rows = x.transpose(0, 1).flatten(1).double()
    assert torch.allclose(found.second[0], rows @ rows.T / rows.shape[1], rtol=MOMENTS)


def test_channel_moments_of_patches():
    x = torch.randn(4, 4, 6, 6)
    layer, found = moments_of(nn.Conv2d(4, 4, 3, bias=False), x)
    rows = layer_inputs(layer, x)[0].unflatten(-1, (4, 9)).transpose(0, 1).flatten(1).double()
    expected = rows @ rows.T / rows.shape[1]
    assert torch.allclose(found.channels[0], expected, atol=1e-5)


def test_damping_handles_deficient_and_dead_moments():
    for second in (
        torch.zeros(1, 4, 4),
        torch.ones(1, 4, 4),
        torch.diag(torch.tensor([1.0, 0, 0, 0]))[None],
    ):
        root = damped_root(second.double())
        assert root.isfinite().all()
        assert torch.allclose(root @ root.mT, second.double(), atol=1e-4) or not second.any()


@pytest.mark.parametrize("name", ["svd", "tucker2", "spatial_svd"])
@pytest.mark.parametrize("groups", [1, 2])
def test_stated_output_error_is_the_true_one(name, groups):
    kernel = 1 if name == "svd" else 3
    module = nn.Conv2d(8, 12, kernel, padding=kernel // 2, groups=groups, bias=False)
    with torch.no_grad():
        module.weight.mul_(torch.linspace(0.2, 1, 12)[:, None, None, None])
    mix = torch.randn(8, 8) * torch.logspace(0, -1.5, 8)
    x = torch.einsum("nchw,cd->ndhw", torch.randn(40, 8, 9, 9), mix)
    layer, moments = moments_of(module, x)
    method = rankopt.decompositions.create(name)
    weight = canonical_weight(module)
    basis, plain = method.prepare(weight, moments), method.prepare(weight)
    for share in (0.4, 0.7, 1.0):
        ranks = [max(1, int(share * axis.maximum)) for axis in method.rank_axes(layer)]
        errors = []
        for made in (basis, plain):
            built = method.build(layer, ranks).to_empty(device="cpu")
            factors = made.factors(ranks)
            with torch.no_grad():
                for key, parameter in built.named_parameters():
                    parameter.copy_(factors[key])
                expected = module(x)
                errors.append(((built(x) - expected).norm() / expected.norm()).item())
        stated = float(basis.error(ranks))
        assert errors[0] == pytest.approx(stated, abs=3e-3)
        assert errors[0] <= errors[1] + 1e-3


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(6, 6, bias=False), (5, 6)), (nn.Conv2d(6, 6, 1, bias=False), (1, 6, 4, 4))],
    ids=str,
)
def test_inputs_that_are_written_into_after_the_call(layer, shape):
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            x = 2 * x
            x += self.layer(x)
            return x

    model, data = Residual(), [torch.randn(shape) for _ in range(3)]
    (found,) = collect(model, find_layers(model), data).values()
    rows = 2 * torch.cat(data).movedim(1, -1).flatten(0, -2).double()
    assert torch.allclose(found.second[0], rows.T @ rows / len(rows), rtol=MOMENTS, atol=MOMENTS)


def test_dead_channels_and_constant_inputs():
    module = nn.Conv2d(6, 8, 3, padding=1)
    x = torch.randn(8, 6, 5, 5)
    x[:, 2:5] = 0
    x[:, 5] = 1.0
    layer, moments = moments_of(module, x)
    for name in ("tucker2", "spatial_svd"):
        method = rankopt.decompositions.create(name)
        ranks = [max(1, axis.maximum // 2) for axis in method.rank_axes(layer)]
        factors = method.prepare(canonical_weight(module), moments).factors(ranks)
        assert all(value.isfinite().all() for value in factors.values())


# The data


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x, mask=None):
        return self.fc(x if mask is None else x * mask)


@pytest.mark.parametrize(
    "data",
    [
        [torch.ones(4, 16)],
        [(torch.ones(4, 16),)],
        [{"x": torch.ones(4, 16)}],
        [{"x": torch.full((4, 16), 2.0), "mask": torch.full((4, 16), 0.5)}],
        [(torch.ones(4, 16), torch.zeros(4, dtype=torch.long))],
        DataLoader(TensorDataset(torch.ones(4, 16), torch.arange(4)), batch_size=2),
    ],
    ids=["tensor", "tuple", "mapping", "masked", "labels", "loader"],
)
def test_forms_of_batches(data):
    model = Keywords()
    layers = find_layers(model)
    found = collect(model, layers, data)["fc"]
    assert found.count == 4
    assert torch.allclose(found.mean, torch.ones(1, 16).double())
    assert not found.second.any()


def test_labels_are_left_out_where_the_model_takes_one_argument():
    pair = [(torch.ones(4, 16), torch.ones(4, 16))]
    assert torch.is_tensor(hold(nn.Sequential(nn.Linear(16, 2)), pair)[0])


TARGETS = {
    "regression": torch.ones(4),
    "column": torch.ones(4, 1),
    "one-hot": torch.eye(4),
    "segmentation": torch.zeros(4, 8, 8, dtype=torch.long),
    "detection": [{"boxes": torch.ones(index, 4)} for index in range(4)],
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_labels_of_any_form_are_left_out_where_the_second_argument_is_optional(target):
    class Losing(Keywords):
        def forward(self, x, targets=None):
            return super().forward(x)

    class Both(Keywords):
        def forward(self, x, mask):
            return super().forward(x, mask)

    x = torch.ones(4, 16)
    with pytest.warns(RankoptWarning, match=r"left out; .*'mask', yield mappings \{'x': \.\.\., "):
        (held,) = hold(Keywords(), [(x, target)])
    assert torch.equal(held, x)
    assert torch.equal(hold(Losing(), [(x, target)])[0], x)
    assert len(hold(Both(), [(x, target)])[0]) == 2


def test_a_pair_keeps_what_no_label_can_be():
    model, x, shared = nn.LSTM(16, 8), torch.ones(4, 16), torch.ones(2, 8)
    assert len(hold(model, [(x, (shared, shared))])[0]) == 2
    assert len(hold(Keywords(), [(x, torch.tensor(0.5))])[0]) == 2


def test_infinite_iterables_stop():
    model = nn.Linear(4, 4)
    endless = (torch.ones(3, 4) for _ in itertools.count())
    held = hold(model, endless, max_samples=10)
    assert [len(batch) for batch in held] == [3, 3, 3, 1]


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ([], "calibration is empty"),
        (torch.ones(4, 3, 12, 12), r"calibration is a Tensor; .*for one batch x, pass \[x\]"),
        (7, "calibration is a int"),
        (["text"], "yielded a str"),
        ([torch.tensor(1.0)], "without a tensor that has a batch size"),
        ([torch.ones(4, 2, 12, 12)], r"fails on a calibration batch of \[4, 2, 12, 12\]"),
        ([torch.ones(4, 3, 12, 12, dtype=torch.long)], "int64.*shape and dtype the model takes"),
        (
            [{"image": torch.ones(4, 3, 12, 12), "label": torch.zeros(4, dtype=torch.long)}],
            r"a mapping is passed as keyword arguments: forward takes \(x\), the batch has image, "
            r"label; map it, such as \[\(b\['image'\], b\['label'\]\) for b in loader\]",
        ),
        ([torch.full((4, 3, 12, 12), torch.nan)], "layer .*: its inputs .* are not finite"),
    ],
)
def test_bad_data(data, match):
    model = planted_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CalibrationError, match=match):
        rankopt.search(model, BUDGET, calibration=data)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_digest_does_not_depend_on_batching():
    x = torch.randn(12, 5)
    assert digest(x.split(4)) == digest(x.split(5)) == digest([x])
    assert digest([x]) != digest([x + 1])


@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 5), (6, 3, 4, 4), (6,), (6, 1), (3000, 40)])
@pytest.mark.parametrize("named", [True, False])
def test_divergences_of_samples_add_up(shape, named):
    draw = torch.Generator().manual_seed(0)
    old, new = (torch.randn(shape, generator=draw) for _ in range(2))
    if len(shape) == 2 and shape[1] > 1:
        old[0, 0] = -torch.inf  # a class that is left out
    if named:
        old, new = {"logits": old}, {"logits": new}
    each = divergences(old, new)
    assert each.shape == shape[:1]
    assert each.mean().item() == pytest.approx(divergence(old, new))
    assert each.std() > 0


def test_divergence():
    logits = torch.randn(4, 5)
    assert divergence(logits, logits) == 0
    assert divergence(logits, logits + 3) == pytest.approx(0, abs=1e-12)  # KL ignores shifts
    hidden = torch.randn(2, 3, 4)
    assert divergence((hidden,), (1.1 * hidden,)) == pytest.approx(0.01)
    with pytest.raises(CalibrationError, match="outputs changed"):
        divergence(logits, logits[:2])


# search and apply


@pytest.mark.parametrize("strategy", ["energy", "parameter_ratio", "vbmf", "knapsack"])
def test_data_aware_plans(strategy, tmp_path):
    model = planted_model()
    held = data()
    plan = rankopt.search(model, BUDGET, strategy=strategy, calibration=held)
    kinds = {decision.factors.kind for decision in plan.changes}
    assert kinds <= {"whitened", "whitened+output"}
    assert kinds
    assert {d.factors.digest for d in plan.changes} == {digest(held)}
    again = rankopt.RankPlan.from_json(plan.to_json())
    small = rankopt.apply(model, again, calibration=held)
    with pytest.raises(PlanError, match="pass the calibration inputs the plan was made with"):
        rankopt.apply(model, plan)
    with pytest.warns(RankoptWarning, match="not those the plan was made with"):
        rankopt.apply(model, plan, calibration=data(seed=5))
    rankopt.save(small, tmp_path / "s.safetensors")
    same = rankopt.load(planted_model(), tmp_path / "s.safetensors")
    assert torch.equal(same(planted_inputs()), small(planted_inputs()))
    in_place = planted_model()
    rankopt.apply_(in_place, plan, calibration=held)
    assert torch.allclose(in_place(planted_inputs()), small(planted_inputs()), atol=1e-5)


def test_a_generator_is_read_once():
    model = planted_model()
    plan = rankopt.search(model, BUDGET, calibration=(x for x in data()))
    small = rankopt.apply(model, plan, calibration=(x for x in data()))
    assert small(planted_inputs()).isfinite().all()


def test_data_aware_is_closer_to_the_model():
    model = planted_model(noise=0.5)
    held = data()
    x = data(1, 64, seed=9)[0]
    distances = []
    for inputs in (None, held):
        plan = rankopt.search(model, BUDGET, strategy="parameter_ratio", calibration=inputs)
        small = rankopt.apply(model, plan, calibration=inputs)
        with torch.no_grad():
            distances.append(divergence(model(x), small(x)))
    assert distances[1] < distances[0]


def test_attention_and_tokens():
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(32, 8)).train()
    held = [torch.randn(8, 6, 32) for _ in range(3)]
    plan = rankopt.search(model, "params<=60%", strategy="knapsack", calibration=held)
    assert plan["0.self_attn.in_proj"].factors.kind == "whitened"
    small = rankopt.apply(model, plan, calibration=held)
    assert model.training
    assert small(held[0]).shape == (8, 6, 8)


def test_tied_layers_pool_their_moments():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    model = Tied()
    held = [torch.randn(32, 16)]
    plan = rankopt.search(model, "params<=70%", calibration=held)
    assert plan["a"].targets == ("a", "b")
    assert rankopt.apply(model, plan, calibration=held)(held[0]).shape == (32, 16)


def test_batches_move_to_the_device_of_the_model():
    (inputs, size), *_ = batches(nn.Linear(4, 4), [torch.ones(3, 4)])
    assert inputs.device == torch.device("cpu")
    assert size == 3


def test_moments_are_plain_values():
    assert Moments(torch.eye(2)[None], 1, 3).key == Moments(torch.eye(2)[None], 1, 9).key


def test_positions_are_drawn_the_same_each_time():
    module = nn.Conv2d(3, 4, 3, padding=1)
    (layer,) = find_layers(nn.Sequential(module))
    x = torch.randn(8, 3, 40, 40)
    rows = layer_inputs(layer, x)
    assert rows.shape == (1, 8 * POSITIONS, 27)
    assert torch.equal(rows, layer_inputs(layer, x))
    assert not torch.equal(rows, layer_inputs(layer, x, seed=1))
    every = patches(layer, x)[0]
    # Each row is one of the patches, and their moments are near those of all.
    assert all((every == row).all(dim=1).any() for row in rows[0, ::97])
    near, exact = rows[0].square().mean(), every.square().mean()
    assert abs(near - exact) < 0.1 * exact


def test_sums_in_several_passes_are_those_of_one(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)).eval()
    layers, data = find_layers(model), [torch.randn(16, 8) for _ in range(3)]
    whole = calibration.collect(model, layers, iter(data))
    monkeypatch.setattr(calibration, "LEAST_SUM_BYTES", 1)
    monkeypatch.setattr(calibration, "SUM_SHARE", 0)
    monkeypatch.setattr(calibration, "ROWS", 1)
    parts = calibration.collect(model, layers, iter(data))
    assert list(whole) == list(parts)
    for name, found in whole.items():
        assert torch.allclose(found.second, parts[name].second, rtol=1e-5, atol=1e-6)
        assert found.count == parts[name].count == 48

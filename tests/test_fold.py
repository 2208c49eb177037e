from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rankopt
from rankopt._build.fold import check_foldable, effective_weight, fold
from rankopt._model.layers import canonical_weight
from rankopt.errors import ModelError, RankoptWarning
from rankopt.testing import planted_inputs, planted_model

# Rounding of float64 sums of a few hundred terms.
TOLERANCE = 1e-10
SIZE = {
    nn.Linear: (5, 16),
    nn.Conv1d: (2, 16, 9),
    nn.Conv2d: (2, 16, 9, 9),
    nn.Conv3d: (2, 16, 5, 5, 5),
}


@pytest.mark.parametrize(
    ("layer", "method"),
    [
        (nn.Linear(16, 24), "svd"),
        (nn.Conv2d(16, 24, 1, stride=2, bias=False), "svd"),
        (nn.Conv1d(16, 24, 1, groups=2), "svd"),
        (nn.Conv2d(16, 24, 3, padding=1), "tucker2"),
        (nn.Conv2d(16, 24, 3, groups=2, dilation=2), "tucker2"),
        (nn.Conv3d(16, 16, 2), "tucker2"),
        (nn.Conv2d(16, 24, (3, 5), stride=2), "spatial_svd"),
        (nn.Conv2d(16, 24, 3, groups=2), "spatial_svd"),
        (nn.Conv2d(16, 24, 3, stride=2), "cp"),
        (nn.Conv2d(16, 24, 3, padding=1), "tt"),
        (nn.Conv2d(16, 24, 3, padding=1), "branched_tucker"),
    ],
    ids=str,
)
def test_one_layer_with_the_effective_weight_is_the_chain(layer, method):
    dense = nn.Sequential(layer.double())
    plan = rankopt.search(dense, "params<=60%", methods=[method])
    small = rankopt.apply(dense, plan)
    assert len(small[0]) > 1
    found = effective_weight(small[0])
    assert found.shape == canonical_weight(layer).shape
    folded = copy.deepcopy(layer)
    with torch.no_grad():
        folded.weight.copy_(found.flatten(0, 1))
    x = torch.randn(SIZE[type(layer)], dtype=torch.float64)
    assert torch.allclose(folded(x), small(x), atol=TOLERANCE)
    found.square().sum().backward()
    assert all(factor.weight.grad is not None for factor in small[0])


def test_a_grouped_core_between_dense_factors():
    chain = nn.Sequential(
        nn.Conv2d(6, 4, 1, bias=False),
        nn.Conv2d(4, 8, 3, groups=2, bias=False),
        nn.Conv2d(8, 5, (1, 2), bias=False),
    ).double()
    weight = effective_weight(chain)
    assert weight.shape == (1, 5, 6, 3, 4)
    x = torch.randn(2, 6, 7, 7, dtype=torch.float64)
    assert torch.allclose(nn.functional.conv2d(x, weight[0]), chain(x), atol=TOLERANCE)


def test_a_folded_model_computes_the_same(tmp_path):
    dense = planted_model()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    small = rankopt.apply(dense, rankopt.search(dense, "params<=40%"))
    with torch.no_grad():  # as after training
        for tensor in small.state_dict().values():
            tensor.mul_(1.1) if tensor.is_floating_point() else None
    folded = fold(small, dense)
    x = planted_inputs()
    assert torch.allclose(folded(x), small(x), atol=1e-4)
    assert folded.state_dict().keys() == before.keys()
    assert all(torch.equal(before[n], v) for n, v in dense.state_dict().items())
    # What is of low rank is decomposed again without loss, for a plan of the original.
    again = rankopt.search(folded, "params<=40%")
    second = rankopt.apply(folded, again)
    assert torch.allclose(second(x), small(x), atol=1e-4)
    rankopt.save(second, tmp_path / "s.safetensors")
    assert torch.equal(rankopt.load(dense, tmp_path / "s.safetensors")(x), second(x))


def test_compressing_what_is_compressed_names_fold():
    dense = planted_model()
    small = rankopt.apply(dense, rankopt.search(dense, "params<=60%"))
    with pytest.warns(RankoptWarning, match=r"compressed already.*rankopt.fold\(.*rounds=") as seen:
        rankopt.search(small, "params<=90%")
    assert seen[0].filename == __file__


def test_rounds_of_a_model_with_integer_parameters():
    dense = nn.Sequential(nn.Linear(32, 32), nn.Module())
    dense[1].forward = lambda x: x
    dense[1].levels = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
    plan = rankopt.search(dense, "params<=60%")
    check_foldable(plan, dense)
    assert fold(rankopt.apply(dense, plan), dense)[1].levels.dtype == torch.int8


def test_extra_state_is_carried_over():
    class Noted(nn.Linear):
        note = None

        def get_extra_state(self):
            return {"note": self.note}

        def set_extra_state(self, state):
            self.note = state["note"]

    dense = nn.Sequential(nn.Linear(32, 32), Noted(32, 4))
    small = rankopt.apply(dense, rankopt.search(dense, "params<=60%"))
    small[1].note = "trained"
    assert fold(small, dense)[1].note == "trained"


def test_what_cannot_be_folded():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x):
            return self.mix(x, x, x)[0]

    dense = Attention()
    plan = rankopt.search(dense, "params<=60%", example_inputs=torch.randn(2, 5, 32))
    with pytest.raises(ModelError, match="cannot be folded"):
        fold(rankopt.apply(dense, plan), dense)
    with pytest.raises(ModelError, match="carries no plan"):
        fold(dense, dense)


def test_factors_that_were_untied_are_not_dropped():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    model[2].weight = model[0].weight
    small = rankopt.apply(model, rankopt.search(model, "params<=60%"))
    x = torch.randn(4, 32)
    assert torch.allclose(rankopt.fold(small, model)(x), small(x), atol=1e-5)
    small[2].first.weight = nn.Parameter(torch.randn_like(small[2].first.weight))
    with pytest.raises(ModelError, match="2 has other values than 0, and both are one tensor"):
        rankopt.fold(small, model)

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rankopt
from rankopt._calibration.moments import Moments
from rankopt._decompositions import (
    CP,
    SVD,
    TT,
    BranchedTucker,
    DepthwiseSeparable,
    SpatialSVD,
    Tucker2,
)
from rankopt._model.layers import canonical_weight, find_layers
from rankopt._model.measure import count_macs
from rankopt.testing import decomposition_checks, dense_weight

# Float32 forward passes of a chain against its layer, relative to the output.
FLOAT32_OUTPUT = 1e-4
FLOAT64_OUTPUT = 1e-10

POINTWISE = [
    nn.Linear(7, 5),
    nn.Linear(5, 9, bias=False),
    nn.Conv1d(8, 12, 1, stride=2, padding=1),
    nn.Conv2d(8, 12, 1, stride=2, groups=2),
    nn.Conv3d(4, 6, 1),
]
KERNELS = [
    nn.Conv1d(6, 4, 5, dilation=2),
    nn.Conv2d(6, 8, 3, stride=2, padding=1),
    nn.Conv2d(2, 12, (3, 1)),
    nn.Conv2d(12, 2, 3, padding="same", bias=False),
    nn.Conv3d(4, 4, (3, 1, 2), groups=2, padding_mode="circular", padding=(1, 0, 1)),
]


@pytest.mark.parametrize(
    "check",
    [
        *decomposition_checks(SVD(), POINTWISE),
        *decomposition_checks(SVD(stride_on="last"), POINTWISE[2:4]),
        *decomposition_checks(Tucker2(), KERNELS),
        *decomposition_checks(Tucker2(hooi=2), KERNELS[1:2]),
        *decomposition_checks(CP(), KERNELS),
        *decomposition_checks(DepthwiseSeparable(), KERNELS),
        *decomposition_checks(BranchedTucker(), KERNELS),
        *decomposition_checks(BranchedTucker(branches=3, init="truncate"), KERNELS[1:3]),
        *decomposition_checks(TT(), [*KERNELS[1:4:2], nn.Conv3d(4, 6, (3, 2, 2), groups=2)]),
    ],
    ids=str,
)
def test_contract(check):
    check()


def apply_at(module, method, ranks, x):
    """Outputs of the module and of its chain, and the applied model."""
    model = nn.Sequential(module)
    (layer,) = find_layers(model)
    args = {"ranks": list(ranks), **method.settings}
    decision = rankopt.Decision(("0",), (layer.shape,), method.name, args)
    small = rankopt.apply(model, rankopt.RankPlan(model={}, decisions=(decision,)))
    with torch.no_grad():
        return model(x), small(x), small, layer


METHODS = (
    SVD(),
    SVD(stride_on="last"),
    Tucker2(),
    SpatialSVD(),
    CP(),
    DepthwiseSeparable(),
    BranchedTucker(),
    BranchedTucker(branches=3, init="truncate"),
    TT(),
)


def between(x, out):
    """Positions once one spatial side has been convolved, two, and so on."""
    before, after = x.shape[2:], out.shape[2:]
    sizes = [(*after[:cut], *before[cut:]) for cut in range(1, len(before))]
    return tuple(len(x) * math.prod(size) for size in sizes)


@st.composite
def convolutions(draw):
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = [groups * draw(st.integers(2, 5)) for _ in range(2)]
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    padding = tuple(draw(st.integers(0, 1)) for _ in range(dims))
    same = draw(st.booleans()) and set(stride) == {1} and mode == "zeros"
    module = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        *channels,
        kernel,
        stride=stride,
        padding="same" if same else padding,
        dilation=tuple(draw(st.integers(1, 2)) for _ in range(dims)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )
    size = tuple(draw(st.integers(5, 8)) for _ in range(dims))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    x = torch.randn(draw(st.integers(1, 2)), channels[0], *size, dtype=dtype)
    return module.to(dtype), x


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@settings(max_examples=120, deadline=None)
@given(convolutions(), st.data())
def test_any_convolution(case, data):
    module, x = case
    (layer,) = find_layers(nn.Sequential(module))
    if layer.refusal:
        return
    method = data.draw(st.sampled_from([m for m in METHODS if m.applies(layer)]))
    axes = method.rank_axes(layer)
    full = [axis.maximum for axis in axes]
    expected, found, *_ = apply_at(module, method, full, x)
    exact = method.exact_error and x.dtype == torch.float64
    tolerance = FLOAT64_OUTPUT if exact else FLOAT32_OUTPUT
    assert found.shape == expected.shape
    assert (found - expected).norm() <= tolerance * (expected.norm() + 1)
    # Rank 1 and any other rank run, with the MACs the formula says.
    ranks = [a.step * data.draw(st.integers(1, a.maximum // a.step)) for a in axes]
    _, out, small, _ = apply_at(module, method, ranks, x)
    assert out.shape == expected.shape
    priced = dataclasses.replace(
        layer,
        positions_in=x.numel() // layer.in_channels,
        positions_out=expected.numel() // layer.out_channels,
        positions_between=between(x, expected),
    )
    padded_first = method.name == "svd" and layer.padding not in ("same", (0,) * (x.dim() - 2))
    strided_last = getattr(method, "stride_on", "") == "last"
    if not (padded_first and strided_last):
        assert count_macs(small, x) == method.macs(priced, ranks)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.booleans(), st.data())
def test_any_linear(inputs, outputs, bias, data):
    module = nn.Linear(inputs, outputs, bias=bias).double()
    x = torch.randn(2, 3, inputs, dtype=torch.float64)
    rank = data.draw(st.integers(1, min(inputs, outputs)))
    expected, full, *_ = apply_at(module, SVD(), [min(inputs, outputs)], x)
    assert (full - expected).norm() <= FLOAT64_OUTPUT * (expected.norm() + 1)
    _, _, small, layer = apply_at(module, SVD(), [rank], x)
    singular = torch.linalg.svdvals(module.weight)
    lost = singular[rank:].square().sum().sqrt() / singular.norm()
    assert SVD().prepare(canonical_weight(module)).error([rank]) == pytest.approx(
        lost.item(), abs=1e-7
    )
    assert count_macs(small, x) == 6 * SVD().params(layer, [rank])


def test_tucker_matches_tensorly():
    import tensorly as tl
    from tensorly.decomposition import partial_tucker

    tl.set_backend("pytorch")
    weight = torch.randn(24, 20, 3, 3, dtype=torch.float64)
    module = nn.Conv2d(20, 24, 3).double()
    module.weight.data.copy_(weight)
    (layer,) = find_layers(nn.Sequential(module))
    (core, factors), _ = partial_tucker(weight, rank=[10, 9], modes=[0, 1], init="svd")
    reference = (weight - tl.tenalg.multi_mode_dot(core, factors, modes=[0, 1])).norm()
    # White noise is the hardest case for a truncation without sweeps.
    for hooi, slack in ((0, 1.03), (3, 1.002)):
        ours = dense_weight(Tucker2(hooi=hooi), layer, weight[None], (9, 10))
        assert (weight - ours[0]).norm() <= slack * reference


def test_hooi_never_hurts():
    weight = torch.randn(1, 16, 12, 3, 3, dtype=torch.float64)
    (layer,) = find_layers(nn.Sequential(nn.Conv2d(12, 16, 3)))
    errors = [
        (weight - dense_weight(Tucker2(hooi=sweeps), layer, weight, (5, 7))).norm().item()
        for sweeps in range(4)
    ]
    assert errors == sorted(errors, reverse=True)


def test_large_float32_layers_keep_their_accuracy():
    module = nn.Linear(300, 200)
    basis = SVD().prepare(canonical_weight(module))
    singular = torch.linalg.svdvals(module.weight.double()).detach().numpy()
    tails = np.sqrt(np.append((singular[::-1] ** 2).cumsum()[::-1][1:], 0) / (singular**2).sum())
    found = basis.error([np.arange(1, 201)])
    assert np.abs(found - tails).max() < 1e-5
    expected, out, *_ = apply_at(module, SVD(), [200], torch.randn(4, 300))
    assert (out - expected).norm() < FLOAT32_OUTPUT * expected.norm()


def test_stride_on_first_is_the_same_function_and_cheaper():
    module = nn.Conv2d(8, 16, 1, stride=2)
    x = torch.randn(1, 8, 9, 9)
    expected, first, small_first, _ = apply_at(module, SVD(), [8], x)
    _, last, small_last, _ = apply_at(module, SVD(stride_on="last"), [8], x)
    assert (first - expected).norm() < FLOAT32_OUTPUT * expected.norm()
    assert (last - expected).norm() < FLOAT32_OUTPUT * expected.norm()
    assert count_macs(small_first, x) < count_macs(small_last, x)


def test_factors_are_balanced_and_nested():
    module = nn.Linear(12, 9).double()
    basis = SVD().prepare(canonical_weight(module))
    five, three = basis.factors([5]), basis.factors([3])
    assert torch.allclose(five["first.weight"][:3], three["first.weight"])
    norms = five["first.weight"].norm(dim=1), five["last.weight"].norm(dim=0)
    assert torch.allclose(*norms)


def trained_kernel(outputs=24, inputs=20, seed=0):
    """A kernel with correlated channels and decaying spectra, in float64."""
    draw = torch.Generator().manual_seed(seed)
    made = torch.randn(outputs, inputs, 3, 3, generator=draw, dtype=torch.float64)
    for mode, size in ((0, outputs), (1, inputs)):
        mixing = torch.randn(size, size, generator=draw, dtype=torch.float64)
        scales = torch.arange(1, size + 1, dtype=torch.float64) ** -0.5
        made = torch.tensordot(mixing * scales, made, dims=([1], [mode])).movedim(0, mode)
    return made


def component_energy(factors):
    """Energy of CP components, one by one, over that of their sum's target."""
    first, core, last = (factors[f"{name}.weight"].flatten(1) for name in ("first", "core", "last"))
    norms = (first.square().sum(1), core.square().sum(1), last.square().sum(0))
    return (norms[0] * norms[1] * norms[2]).sum().item()


def test_cp_loses_no_more_than_plain_als_and_does_not_cancel():
    import tensorly as tl
    from tensorly.decomposition import parafac

    tl.set_backend("pytorch")
    weight = trained_kernel()
    flat = weight.flatten(2)
    plain = min(
        (flat - tl.cp_to_tensor(parafac(flat, 24, n_iter_max=200, init="random",
                                        random_state=seed, tol=0))).norm().item()
        for seed in range(2)
    )  # fmt: skip
    basis = CP().prepare(weight[None])
    assert basis.fitted_error([24]) * weight.norm().item() <= 1.02 * plain
    assert component_energy(basis.factors([24])) < 5 * weight.square().sum().item()


def test_cp_sensitivity_is_what_stability_buys():
    weight = trained_kernel(16, 16)[None]
    free, held = (CP(stability=s, sweeps=200).prepare(weight) for s in (0.0, 0.1))
    assert component_energy(held.factors([16])) < component_energy(free.factors([16]))
    assert free.fitted_error([16]) < held.fitted_error([16])


def test_branches_lose_less_than_a_plain_core_of_the_same_size():
    (layer,) = find_layers(nn.Sequential(nn.Conv2d(20, 24, 3)))
    weight = trained_kernel()[None]
    for branches, rank in ((2, 12), (4, 12)):
        method = BranchedTucker(branches=branches)
        size = method.params(layer, (rank, rank))
        plain = max(
            (first, second)
            for first in range(1, 20)
            for second in (first, first + 1)
            if Tucker2().params(layer, (first, second)) <= size
        )
        fitted = method.prepare(weight).fitted_error((rank, rank))
        assert fitted < Tucker2(hooi=3).prepare(weight).error(plain)
        cut = BranchedTucker(branches=branches, init="truncate").prepare(weight)
        assert cut.fitted_error((rank, rank)) > fitted


def test_truncated_branches_are_the_diagonal_blocks_of_the_core():
    weight = trained_kernel(8, 8)[None]
    (layer,) = find_layers(nn.Sequential(nn.Conv2d(8, 8, 3)))
    plain = Tucker2().prepare(weight).factors((4, 6))
    core = plain["core.weight"].clone()  # [6, 4, 3, 3]
    blocks = torch.zeros_like(core)
    blocks[:3, :2], blocks[3:, 2:] = core[:3, :2], core[3:, 2:]
    expected = torch.einsum(
        "sq,qpij,pc->scij",
        plain["last.weight"][..., 0, 0],
        blocks,
        plain["first.weight"][..., 0, 0],
    )
    found = dense_weight(BranchedTucker(init="truncate"), layer, weight, (4, 6))[0]
    # Output vectors first here, input vectors first there: the same to a few percent.
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_tt_matches_tensorly():
    import tensorly as tl
    from tensorly.decomposition import tensor_train

    tl.set_backend("pytorch")
    weight = trained_kernel()
    ordered = weight.permute(1, 2, 3, 0)
    train = tensor_train(ordered, [1, 9, 14, 11, 1])
    reference = ((ordered - tl.tt_to_tensor(train)).norm() / ordered.norm()).item()
    assert TT().prepare(weight[None]).fitted_error([9, 14, 11]) == pytest.approx(
        reference, rel=1e-6
    )


def test_estimates_are_near_what_is_fitted():
    weight = trained_kernel()[None]
    for method, ranks, near in (
        (CP(), [30], 0.2),  # few sweeps are not enough between anchors
        (BranchedTucker(), [14, 14], 0.1),
        (TT(), [10, 20, 12], 0.1),
    ):
        basis = method.prepare(weight)
        assert float(basis.error(ranks)) == pytest.approx(basis.fitted_error(ranks), rel=near)


@pytest.mark.parametrize(
    ("method", "choices"),
    [
        (CP(), ([1], [4], [16], [48])),
        (BranchedTucker(), ([2, 2], [6, 6], [16, 16])),
        (TT(), ([1, 1, 1], [4, 8, 6], [12, 16, 10])),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_estimates_hold_at_small_ranks_of_outputs_that_need_few(method, choices):
    """A late layer: its weight is noise, its inputs lie in few directions."""
    torch.manual_seed(0)
    weight = torch.randn(1, 48, 48, 3, 3)
    patches = torch.randn(4000, 12) @ torch.randn(12, 48 * 9) + 0.02 * torch.randn(4000, 48 * 9)
    moments = Moments((patches.mT @ patches / 4000).double()[None], 9, 4000)
    basis = method.prepare(weight, moments)
    for ranks in choices:
        estimate, truth = float(basis.error(ranks)), basis.fitted_error(ranks)
        assert truth / 1.6 < estimate < 1.6 * truth


@pytest.mark.parametrize(
    "make",
    [
        lambda: SVD(stride_on="middle"),
        lambda: Tucker2(hooi=-1),
        lambda: CP(stability=-1.0),
        lambda: CP(sweeps=0),
        lambda: BranchedTucker(branches=1),
        lambda: BranchedTucker(init="zeros"),
    ],
)
def test_settings_are_validated(make):
    with pytest.raises(ValueError, match="expected"):
        make()

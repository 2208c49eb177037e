"""Fitted factors that follow the moments of whole patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import check_grad
from torch import nn

import rankopt
from rankopt._calibration.moments import Moments
from rankopt._decompositions import CP, TT, BranchedTucker, DepthwiseSeparable, SpatialSVD, Tucker2
from rankopt._decompositions.cache import BasisCache
from rankopt._decompositions.fitted import FittedBasis
from rankopt._decompositions.rebuild import rebuild
from rankopt._decompositions.refining import _Problem, refined
from rankopt._model.layers import find_layers

MANY = 10**6
CASES = [
    (CP(), (10,)),
    (BranchedTucker(), (6, 8)),
    (TT(), (6, 10, 8)),
    (DepthwiseSeparable(), (2,)),
]

# Their errors are of nested factors, in closed form; what the refined ones lose is less.
CLOSED = [
    (SpatialSVD(), (6,)),
    (Tucker2(), (6, 8)),
    (Tucker2(), (6, 16)),
]


def ways(cases):
    return pytest.mark.parametrize(
        ("method", "ranks"), cases, ids=lambda value: getattr(value, "name", "")
    )


each_fitted, each_way = ways(CASES), ways(CASES + CLOSED)


def patches(channels=12, *, seed=0):
    """Moments of 3x3 patches of smooth images with correlated channels, [n, n]."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(8, channels, 24, 24, generator=draw, dtype=torch.float64)
    images = nn.functional.avg_pool2d(images, 3, stride=1)
    mixing = torch.randn(channels, channels, generator=draw, dtype=torch.float64)
    images = torch.relu(torch.einsum("cd,bdij->bcij", mixing, images))
    rows = nn.functional.unfold(images, 3).transpose(1, 2).flatten(0, 1)
    return rows.mT @ rows / len(rows)


def kernel(outputs=16, channels=12, *, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(1, outputs, channels, 3, 3, generator=draw, dtype=torch.float64)


def prepared(method, weight, count):
    return method.prepare(weight, Moments(patches()[None], 9, count))


@each_fitted
def test_all_factors_follow_the_patches_once_there_are_enough_of_them(method, ranks):
    weight = kernel()
    few, many = (prepared(method, weight, count) for count in (2 * 108, MANY))
    assert many.fitted_error(ranks) < 0.97 * few.fitted_error(ranks)
    assert float(many.error(ranks)) < float(few.error(ranks))
    # With few the leading factors are those that know the channels alone.
    last = list(few.factors(ranks))[-1]
    other = prepared(method, weight, 0).factors(ranks)
    for name, factor in few.factors(ranks).items():
        assert name == last or torch.equal(factor, other[name])


def prepared_at(method, scale, square):
    """As `prepared`, weight and inputs scaled."""
    return method.prepare(scale * kernel(), Moments(patches()[None] * square, 9, MANY))


def posed(method, ranks):
    """Arguments of `refined` for one group."""
    basis = prepared(method, kernel(), MANY)
    assert isinstance(basis, FittedBasis)
    (tensor,) = basis._tensor
    leading = basis._fit(tensor, ranks, thorough=False)
    (moments,) = basis._whitened_patches(basis._tensor)
    return leading, tensor.flatten(1), moments, basis._features, basis._penalty(tensor, ranks)


def cp_problem(stability=0.02):
    return posed(CP(stability=stability), (10,))


@each_fitted
def test_gradients_are_those_of_the_objective(method, ranks):
    problem = _Problem(*posed(method, ranks))
    place = problem.start + 0.1 * np.random.default_rng(0).standard_normal(problem.start.shape)
    slope = problem(place)[1]
    gap = check_grad(lambda x: problem(x)[0], lambda x: problem(x)[1], place, seed=0)
    assert gap < 1e-4 * np.linalg.norm(slope)


def test_the_objective_is_the_error_and_the_penalty():
    leading, weight, moments, features, penalty = cp_problem()
    problem = _Problem(leading, weight, moments, features, None)
    rows = features(leading).flatten(1)
    last = torch.linalg.lstsq(
        (torch.linalg.cholesky(moments).mT @ rows.mT), torch.linalg.cholesky(moments).mT @ weight.mT
    ).solution.mT
    gap = weight - last @ rows
    expected = ((gap @ moments * gap).sum() / (weight @ moments * weight).sum()).item()
    assert problem(problem.start)[0] == pytest.approx(expected, rel=1e-6)
    held = _Problem(leading, weight, moments, features, penalty)
    assert held(held.start)[0] > expected


def test_what_is_exact_stays_exact():
    # A penalty could be lowered by giving up some of the fit.
    leading, _, moments, features, penalty = cp_problem(stability=1.0)
    weight = torch.ones(4, 10, dtype=torch.float64) @ features(leading).flatten(1)
    found = refined(leading, weight, moments, features, penalty)
    for factor, start in zip(found, leading, strict=True):
        torch.testing.assert_close(factor, start)


def test_a_weight_of_zeros_is_left_alone():
    leading, weight, moments, features, penalty = cp_problem()
    found = refined(leading, 0 * weight, moments, features, penalty)
    assert all(a is b for a, b in zip(found, leading, strict=True))


def lost(method, basis, ranks):
    """Relative output error of the factors, by the chain they make."""
    size = basis.weight.shape
    conv = nn.Conv2d(size[0] * size[2], size[0] * size[1], 3, groups=size[0], bias=False)
    (layer,) = find_layers(nn.Sequential(conv.double()))
    near = rebuild(method, layer, ranks, basis.factors(ranks)).reshape(size)
    gap, dense = ((basis.weight - x).flatten(2) for x in (near, torch.zeros_like(near)))
    parts = [(x @ basis._moments.damped * x).sum() for x in (gap, dense)]
    return (parts[0] / parts[1]).sqrt().item()


@pytest.mark.parametrize(("method", "ranks"), CLOSED)
def test_factors_lose_less_than_the_closed_form_says(method, ranks):
    few, many = (prepared(method, kernel(), count) for count in (2 * 108, MANY))
    stated = float(many.error(ranks))
    assert stated == float(few.error(ranks))
    assert lost(method, few, ranks) == pytest.approx(stated, rel=1e-6)
    assert few.fitted_error(ranks) == stated
    refined_error = lost(method, many, ranks)
    assert refined_error < 0.97 * stated
    assert many.fitted_error(ranks) == pytest.approx(refined_error, rel=1e-6)


@pytest.mark.parametrize("method", [SpatialSVD(), Tucker2()], ids=lambda method: method.name)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_factors_lose_no_more_than_the_closed_form_says(method, data):
    groups = data.draw(st.integers(1, 2))
    outputs, inputs = (data.draw(st.integers(2, 7)) for _ in range(2))
    seed = data.draw(st.integers(0, 99))
    weight = torch.cat([kernel(outputs, inputs, seed=seed + group) for group in range(groups)])
    second = torch.stack([patches(inputs, seed=seed + group) for group in range(groups)])
    basis = method.prepare(weight, Moments(second, 9, MANY))
    most = (3 * min(inputs, outputs),) if method.name == "spatial_svd" else (inputs, outputs)
    ranks = tuple(data.draw(st.integers(1, rank)) for rank in most)
    stated, found = float(basis.error(ranks)), lost(method, basis, ranks)
    assert found <= stated + 1e-5
    assert basis.fitted_error(ranks) == pytest.approx(found, abs=1e-5)
    if ranks == most:
        assert found < 1e-5


def test_superfluous_output_ranks_leave_no_large_columns():
    weight = kernel()
    weight[:, 4:] = 0.0  # pruned filters: the output mode has rank 4
    factors = prepared(Tucker2(), weight, MANY).factors((6, 8))
    lengths = factors["last.weight"].flatten(1).norm(dim=0)
    assert lengths.max() < 1 + 1e-6


def test_a_group_of_zeros_with_denormals_flushed():
    weight = torch.cat([kernel(), 0 * kernel()])
    second = torch.stack([patches(), patches(seed=3)])
    torch.set_flush_denormal(True)
    try:
        factors = Tucker2().prepare(weight, Moments(second, 9, MANY)).factors((6, 8))
    finally:
        torch.set_flush_denormal(False)
    assert all(factor.isfinite().all() for factor in factors.values())


def test_at_full_input_rank_the_regression_is_the_best():
    nested, basis = (prepared(Tucker2(), kernel(), count) for count in (0, MANY))
    for name, factor in basis.factors((12, 8)).items():
        assert torch.equal(factor, nested.factors((12, 8))[name])


@each_way
def test_the_scale_of_weights_and_inputs_does_not_matter(method, ranks):
    errors = [
        prepared_at(method, by, square).fitted_error(ranks)
        for by, square in ((1.0, 1.0), (1e3, 1.0), (1e-4, 1e-6), (30.0, 1e6))
    ]
    assert errors == pytest.approx([errors[0]] * 4, rel=5e-3)


@each_way
def test_groups_are_refined_one_by_one(method, ranks):
    weights = [kernel(seed=seed) for seed in (1, 2)]
    parts = [patches(seed=seed)[None] for seed in (3, 4)]
    both = method.prepare(torch.cat(weights), Moments(torch.cat(parts), 9, MANY)).factors(ranks)
    alone = [
        method.prepare(weight, Moments(part, 9, MANY)).factors(ranks)
        for weight, part in zip(weights, parts, strict=True)
    ]
    for name, factor in both.items():
        expected = torch.cat([factors[name] for factors in alone])
        torch.testing.assert_close(factor, expected, rtol=1e-3, atol=1e-3)


@each_way
def test_factors_are_fitted_in_inference_mode_too(method, ranks):
    with torch.inference_mode():
        error = prepared(method, kernel(), MANY).fitted_error(ranks)
    assert error == pytest.approx(prepared(method, kernel(), MANY).fitted_error(ranks), rel=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@each_way
def test_channels_that_are_dead_need_no_large_factors(method, ranks, scale):
    still = patches() * scale**2
    still[9:27], still[:, 9:27] = 0.0, 0.0
    for count in (0, MANY):
        basis = method.prepare(kernel(), Moments(still[None], 9, count))
        assert basis.fitted_error(ranks) < 1
        for factor in basis.factors(ranks).values():
            assert factor.abs().max() < 1e4


def test_inputs_of_zeros_are_allowed():
    weight = torch.randn(1, 16, 160, 3, 3)
    for moments in (
        Moments(torch.zeros(1, 160, 160, dtype=torch.float64), 1, MANY),
        Moments(torch.zeros(1, 1440, 1440, dtype=torch.float64), 9, 0),
    ):
        factors = DepthwiseSeparable().prepare(weight, moments).factors((2,))
        assert all(factor.isfinite().all() for factor in factors.values())


def test_the_count_of_positions_is_part_of_what_is_kept():
    cache, weight, second = BasisCache(), kernel(), patches()[None]
    errors = [
        cache.get(CP(), weight, Moments(second, 9, count)).fitted_error((10,))
        for count in (0, MANY)
    ]
    assert errors[1] < 0.97 * errors[0]


def test_a_rounding_is_of_channels_not_of_filters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU())
    for round_to, allowed in ((8, {1, 2, 3, 4}), (32, {2, 4})):
        plan = rankopt.search(
            model,
            "macs<=60%",
            example_inputs=torch.randn(1, 16, 12, 12),
            methods=("depthwise_separable",),
            round_to=round_to,
        )
        (decision,) = plan.changes
        assert decision.args["ranks"][0] in allowed


def test_separable_kernels_are_found_again():
    draw = torch.Generator().manual_seed(2)
    filters = torch.randn(12, 2, 9, generator=draw, dtype=torch.float64)
    mixing = torch.randn(16, 12, 2, generator=draw, dtype=torch.float64)
    weight = torch.einsum("scm,cmk->sck", mixing, filters).reshape(1, 16, 12, 3, 3)
    for moments in (None, Moments(patches()[None], 9, 0), Moments(patches()[None], 9, MANY)):
        assert DepthwiseSeparable().prepare(weight, moments).fitted_error((2,)) < 1e-5


def test_separable_errors_are_what_the_channels_svds_discard():
    weight = kernel()
    values = torch.linalg.svdvals(weight[0].flatten(2).transpose(0, 1))  # [C, 9]
    for rank in (1, 3, 8):
        expected = (values[:, rank:].square().sum() / values.square().sum()).sqrt().item()
        basis = DepthwiseSeparable().prepare(weight)
        assert basis.fitted_error((rank,)) == pytest.approx(expected, rel=1e-6)
        assert float(basis.error((rank,))) == pytest.approx(expected, rel=1e-6)

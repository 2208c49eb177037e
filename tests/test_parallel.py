from __future__ import annotations

import pytest
import torch

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
from rankopt._decompositions.cache import DEFAULT_BYTES, BasisCache, shared
from rankopt._model.layers import find_layers
from rankopt._utils.parallel import for_each, largest_first


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_do_not_depend_on_threads(threads):
    items = [torch.randn(n, n, dtype=torch.float64) for n in (5, 40, 7)]
    results = for_each(torch.linalg.svdvals, items, device=torch.device("cpu"))
    found = {id(item): value for item, value in results}
    assert all(torch.equal(found[id(item)], torch.linalg.svdvals(item)) for item in items)
    assert torch.get_num_threads() == threads


def test_failures_surface_and_threads_come_back(threads):
    def fail(item):
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item"):
        list(for_each(fail, [1, 2, 3], device=torch.device("cpu")))
    assert torch.get_num_threads() == threads


def test_gradients_are_off_in_every_thread(threads):
    weight = torch.nn.Parameter(torch.ones(3))
    with torch.no_grad():
        results = for_each(lambda i: weight * i, [1, 2, 3], device=torch.device("cpu"))
        assert not any(value.requires_grad for _, value in results)


def test_largest_first():
    assert largest_first(["a", "ccc", "bb"], len) == ["ccc", "bb", "a"]


def test_cache_is_bounded_and_content_addressed():
    weights = [torch.randn(1, 16, 16) for _ in range(4)]
    cache = BasisCache(max_bytes=2 * 16 * 16 * 8)
    first = cache.get(SVD(), weights[0])
    assert cache.get(SVD(), weights[0].clone())._vectors is first._vectors
    changed = weights[0].clone()
    changed[0, 0, 0] += 1
    assert cache.get(SVD(), changed)._vectors is not first._vectors
    for weight in weights[1:]:
        cache.get(SVD(), weight)
    assert cache._bytes <= cache.max_bytes
    assert cache.get(SVD(), weights[0])._vectors is not first._vectors
    cache.clear()
    assert cache._bytes == 0


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize(
    "method",
    [SVD(), SpatialSVD(), Tucker2(), CP(), DepthwiseSeparable(), TT(), BranchedTucker()],
    ids=lambda m: m.name,
)
def test_what_leaves_the_cache_gives_its_matrices_back_and_keeps_its_errors(method, aware):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(6, 8, 1 if method.name == "svd" else 3, bias=False).double()
    (layer,) = find_layers(torch.nn.Sequential(conv))
    weight = conv.weight.detach()[None]
    rows = torch.randn(1, 400, weight[0, 0].numel(), dtype=torch.float64)
    pixels = weight[0, 0, 0].numel()
    moments = Moments(rows.mT @ rows / 400, pixels, 400) if aware else None
    ranks = [axis.step * 2 for axis in method.rank_axes(layer)]
    cache = BasisCache(max_bytes=10**6)
    basis = cache.get(method, weight, moments)
    error, factors = basis.error(ranks), basis.factors(ranks)
    other = torch.randn(1, 2, 2, dtype=torch.float64)
    cache.max_bytes = 2 * 2 * 8
    cache.get(SVD(), other)  # and nothing else has room
    held = [
        part for part in getattr(basis, "_parts", {}).values() if isinstance(part, torch.Tensor)
    ]
    assert held == []
    assert basis.error(ranks) == error
    again = basis.factors(ranks)
    assert all(torch.allclose(again[name], value) for name, value in factors.items())


def test_the_shared_cache_is_cleared_and_bounded():
    model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    weight = model[0].weight.detach()[None]
    try:
        rankopt.clear_cache()
        rankopt.search(model, "params<=60%")
        held = shared.get(SVD(), weight)._vectors
        assert shared.get(SVD(), weight)._vectors is held
        rankopt.clear_cache()
        assert shared.get(SVD(), weight)._vectors is not held
        rankopt.clear_cache(max_bytes=0)
        rankopt.search(model, "params<=60%")
        assert shared._bytes == 0
        rankopt.clear_cache()  # the bound stays
        assert shared.max_bytes == 0
    finally:
        rankopt.clear_cache(max_bytes=DEFAULT_BYTES)


@pytest.mark.parametrize("bad", [-1, 1.5, True])
def test_bounds_of_the_cache_are_validated(bad):
    with pytest.raises(ValueError, match=f"max_bytes={bad!r}: expected a whole number"):
        rankopt.clear_cache(max_bytes=bad)

from __future__ import annotations

import pytest
import torch

from rankopt._parallel import for_each, largest_first
from rankopt.decompositions.cache import BasisCache
from rankopt.decompositions.svd import SVD


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

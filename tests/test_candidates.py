from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankopt._timing.candidates import aligned_below, cliffs, grid_values, line, lowest_on_line


@given(st.integers(1, 5000), st.integers(2, 32), st.sampled_from([1, 8, 12, 16]))
def test_grids_are_few_aligned_and_reach_the_maximum(maximum, count, multiple):
    values = grid_values(maximum, count, multiple)
    assert values[-1] == maximum
    assert values[0] >= 1
    assert (np.diff(values) > 0).all()
    assert len(values) <= count + 3
    if multiple <= maximum:
        assert all(value % multiple == 0 or value == maximum for value in values)


@given(st.lists(st.integers(1, 600), min_size=1, max_size=2), st.data())
def test_candidates_lie_between_the_bounds(upper, data):
    first = data.draw(st.integers(1, max(upper)))
    lower = line(upper, first)
    found = aligned_below(upper, lower)
    assert tuple(upper) in found
    assert lower in found
    assert len(found) <= 4 * 24
    for ranks in found:
        assert all(low <= r <= up for low, r, up in zip(lower, ranks, upper, strict=True))


def test_candidates_are_aligned_on_both_axes():
    inner = set(aligned_below((309, 309), (242, 242))) - {(309, 309), (242, 242)}
    assert (256, 256) in inner
    assert inner == {(rank, rank) for rank in range(248, 309, 8)}
    for ranks in set(aligned_below((150, 300), (110, 220))) - {(150, 300), (110, 220)}:
        assert all(rank % 8 == 0 for rank in ranks)
    assert aligned_below((1024,), (682,), ()) == [(1024,), (682,)]


@given(st.integers(1, 400), st.integers(1, 400), st.floats(0, 1))
def test_the_lowest_point_is_the_largest_within_the_limit(first, second, share):
    def cost(ranks):
        return ranks[0] * 3 + ranks[1]

    limit = share * cost((first, second))
    found = lowest_on_line((first, second), cost, limit)
    longest = max(first, second)
    allowed = [n for n in range(1, longest + 1) if cost(line((first, second), n)) <= limit]
    assert found == line((first, second), max(allowed, default=1))


def test_cliffs_are_steeper_than_the_work():
    ranks = list(range(200, 300, 8))
    smooth = [float(rank) for rank in ranks]
    assert cliffs(ranks, smooth, smooth) == []
    steps = [float(-(-rank // 64) * 64) for rank in ranks]
    assert cliffs(ranks, steps, smooth) == [(256, 264)]
    assert cliffs([1], [1.0], [1.0]) == []
    flat = [1.0 + 0.001 * (i % 2) for i in range(len(ranks))]
    assert cliffs(ranks, flat, smooth) == []


@pytest.mark.parametrize("upper", [(7,), (3, 5), (1, 1)])
def test_tiny_ranks_have_candidates_too(upper):
    assert aligned_below(upper, (1,) * len(upper))[0] == upper

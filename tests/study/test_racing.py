from __future__ import annotations

import numpy as np
import pytest

from rankopt._study.racing import MIN_BATCHES, Rival, bound, hopeless


def values(numbers):
    return [(float(number), 1.0) for number in numbers]


def test_bound_covers_the_mean():
    """A one-sided 95% bound lies above the mean of all batches about 95% of the time."""
    draw = np.random.default_rng(0)
    for seen, total in ((5, None), (5, 20), (15, 20)):
        covered = []
        for _ in range(2000):
            batches = draw.normal(size=total or 4000)
            found = bound(batches[:seen], np.ones(seen), total, 0.95)
            covered.append(found >= (batches.mean() if total else 0.0))
        assert 0.93 < np.mean(covered) < 0.97


def test_clearly_worse_is_stopped_and_clearly_better_is_not():
    draw = np.random.default_rng(0)
    hard = draw.normal(size=20)  # what makes a batch hard for every model
    rival = Rival(3, values(hard))
    worse = values(hard[:6] - 0.1 + 0.01 * draw.normal(size=6))
    better = values(hard[:6] + 0.1 + 0.01 * draw.normal(size=6))
    assert "behind trial 3" in hopeless(worse, [rival], maximise=True, total=20)
    assert hopeless(better, [rival], maximise=True, total=20) is None
    # For a metric to minimise it is the other way round.
    assert hopeless(worse, [rival], maximise=False, total=20) is None
    assert "behind trial 3" in hopeless(better, [rival], maximise=False, total=20)
    # Unpaired, the batches' own spread hides the same difference.
    unpaired = Rival(3, [(float(hard.mean()), 20.0)])
    assert hopeless(worse, [unpaired], maximise=True, total=20) is None


def test_rarely_stops_an_equal():
    draw = np.random.default_rng(1)
    stopped = 0
    for _ in range(300):
        rival = Rival(0, values(draw.normal(size=20)))
        mine = values(draw.normal(size=20))
        looks = range(1, 20)
        stopped += any(
            hopeless(mine[:k], [rival], maximise=True, total=20) is not None
            for k in looks
            if np.mean([v for v, _ in mine]) >= np.mean([v for v, _ in rival.values])
        )
    assert stopped <= 15  # 1% per look, of looks that are far from independent


def test_floor():
    dense = values([0.6, 0.59, 0.61, 0.6, 0.9])
    low = values([0.1, 0.11, 0.09, 0.1])
    assert "infeasible" in hopeless(low, [], maximise=True, drop=0.3, dense=dense)
    assert hopeless(low, [], maximise=True, drop=0.6, dense=dense) is None
    assert hopeless(low, [], maximise=False, drop=0.3, dense=dense) is None
    assert "infeasible" in hopeless(dense[:4], [], maximise=False, drop=0.3, dense=low * 2)
    assert hopeless(low, [], maximise=True, drop=0.3) is None


def test_hard_batches_first_stop_nobody():
    """Images sorted by class: the first batches are hard for the dense model too."""
    dense = values([0.2, 0.25, 0.2, 0.95, 0.9, 0.95])
    near = values([0.2, 0.24, 0.2])
    assert hopeless(near, [], maximise=True, drop=0.02, dense=dense, total=6) is None


def test_three_alike_images_say_nothing():
    wrong, right = values([0.0] * 3), values([1.0] * 50)
    assert hopeless(wrong, [Rival(1, right)], maximise=True, total=50) is None
    assert hopeless(values([0.0] * 12), [Rival(1, right)], maximise=True, total=50) is not None


@pytest.mark.parametrize("seen", range(MIN_BATCHES))
def test_too_few_batches_say_nothing(seen):
    assert hopeless(values([0.0] * seen), [Rival(0, values([9.0] * 9))], maximise=True) is None


def test_the_last_batch_is_not_stopped():
    rival = Rival(0, values([1.0] * 4))
    assert hopeless(values([0.0] * 4), [rival], maximise=True, total=4) is None

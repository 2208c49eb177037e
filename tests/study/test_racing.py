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
    low = values([0.1, 0.11, 0.09, 0.1])
    assert "infeasible" in hopeless(low, [], maximise=True, floor=0.5)
    assert hopeless(low, [], maximise=True, floor=0.05) is None
    assert "infeasible" in hopeless(low, [], maximise=False, floor=0.05)


@pytest.mark.parametrize("seen", range(MIN_BATCHES))
def test_too_few_batches_say_nothing(seen):
    assert hopeless(values([0.0] * seen), [Rival(0, values([9.0] * 9))], maximise=True) is None


def test_the_last_batch_is_not_stopped():
    rival = Rival(0, values([1.0] * 4))
    assert hopeless(values([0.0] * 4), [rival], maximise=True, total=4) is None

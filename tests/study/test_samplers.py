from __future__ import annotations

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from study_common import open_study

from rankopt._study.local import LocalSampler
from rankopt._study.samplers import SAMPLERS
from rankopt.errors import StudyError

QUICK = sorted(set(SAMPLERS) - {"gp"})


@pytest.mark.parametrize("sampler", QUICK)
def test_every_sampler_runs(sampler):
    assert len(open_study(sampler=sampler, space="tilt").run(n_trials=8).points) >= 5


def test_one_of_the_users_own():
    theirs = optuna.samplers.RandomSampler(seed=1)
    storage = optuna.storages.InMemoryStorage()
    assert open_study(storage, sampler=theirs).request["sampler"] == "RandomSampler"
    with pytest.raises(StudyError, match="sampler of the caller's own .*: give sampler= again"):
        open_study(storage)
    assert open_study(storage, sampler=theirs).request["sampler"] == "RandomSampler"


def begun(names, seed=0):
    """A study of (metric up, size down) with two points on the front and one behind."""
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=LocalSampler(seed))
    space = {name: FloatDistribution(-1.0, 1.0) for name in names}
    if "size" in space:
        space["size"] = FloatDistribution(0.1, 1.0)
    for size, metric, tilt in ((0.3, 0.5, 0.25), (0.6, 0.8, -0.25), (0.7, 0.4, 0.9)):
        params = {name: size if name == "size" else tilt for name in names}
        study.add_trial(
            optuna.create_trial(params=params, distributions=space, values=[metric, size])
        )
    return study, space


def drawn(study, space, count):
    return [study.ask(space).params for _ in range(count)]


def test_steps_start_from_the_front():
    names = ["size", *(f"tilt:{i}" for i in range(20))]
    found = drawn(*begun(names), 60)
    for params in found:
        tilts = np.array([params[name] for name in names[1:]])
        near = {base: int((tilts == base).sum()) for base in (0.25, -0.25, 0.9)}
        assert near[0.9] == 0  # the beaten point is no parent
        assert max(near.values()) >= 10  # few parameters move …
        assert max(near.values()) < 20  # … and one at least
        assert (np.abs(tilts) <= 1).all()
        assert 0.1 <= params["size"] <= 1
    kept = [params for params in found if params["size"] in (0.3, 0.6)]
    assert 20 < len(kept) < 60
    assert {params["size"] for params in kept} == {0.3, 0.6}
    # Parameters found good at one size are tried at the other.
    assert any(
        params["size"] == 0.3 and list(params.values()).count(-0.25) >= 10 for params in kept
    )


def test_a_space_without_size():
    names = [f"share:{i}" for i in range(6)]
    for params in drawn(*begun(names), 20):
        values = list(params.values())
        assert max(values.count(0.25), values.count(-0.25)) >= 1
        assert values.count(0.9) == 0


def test_the_first_trials_are_at_random_and_seeds_repeat():
    space = {"a": FloatDistribution(0.0, 1.0), "size": FloatDistribution(0.0, 1.0)}
    first, second, other = (
        optuna.create_study(directions=["maximize", "minimize"], sampler=LocalSampler(seed))
        for seed in (1, 1, 2)
    )
    assert drawn(first, space, 3) == drawn(second, space, 3)
    assert drawn(other, space, 3) != drawn(second, space, 3)
    names = ["size", "tilt:a", "tilt:b"]
    assert drawn(*begun(names, 1), 9) == drawn(*begun(names, 1), 9)
    assert drawn(*begun(names, 1), 9) != drawn(*begun(names, 2), 9)

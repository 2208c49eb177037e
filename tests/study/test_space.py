from __future__ import annotations

import numpy as np
import pytest
import torch
from study_common import open_study

import rankopt
from rankopt._search.opening import open_problem
from rankopt._study.choices import make_space
from rankopt._study.records import key_of, options_in, options_of, rows_of
from rankopt._study.space import SPACES, stages
from rankopt.budget import Budget
from rankopt.errors import StudyError
from rankopt.strategy import Strategy
from rankopt.strategy.allocation import GOOD_GAP, damage
from rankopt.testing import planted_inputs, planted_model


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def problem(budget=None, calibration=None):
    with torch.no_grad():
        return open_problem(
            planted_model(), Budget.parse(budget), example_inputs=planted_inputs(),
            calibration=calibration, methods=Strategy.methods,
        ).problem  # fmt: skip


@pytest.mark.parametrize("kind", sorted(SPACES))
def test_every_point_is_a_plan(kind):
    found = problem("macs<=60%")
    space = make_space(kind, found, "macs")
    draw = np.random.default_rng(0)
    seen = set()
    for _ in range(20):
        params = {name: draw.uniform(low, high) for name, (low, high) in space.bounds.items()}
        options = space.options(params)
        assert len(options) == len(found.sites)
        seen.add(key_of(rows_of(options)))
        if kind == "warp":  # within the budget by construction
            assert found.figures(options)["macs"] <= 0.6 * found.totals["macs"]
        again = space.options(space.encode(options))
        if kind == "layer":
            assert key_of(rows_of(again)) == key_of(rows_of(options))
    assert len(seen) > 10


def test_the_middle_of_the_warp_is_the_knapsack():
    data = [torch.randn(64, 3, 12, 12)]
    found = problem("macs<=50%", data)
    space = make_space("warp", found, "macs")
    plan = rankopt.search(
        planted_model(), "macs<=50%", example_inputs=planted_inputs(), calibration=data,
        methods=Strategy.methods,
    )  # fmt: skip
    theirs = options_in(found, plan)
    params = space.encode(theirs)
    assert params["power"] == 0.5
    assert {params[name] for name in ("depth", "bend", "cost", "kernel")} == {0.0}
    mine = space.options({**params, "size": 0.5})

    def total(options):
        weights = np.sqrt(space.sensitivities)
        return sum(w * damage(o) for w, o in zip(weights, options, strict=True))

    # The warp relaxes; the strategy also closes the last gap.
    assert total(theirs) * (1 - GOOD_GAP) <= total(mine) <= 1.1 * total(theirs)


def test_a_described_space_is_the_same_space():
    data = [torch.randn(64, 3, 12, 12)]
    first = make_space("warp", problem(calibration=data), "macs")
    spec = first.describe()
    second = make_space("warp", problem(), "macs", spec)  # needs no calibration any more
    assert second.describe() == spec
    assert second.bounds == first.bounds
    with pytest.raises(StudyError, match="searches other layers"):
        make_space("warp", problem(), "macs", {**spec, "sites": ["a", "b"]})
    with pytest.raises(StudyError, match="space='grid': expected one of warp"):
        make_space("grid", problem(), "macs")


def test_options_survive_the_storage():
    found = problem("macs<=60%")
    plan = rankopt.search(
        planted_model(), "macs<=60%", example_inputs=planted_inputs(), methods=Strategy.methods
    )
    options = options_in(found, plan)
    back = options_of(found, rows_of(options), "r")
    assert [(o.method, o.args, o.cost, o.error) for o in back] == [
        (o.method, o.args, o.cost, o.error) for o in options
    ]


def test_stages():
    names = [f"encoder.layers.{i}.{part}" for i in range(6) for part in ("attn", "mlp")]
    found = stages(["stem", *names, "head"])
    assert found[0] == "stem"
    assert found[1] == found[2] == "encoder.layers.0"
    assert stages(["a", "b"]) == ["a", "b"]
    assert stages(["x"]) == ["x"]


def test_sizes_asked_for_are_the_sizes_of_all_trials(tmp_path):
    path = tmp_path / "s.db"
    sizes = (0.7, 0.5, 0.35)
    with open_study(path, sizes=sizes).run(n_trials=16) as study:
        dense = study.request["plan"]["totals"]["macs"]["before"]
        found = {}
        for point in study.points:
            share = point.figures["macs"] / dense
            if point.warm != "dense":
                size = min(one for one in sizes if share <= one)
                found.setdefault(size, []).append(share / size)
        warm = {point.warm for point in study.points}
    assert set(found) == set(sizes)
    assert all(np.median(shares) > 0.9 for shares in found.values())
    assert {"knapsack at 70%", "knapsack at 50%", "knapsack at 35%"} <= warm
    again = open_study(path)
    assert again.request["space"]["sizes"] == sorted(sizes)
    assert len(again.run(n_trials=18).points) >= 17
    with pytest.raises(StudyError, match=r"sizes \[0.35, 0.5, 0.7\], the request \[0.6\]"):
        open_study(path, sizes=(0.6,))


def test_sizes_that_no_plan_has_are_refused():
    found = problem("macs<=60%")
    for size in (0.7, 0.001):
        with pytest.raises(StudyError, match=f"sizes=.*{size} is not between .* 0.6 of the macs"):
            make_space("warp", found, "macs", sizes=[size])
    with pytest.raises(StudyError, match="a space with a size: 'warp' or 'tilt'"):
        make_space("layer", found, "macs", sizes=[0.5])
    space = make_space("warp", found, "macs", sizes=[0.5, 0.3], asymmetric="search")
    again = make_space("warp", found, "macs", space.describe(), asymmetric="search")
    assert again.sizes == space.sizes == (0.3, 0.5)
    params = space.encode(space.options({**dict.fromkeys(space.bounds, 0.6), "size_index": 1.2}))
    assert params["size_index"] == 1.5
    assert "size" not in params


def test_small_steps_go_to_all_sizes_alike():
    study = open_study(sizes=(0.7, 0.5, 0.35), space="tilt", sampler="local").run(n_trials=40)
    dense = study.request["plan"]["totals"]["macs"]["before"]
    found = [point.figures["macs"] / dense for point in study.points if point.warm is None]
    counts = [sum(low < share <= high for share in found)
              for low, high in ((0.5, 0.7), (0.35, 0.5), (0.0, 0.35))]  # fmt: skip
    assert min(counts) >= 5

"""The merging rows of the structure table, arXiv 2407.20266 (table 3), on meta skeletons."""

from __future__ import annotations

import pytest

from benchmarks import paper_structure


@pytest.mark.parametrize(
    ("name", "layers", "macs", "change"),
    [
        ("resnet50", 54, 4_089_184_256, (-51.55, -55.44)),
        pytest.param("resnet101", 105, 7_801_405_440, (-56.48, -59.15), marks=pytest.mark.slow),
        pytest.param("resnet152", 156, 11_513_626_624, (-58.20, -60.47), marks=pytest.mark.slow),
    ],
)
def test_merging_at_half_the_width(name, layers, macs, change):
    dense = paper_structure.structure(paper_structure.skeleton(name))
    merged = paper_structure.merged(name)
    assert (dense.layers, dense.macs) == (layers, macs)
    assert merged.layers == layers
    assert tuple(round(share, 2) for share in merged.cut(dense)) == change


@pytest.mark.slow
def test_the_table_beside_the_paper():
    cells = {row[0]: row for row in paper_structure.rows("resnet50")}
    assert cells["resnet50, vanilla 2x"][4:6] == ["-50.10", "-43.55"]
    assert cells["resnet50, vanilla, stride first"][4:6] == ["-50.10", "-47.31"]
    # The clock is a model, so the ranks are the same on every machine.
    assert cells["resnet50, optimised ranks, modelled times"][1] == "122"
    assert cells["resnet50, optimised ranks, modelled times"][4:6] == ["-55.52", "-51.14"]
    # With the paper's constant added to both sides its FLOPs come out to rounding.
    assert cells["resnet50, merging"][6] == "-55.09"
    assert cells["resnet50, merging"][7] == "-51.49 / -55.09"

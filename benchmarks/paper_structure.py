"""Layers, parameters and FLOPs of compressed ResNets beside those the paper prints.

Run: python -m benchmarks.paper_structure [--quick]. Structures of arXiv 2407.20266 (table 3),
random weights; only shapes matter. 1 MAC is 2 FLOPs. The paper's FLOPs exceed twice
the MACs of convolutions and linear layers by a constant per network; the last column adds it.
Optimised ranks depend on times: those of this row come from a model of hardware, not from a
clock, so that the row is the same everywhere; the paper's come from its GPU, and it prints no
structure for them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

import rankopt
from benchmarks.foundation import make
from rankopt._build.skeletons import build_empty
from rankopt._model import measure
from rankopt._utils.tables import table, to_text
from rankopt.testing import ModelledClock
from rankopt.vision import import_torchvision
from rankopt_strategies import ParameterRatio, Profiled

NETWORKS: Final = ("resnet50", "resnet101", "resnet152")
# FLOPs of the dense networks as the paper counts them.
PAPER_GFLOPS: Final = {"resnet50": 8.23, "resnet101": 15.68, "resnet152": 23.14}
# (parameters, FLOPs) in percent; the paper has no row for branching in this table.
PAPER: Final = {
    ("vanilla 2x", "resnet50"): (-50.00, -43.26),
    ("vanilla 2x", "resnet101"): (-50.15, -46.53),
    ("vanilla 2x", "resnet152"): (-50.14, -47.69),
    ("merging", "resnet50"): (-51.49, -55.09),
    ("merging", "resnet101"): (-56.40, -58.86),
    ("merging", "resnet152"): (-58.11, -60.18),
}
SIZE: Final = (1, 3, 224, 224)
# Hardware that multiplies in blocks of this many channels, at 100 GFLOPs a second.
CLOCK: Final = ModelledClock(overhead_ms=0.01, macs_per_ms=5e7, multiple=32)


@dataclass(frozen=True)
class Structure:
    """What a network consists of.

    Args:
        layers: Convolutions and linear layers.
        params: Parameters.
        macs: Multiply-accumulates for one image of 224x224 pixels.
    """

    layers: int
    params: int
    macs: int

    def cut(self, dense: Structure) -> tuple[float, float]:
        """Change of parameters and MACs against `dense`, percent."""
        return 100 * (self.params / dense.params - 1), 100 * (self.macs / dense.macs - 1)


def skeleton(name: str) -> nn.Module:
    """The network on the meta device: shapes without values."""
    with torch.device("meta"):
        model: nn.Module = import_torchvision().models.get_model(name, weights=None)
    return model.eval()


def structure(model: nn.Module) -> Structure:
    """Counts of a model, which may lie on the meta device."""
    layers = sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules())
    inputs = torch.empty(SIZE, device=next(model.parameters()).device)
    return Structure(layers, measure.count_params(model), measure.count_macs(model, inputs))


def merged(name: str) -> Structure:
    """Every bottleneck merged at r = p/2; stem, downsamples and classifier untouched."""
    model = skeleton(name)
    return structure(build_empty(model, rankopt.merge_plan(model)).eval())


def halved(model: nn.Module, *methods: Any) -> Structure:
    """Every convolution but the stem, and the classifier, at half of its parameters."""
    plan = rankopt.search(
        model, None, strategy=ParameterRatio(ratio=2.0), methods=methods, ignore=["conv1"]
    )
    return structure(build_empty(model, plan).to("meta").eval())


def optimised(model: nn.Module) -> Structure:
    """`halved` with ranks lowered to the fast side of a cliff of `CLOCK`, kept where none pays."""
    plan = rankopt.search(
        model,
        None,
        strategy=Profiled(base=ParameterRatio(ratio=2.0)),
        methods=[svd("last"), "tucker2"],
        ignore=["conv1"],
        example_inputs=torch.zeros(SIZE),
        profile=rankopt.ProfileTable(clock=CLOCK, rounds=3),
    )
    return structure(build_empty(model, plan).to("meta").eval())


def svd(stride_on: str) -> Any:
    """The decomposition of 1x1 layers; the paper's figures stride the last factor."""
    return rankopt.decompositions.create("svd", stride_on=stride_on)


def branched(model: nn.Module, branches: int) -> Structure | None:
    """`halved` with branched cores; None where that decomposition is not installed."""
    if "branched_tucker" not in rankopt.decompositions.names():
        return None
    method = rankopt.decompositions.create("branched_tucker", branches=branches)
    return halved(model, svd("last"), method, "tucker2")


def rows(name: str) -> Iterator[list[str]]:
    """One line per structure of a network."""
    dense = structure(skeleton(name))
    extra = 1e9 * PAPER_GFLOPS[name] - 2 * dense.macs
    model = make(name)
    variants = {
        "dense": dense,
        "vanilla 2x": halved(model, svd("last"), "tucker2"),
        "vanilla, stride first": halved(model, svd("first"), "tucker2"),
        "optimised ranks, modelled times": optimised(model),
        "merging": merged(name),
        **{f"branching N={n}": branched(model, n) for n in (2, 4)},
    }
    for label, found in variants.items():
        if found is None:
            continue
        params, macs = found.cut(dense)
        flops = 100 * ((2 * found.macs + extra) / (2 * dense.macs + extra) - 1)
        paper = PAPER.get((label, name))
        yield [
            f"{name}, {label}",
            str(found.layers),
            f"{found.params / 1e6:.2f} M",
            f"{2 * found.macs / 1e9:.2f} G",
            f"{params:+.2f}",
            f"{macs:+.2f}",
            f"{flops:+.2f}",
            "–" if paper is None else f"{paper[0]:+.2f} / {paper[1]:+.2f}",
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="ResNet-50 only")
    made = table(
        "Structures of arXiv 2407.20266, 224x224",
        "", "layers", "params", "FLOPs", "params, %", "MACs, %", "paper's FLOPs, %",
        "paper prints",
    )  # fmt: skip
    for name in NETWORKS[: 1 if parser.parse_args().quick else None]:
        for row in rows(name):
            made.add_row(*row)
    print(to_text(made))


if __name__ == "__main__":
    main()

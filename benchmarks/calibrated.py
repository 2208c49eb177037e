"""Accuracy of ResNet-20 on CIFAR-10 without labels, and the time of a global allocation.

Run: python -m benchmarks.calibrated [--rows GLOB] [--recover SECONDS], or with --allocation.
Needs the development data (see `benchmarks.cifar.data_folder`). 1,024 unlabelled training
images; settings were chosen on other training images, the 5,000 validation images are
only reported.
"""

from __future__ import annotations

import argparse
import copy
import time
from fnmatch import fnmatchcase
from typing import Any

import torch

import rankopt
from benchmarks.cifar import correct, images, resnet20
from benchmarks.foundation import make
from rankopt._utils.tables import table, to_text
from rankopt_strategies import Knapsack

HALF, THIRD = "macs<=50%, params<=50%", "macs<=30%, params<=30%"
TWO = ("svd", "tucker2")
CLOSED = (*TWO, "spatial_svd")
FITTED = (*CLOSED, "cp")
DEPTHWISE = (*FITTED, "depthwise_separable")
# Plan, budget, whether to recover it too, settings of the search.
ROWS: list[tuple[str, str, bool, dict[str, Any]]] = [
    (
        "parameter_ratio, weights only",
        HALF,
        False,
        {"strategy": "parameter_ratio", "aware": False},
    ),
    ("parameter_ratio", HALF, False, {"strategy": "parameter_ratio"}),
    ("energy", HALF, False, {"strategy": "energy"}),
    (
        "knapsack, svd and tucker2, equal",
        HALF,
        False,
        {"strategy": Knapsack("equal"), "methods": TWO},
    ),
    ("knapsack, equal", HALF, False, {"strategy": Knapsack("equal")}),
    ("knapsack, measured", HALF, False, {"strategy": Knapsack("measured")}),
    ("knapsack (default)", HALF, True, {}),
    ("knapsack (default), 30%", THIRD, True, {}),
    ("knapsack, asymmetric", HALF, True, {"asymmetric": True}),
    ("knapsack, asymmetric, 30%", THIRD, True, {"asymmetric": True}),
    ("knapsack, fisher", HALF, True, {"fisher": True}),
    ("knapsack, fisher, 30%", THIRD, True, {"fisher": True}),
    ("knapsack, fisher, asymmetric", HALF, True, {"fisher": True, "asymmetric": True}),
    ("knapsack, fisher, asymmetric, 30%", THIRD, True, {"fisher": True, "asymmetric": True}),
    ("knapsack with cp", HALF, True, {"methods": FITTED}),
    ("knapsack with cp, 30%", THIRD, True, {"methods": FITTED}),
    ("knapsack with cp, fisher", HALF, True, {"methods": FITTED, "fisher": True}),
    ("knapsack with cp, fisher, 30%", THIRD, True, {"methods": FITTED, "fisher": True}),
    ("knapsack with cp, asymmetric", HALF, True, {"methods": FITTED, "asymmetric": True}),
    ("knapsack with cp, asymmetric, 30%", THIRD, True, {"methods": FITTED, "asymmetric": True}),
    ("knapsack with both", HALF, True, {"methods": DEPTHWISE}),
    ("knapsack with both, 30%", THIRD, True, {"methods": DEPTHWISE}),
    ("knapsack with both, asymmetric", HALF, False, {"methods": DEPTHWISE, "asymmetric": True}),
    (
        "knapsack with both, asymmetric, 30%",
        THIRD,
        False,
        {"methods": DEPTHWISE, "asymmetric": True},
    ),
]


def percent(right: torch.Tensor) -> str:
    """Accuracy with its standard error, in percent."""
    share = right.double().mean().item()
    return f"{100 * share:.2f} ± {100 * (share * (1 - share) / len(right)) ** 0.5:.2f}"


def pace(model: Any, small: Any, x: torch.Tensor) -> str:
    """Time over the dense model's, with its interval, channels_last."""
    models = [copy.deepcopy(m).to(memory_format=torch.channels_last) for m in (model, small)]
    x = x.to(memory_format=torch.channels_last)
    ratio = rankopt.compare(*models, example_inputs=x).latency_ratio
    assert ratio is not None
    return f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def row(
    name: str, model: Any, budget: str, data: Any, test: Any, repair: Any, **settings: Any
) -> list[str]:
    """Search, apply, and repair with settings of `recover`, if any; one line of the table."""
    inputs = data[0]
    calibration = data if settings.pop("aware", True) else None
    started = time.perf_counter()
    plan = rankopt.search(
        model, budget, example_inputs=inputs[:64], calibration=calibration, **settings
    )
    searched = time.perf_counter() - started
    small = rankopt.apply(model, plan, calibration=calibration)
    share = {axis: (e["measured"] or 0) / (e["before"] or 1) for axis, e in plan.totals.items()}
    cells = [
        name,
        f"{share['macs']:.3f}",
        f"{share['params']:.3f}",
        f"{searched:.1f} s",
        pace(model, small, inputs[:64]),
        percent(correct(small, *test)),
    ]
    if not repair:
        return [*cells, "–"]
    repaired = copy.deepcopy(small)
    rankopt.recover(repaired, teacher=model, calibration=data, **repair)
    return [*cells, percent(correct(repaired, *test))]


def allocation_row(name: str, methods: tuple[str, ...]) -> list[str]:
    """Search time and gap of the knapsack without data."""
    model = make(name, "trained-like")
    started = time.perf_counter()
    plan = rankopt.search(
        model,
        "macs<=50%",
        strategy=Knapsack(),
        example_inputs=torch.randn(1, 3, 224, 224),
        methods=methods,
    )
    seconds = time.perf_counter() - started
    gap = plan.extensions["knapsack"]["gap"]
    return [name, ", ".join(methods), f"{seconds:.1f} s", f"{100 * gap:.4f}%"]


def allocations(name: str) -> None:
    """Print search time and gap with the closed-form decompositions and with all."""
    made = table(
        "knapsack, macs<=50%, no data", "network", "decompositions", "search", "gap to the bound"
    )
    for methods in (CLOSED, (*FITTED, "branched_tucker")):
        made.add_row(*allocation_row(name, methods))
    print(to_text(made))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recover", type=float, default=120.0, help="seconds; 0 for none")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="of recover")
    parser.add_argument("--rows", default="*", help="glob on the names of the plans to measure")
    parser.add_argument("--allocation", action="store_true", help="only time the allocation")
    parser.add_argument("--quick", action="store_true", help="ResNet-50 instead of ResNet-152")
    arguments = parser.parse_args()
    if arguments.allocation:
        allocations("resnet50" if arguments.quick else "resnet152")
        return
    model = resnet20()
    data = list(torch.split(images("train", 0, 103)[0][:1024], 128))
    test = images("val", 0, 500)
    made = table(
        "ResNet-20, CIFAR-10 (JPEG), 1,024 unlabelled images, 5,000 validation images",
        "plan", "macs", "params", "search", "time", "applied",
        f"recovered, {arguments.recover:.0f} s",
    )  # fmt: skip
    made.add_row("dense", "1", "1", "–", "1", percent(correct(model, *test)), "–")
    for name, budget, recovers, settings in ROWS:
        if not fnmatchcase(name, arguments.rows):
            continue
        repair: dict[str, Any] = {}
        if recovers and arguments.recover:
            repair = {"seconds": arguments.recover, "precision": arguments.precision}
        cells = row(name, model, budget, data, test, repair, **settings)
        made.add_row(*cells)
        print(*cells, sep=" | ", flush=True)
    print(to_text(made))


if __name__ == "__main__":
    main()

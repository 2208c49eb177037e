"""Accuracy of ResNet-20 on CIFAR-10 without labels, and the time of a global allocation.

Run: python -m benchmarks.calibrated [--recover SECONDS] [--quick]. Needs the development data
(see `benchmarks.cifar.data_folder`). 1,024 unlabelled training images; settings were
chosen on other training images, the 5,000 validation images are only reported.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import torch

import rankopt
from benchmarks.cifar import correct, images, resnet20
from benchmarks.foundation import make
from rankopt._report.tables import table, to_text
from rankopt_strategies import Knapsack

HALF, THIRD = "macs<=50%, params<=50%", "macs<=30%, params<=30%"
TWO = ("svd", "tucker2")
CLOSED = (*TWO, "spatial_svd")
FITTED = (*CLOSED, "cp")


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
    name: str, model: Any, budget: str, data: Any, test: Any, seconds: float, **settings: Any
) -> list[str]:
    """Search, apply, and optionally repair; one line of the table."""
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
    if not seconds:
        return [*cells, "–"]
    repaired = copy.deepcopy(small)
    rankopt.recover(repaired, teacher=model, calibration=data, seconds=seconds)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recover", type=float, default=120.0, help="seconds; 0 for none")
    parser.add_argument("--quick", action="store_true", help="ResNet-50 instead of ResNet-152")
    arguments = parser.parse_args()
    model = resnet20()
    data = list(torch.split(images("train", 0, 103)[0][:1024], 128))
    test = images("val", 0, 500)
    made = table(
        "ResNet-20, CIFAR-10 (JPEG), 1,024 unlabelled images, 5,000 validation images",
        "plan", "macs", "params", "search", "time", "applied",
        f"recovered, {arguments.recover:.0f} s",
    )  # fmt: skip
    made.add_row("dense", "1", "1", "–", "1", percent(correct(model, *test)), "–")
    for cells in (
        row("parameter_ratio, weights only", model, HALF, data, test, 0,
            strategy="parameter_ratio", aware=False),
        row("parameter_ratio", model, HALF, data, test, 0, strategy="parameter_ratio"),
        row("energy", model, HALF, data, test, 0, strategy="energy"),
        row("knapsack, svd and tucker2, equal", model, HALF, data, test, 0,
            strategy=Knapsack("equal"), methods=TWO),
        row("knapsack, equal", model, HALF, data, test, 0, strategy=Knapsack("equal")),
        row("knapsack, measured", model, HALF, data, test, 0, strategy=Knapsack("measured")),
        row("knapsack (default)", model, HALF, data, test, arguments.recover),
        row("knapsack (default), 30%", model, THIRD, data, test, arguments.recover),
        row("knapsack with cp", model, HALF, data, test, arguments.recover, methods=FITTED),
        row("knapsack with cp, 30%", model, THIRD, data, test, arguments.recover, methods=FITTED),
    ):  # fmt: skip
        made.add_row(*cells)
        print(*cells, sep=" | ", flush=True)
    print(to_text(made))
    made = table(
        "knapsack, macs<=50%, no data", "network", "decompositions", "search", "gap to the bound"
    )
    for methods in (CLOSED, (*FITTED, "branched_tucker")):
        made.add_row(*allocation_row("resnet50" if arguments.quick else "resnet152", methods))
    print(to_text(made))


if __name__ == "__main__":
    main()

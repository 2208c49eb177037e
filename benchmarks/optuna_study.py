"""Studies: spaces and samplers against the warm starts; what a trial costs beside evaluating.

Run: python -m benchmarks.optuna_study PART [--trials N] [--seeds N] …, PART one of

digits    spaces and samplers on a small network trained on scikit-learn's digits: searched on
          training images, hypervolume on the test images. Minutes.
cifar     ResNet-20 on CIFAR-10 (needs `benchmarks.cifar.data_folder`): searched on training
          images that calibration does not use, reported on validation images.
overhead  wall-clock per trial of a study whose `evaluate` does nothing, against 2,000 images.
workers   one and two processes on one SQLite file with an `evaluate` that waits.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import optuna
import torch

import rankopt
from benchmarks.cifar import accuracy, images, resnet20
from benchmarks.foundation import make
from rankopt import _demo
from rankopt._study.warm import WARM_STARTS
from rankopt.report.tables import table, to_text

# Budgets at which the warm starts have plans.
SHARES = (0.7, 0.5, 0.35)


def hypervolume(points: list[tuple[float, float]], floor: float) -> float:
    """Area between points (share of MACs, metric), a MACs share of 1 and the metric `floor`."""
    area, best = 0.0, floor
    for share, metric in sorted(points):
        if metric > best:
            area += max(0.0, 1 - share) * (metric - best)
            best = metric
    return area


def copied(seeded: Any) -> Any:
    """A memory storage that holds the warm starts' trials of another study already."""
    storage = optuna.storages.InMemoryStorage()
    optuna.copy_study(
        from_study_name="rankopt", from_storage=seeded.optuna._storage, to_storage=storage
    )
    return storage


def front_on(study: Any, model: Any, test: Any, calibration: Any) -> list[tuple[float, float]]:
    """(share of MACs, accuracy on other data) of the study's front."""
    dense = study.request["plan"]["totals"]["macs"]["before"]
    return [
        (
            point.figures["macs"] / dense,
            accuracy(rankopt.apply(model, point.plan, calibration=calibration), *test),
        )
        for point in study.front
    ]


def compare(
    model: Any, calibration: Any, searched: Any, test: Any, rows: list[tuple[str, str]],
    arguments: Any,
) -> None:  # fmt: skip
    """A table of (space, sampler) rows: hypervolumes, and accuracy at three budgets."""
    metric = lambda candidate: accuracy(candidate, *searched)  # noqa: E731
    common = {
        "evaluate": metric,
        "example_inputs": searched[0][:32],
        "calibration": calibration,
        "warm_starts": WARM_STARTS,
        "progress": False,
    }
    uniform = rankopt.search(
        model, "macs<=30%", strategy="parameter_ratio", example_inputs=searched[0][:32],
        calibration=calibration, methods=("svd", "tucker2"), progress=False,
    )  # fmt: skip
    floor = accuracy(rankopt.apply(model, uniform, calibration=calibration), *test)
    made = table(
        f"{arguments.trials} trials, {arguments.seeds} seeds, median (lowest to highest); "
        f"searched on {len(searched[1])} images, reported on {len(test[1])}; floor {floor:.2f}",
        "space, sampler",
        "hypervolume",
        *(f"macs<={share:.0%}" for share in SHARES),
        "seconds",
    )
    for space in dict.fromkeys(space for space, _ in rows):
        seeded = rankopt.study(model, storage=None, space=space, **common)
        queued = len(seeded.optuna.trials)
        seeded.run(queued)
        made.add_row(
            *_row(f"{space}, warm starts only", [seeded], model, test, calibration, floor, 0)
        )
        print("…", space, f"{queued} warm starts", flush=True)
        for sampler in (name for kind, name in rows if kind == space):
            started = time.perf_counter()
            studies = []
            for seed in range(arguments.seeds):
                study = rankopt.study(
                    model, storage=copied(seeded), sampler=sampler, seed=seed, **common
                )
                studies.append(study.run(arguments.trials))
            seconds = (time.perf_counter() - started) / arguments.seeds
            cells = _row(f"{space}, {sampler}", studies, model, test, calibration, floor, seconds)
            made.add_row(*cells)
            print(*cells, sep=" | ", flush=True)
    print(to_text(made, width=140))


def _row(
    name: str, studies: list[Any], model: Any, test: Any, calibration: Any, floor: float,
    seconds: float,
) -> list[str]:  # fmt: skip
    volumes, best = [], {share: [] for share in SHARES}  # type: ignore[var-annotated]
    for study in studies:
        volumes.append(hypervolume(front_on(study, model, test, calibration), floor))
        for share in SHARES:
            plan = study.best(rankopt.Budget(macs=share))
            small = rankopt.apply(model, plan, calibration=calibration)
            best[share].append(accuracy(small, *test))
    return [name, spread(volumes), *(spread(best[share]) for share in SHARES), f"{seconds:.0f}"]


def spread(values: list[float]) -> str:
    """Median (lowest to highest)."""
    middle = f"{statistics.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f}–{max(values):.2f})"


def digits(arguments: Any) -> None:
    """Spaces and samplers where a trial takes little."""
    torch.manual_seed(0)
    x, y, test_x, test_y = _demo.load_digits()
    model = _demo.DigitsNet()
    _demo.train(model, x, y)
    model.eval()
    calibration = list(torch.split(x[:128], 128))
    rows = [("warp", name) for name in arguments.samplers.split(",")]
    rows += [(space, "tpe") for space in ("stage", "layer") if arguments.spaces]
    compare(model, calibration, (x[128:628], y[128:628]), (test_x, test_y), rows, arguments)


def cifar(arguments: Any) -> None:
    """ResNet-20, searched on training images, reported on validation images."""
    model = resnet20()
    calibration = list(torch.split(images("train", 0, 13)[0][:128], 64))
    searched = images("train", 200, arguments.search_images // 10)
    test = images("val", 0, arguments.test_images // 10)
    print(f"dense on validation images: {accuracy(model, *test):.2f}", flush=True)
    rows = [("warp", name) for name in arguments.samplers.split(",")]
    compare(model, calibration, searched, test, rows, arguments)


def overhead(arguments: Any) -> None:
    """Everything of a trial but evaluating, against evaluating 2,000 images."""
    made = table(
        "a trial without evaluate and BatchNorm, SQLite storage", "network", "trial",
        "2,000 images", "share",
    )  # fmt: skip
    for name, model, x, count in (
        ("ResNet-20, 32x32", resnet20(), torch.randn(500, 3, 32, 32), 500),
        ("ResNet-50, 224x224", make("resnet50", "trained-like"), torch.randn(8, 3, 224, 224), 8),
    ):
        seconds = []
        with torch.no_grad():
            model(x[:4])
            for _ in range(3):
                started = time.perf_counter()
                model(x)
                seconds.append((time.perf_counter() - started) * 2000 / count)
        with tempfile.TemporaryDirectory() as folder:
            study = rankopt.study(
                model, evaluate=lambda candidate: 0.0, storage=Path(folder) / "s.db",
                example_inputs=x[:1], warm_starts=("parameter_ratio",), budget="macs<=70%",
                progress=False,
            )  # fmt: skip
            study.run(2)
            started = time.perf_counter()
            study.run(2 + arguments.trials)
            spent = (time.perf_counter() - started) / arguments.trials
            study.close()
        images_take = statistics.median(seconds)
        cells = [
            name,
            f"{1000 * spent:.0f} ms",
            f"{images_take:.1f} s",
            f"{spent / images_take:.1%}",
        ]
        made.add_row(*cells)
        print(*cells, sep=" | ", flush=True)
    print(to_text(made))


TASK = """
import time, torch
torch.set_num_threads(1)
def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
def metric(model):
    time.sleep({seconds})
    return -float(model(torch.ones(1, 64)).square().sum())
"""


def workers(arguments: Any) -> None:
    """From the first trial's start to the last one's end, processes already running."""
    spans: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(arguments.seeds):
        for count, found in spans.items():
            with tempfile.TemporaryDirectory() as folder:
                task, storage = Path(folder) / "task.py", Path(folder) / "s.db"
                task.write_text(TASK.format(seconds=arguments.wait))
                options = [
                    f"{task}:build", "--input", "1,64", "--storage", str(storage), "--evaluate",
                    f"{task}:metric",
                ]  # fmt: skip
                command = [sys.executable, "-m", "rankopt.cli", "study"]
                subprocess.run([*command, "create", *options], check=True, capture_output=True)
                running = [
                    subprocess.Popen(
                        [*command, "worker", *options, "--n-trials", str(arguments.trials)],
                        stdout=subprocess.DEVNULL,
                    )
                    for _ in range(count)
                ]
                for process in running:
                    assert process.wait() == 0
                with rankopt.Study.load(storage) as study:
                    trials = study.optuna.trials
                started = sorted(t.datetime_start for t in trials if t.datetime_start)[count - 1]
                ended = max(t.datetime_complete for t in trials if t.datetime_complete)
                done = sum(t.datetime_start >= started for t in trials if t.datetime_start)
                found.append((ended - started).total_seconds() / done)
    ratio = statistics.median(spans[2]) / statistics.median(spans[1])
    print(f"seconds per trial: one worker {spans[1]}, two workers {spans[2]}; ratio {ratio:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = {"digits": digits, "cifar": cifar, "overhead": overhead, "workers": workers}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samplers", default="tpe,tpe_independent,nsgaii,gp,random")
    parser.add_argument("--spaces", action="store_true", help="the other spaces too")
    parser.add_argument("--search-images", type=int, default=2000)
    parser.add_argument("--test-images", type=int, default=5000)
    parser.add_argument("--wait", type=float, default=1.0, help="seconds of one evaluation")
    arguments = parser.parse_args()
    parts[arguments.part](arguments)


if __name__ == "__main__":
    main()

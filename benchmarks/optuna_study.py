"""Studies: spaces and samplers against the warm starts; what a trial costs beside evaluating.

Run: python -m benchmarks.optuna_study PART [--trials N] [--seeds N] …, PART one of

digits    spaces and samplers on a small network trained on scikit-learn's digits: searched on
          training images, hypervolume on the test images. Minutes.
cifar     ResNet-20 on CIFAR-10 (needs `benchmarks.cifar.data_folder`): searched on training
          images that calibration does not use, reported on validation images.
overhead  wall-clock per trial of a study whose `evaluate` does nothing, against 2,000 images.
workers   one and two processes on one SQLite file, one thread each, with an `evaluate` that
          computes for a while.

digits and cifar keep what is done in --folder: the same command goes on where it stood, and
--minutes ends a run early. Add seeds or samplers with a second command.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rankopt
from benchmarks.cifar import images, resnet20
from benchmarks.foundation import make
from benchmarks.optuna_fronts import METRICS, Case, compare
from rankopt._commands import demo
from rankopt._study.warm import WARM_STARTS
from rankopt._utils.tables import table, to_text

BATCH = 500
# A larger part of the training images is never used: the search has 10 classes of these.
CALIBRATED = 20


def digits(arguments: Any) -> None:
    """Spaces and samplers where a trial takes little."""
    torch.manual_seed(0)
    x, y, test_x, test_y = demo.load_digits()
    model = demo.DigitsNet()
    demo.train(model, x, y)
    model.eval()
    searched = _batches(arguments, model, x[128:628], y[128:628], 50)
    calibration = list(torch.split(x[:128], 128))
    case = Case("digits", model, calibration, searched, (test_x, test_y), *_how(arguments))
    _compare(case, arguments)


def cifar(arguments: Any) -> None:
    """ResNet-20, searched on training images, reported on validation images."""
    model = resnet20().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    inputs = images("train", 0, CALIBRATED)[0]
    searched = images("train", 200, arguments.search_images // 10)
    test = images("val", 0, arguments.test_images // 10)
    case = Case(
        "cifar",
        model,
        [_last(part) for part in torch.split(inputs[: arguments.calibration_images], 100)],
        _batches(arguments, model, _last(searched[0]), searched[1], BATCH),
        (_last(test[0]), test[1]),
        *_how(arguments),
    )
    _compare(case, arguments)


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _batches(
    arguments: Any, model: nn.Module, x: Tensor, y: Tensor, size: int
) -> list[tuple[Tensor, Tensor]]:
    if arguments.metric != "agreement":
        return list(zip(torch.split(x, size), torch.split(y, size), strict=True))
    with torch.no_grad():
        return [(part, model(part)) for part in torch.split(x, size)]


def _how(arguments: Any) -> tuple[tuple[str, ...], str]:
    return tuple(arguments.warm_starts.split(",")), arguments.metric


def _compare(case: Case, arguments: Any) -> None:
    samplers, spaces = arguments.samplers.split(","), arguments.spaces.split(",")
    compare(
        case,
        [(space, sampler) for space in spaces for sampler in samplers],
        folder=arguments.folder,
        trials=arguments.trials,
        seeds=arguments.seeds,
        minutes=arguments.minutes,
    )


def overhead(arguments: Any) -> None:
    """Everything of a trial but evaluating, against evaluating 2,000 images."""
    made = table(
        "a trial without evaluate and BatchNorm, SQLite storage, median (lowest to highest)",
        "network", "trial", "2,000 images", "share",
    )  # fmt: skip
    for name, model, x in _networks(arguments.networks.split(",")):
        seconds = []
        with torch.no_grad():
            model(x[:4])
            for _ in range(3):
                started = time.perf_counter()
                model(x)
                seconds.append((time.perf_counter() - started) * 2000 / len(x))
        with tempfile.TemporaryDirectory() as folder:
            study = rankopt.study(
                model, evaluate=lambda candidate: 0.0, storage=Path(folder) / "s.db",
                example_inputs=x[:1], warm_starts=("parameter_ratio",), budget="macs<=70%",
                space=arguments.spaces.split(",")[0], progress=False,
                sampler=arguments.samplers.split(",")[0],
            )  # fmt: skip
            study.run(2)
            spent = []
            for number in range(arguments.trials):
                started = time.perf_counter()
                study.run(3 + number)
                spent.append(time.perf_counter() - started)
            study.close()
        images_take, trial = statistics.median(seconds), statistics.median(spent)
        cells = [
            name,
            f"{1000 * trial:.0f} ms ({1000 * min(spent):.0f}–{1000 * max(spent):.0f})",
            f"{images_take:.1f} s",
            f"{trial / images_take:.1%}",
        ]
        made.add_row(*cells)
        print(*cells, sep=" | ", flush=True)
    print(to_text(made))


def _networks(names: list[str]) -> Iterator[tuple[str, Any, Tensor]]:
    if "resnet20" in names:
        yield "ResNet-20, 32x32", resnet20(), torch.randn(500, 3, 32, 32)
    if "resnet50" in names:
        yield "ResNet-50, 224x224", make("resnet50", "trained-like"), torch.randn(8, 3, 224, 224)


TASK = """
import torch
def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
def metric(model):
    work = torch.ones(256, 256)
    for _ in range({products}):
        work = work @ work / 256
    return -float(model(torch.ones(1, 64)).square().sum())
"""


def _products(seconds: float) -> int:
    """How many matrix products of the task take about this long on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    work, count, started = torch.ones(256, 256), 0, time.perf_counter()
    while time.perf_counter() - started < 1.0:
        work, count = work @ work / 256, count + 1
    torch.set_num_threads(threads)
    return max(1, round(count * seconds))


def workers(arguments: Any) -> None:
    """From the first trial's start to the last one's end, processes already running."""
    spans: dict[int, list[float]] = {1: [], 2: []}
    text = TASK.format(products=_products(arguments.wait))
    for _ in range(arguments.seeds):
        for count, found in spans.items():
            with tempfile.TemporaryDirectory() as folder:
                task, storage = Path(folder) / "task.py", Path(folder) / "s.db"
                task.write_text(text)
                options = [
                    f"{task}:build", "--input", "1,64", "--storage", str(storage), "--evaluate",
                    f"{task}:metric", "--device", "cpu", "--threads", "1",
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
    parser.add_argument("--samplers", default="tpe,local,random")
    parser.add_argument(
        "--spaces",
        default="warp",
        help="of warp, tilt, stage, layer; with +fisher and +asymmetric trials choose these, with "
        "+sizes all end at the budgets reported",
    )
    parser.add_argument("--warm-starts", default=",".join(WARM_STARTS))
    parser.add_argument("--metric", choices=METRICS, default="accuracy", help="searched by")
    parser.add_argument("--search-images", type=int, default=2000)
    parser.add_argument("--calibration-images", type=int, default=200)
    parser.add_argument("--test-images", type=int, default=5000)
    parser.add_argument("--folder", type=Path, default=Path("build/optuna-study"))
    parser.add_argument("--minutes", type=float, help="end this run, to go on later")
    parser.add_argument("--threads", type=int, help="of torch; the machine's cores by default")
    parser.add_argument("--networks", default="resnet20,resnet50", help="of the overhead")
    parser.add_argument("--wait", type=float, default=1.0, help="seconds of one evaluation")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    parts[arguments.part](arguments)


if __name__ == "__main__":
    main()

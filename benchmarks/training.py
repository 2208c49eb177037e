"""Training speed of decomposed networks with frozen factors, and accuracy after fine-tuning.

Run: python -m benchmarks.training speed [--model resnet50] [--batch 32] [--size 224] [--rounds 5]
     python -m benchmarks.training accuracy [--epochs 3] [--images 10000]

``speed`` times whole training steps (forward, backward, SGD) interleaved with the dense model's
and prints throughput ratios beside their ceiling, 3 / (3 − f) times the plain decomposed model's,
f being the share of MACs whose weight gradient is skipped. ``accuracy`` fine-tunes a
ResNet-20 on CIFAR-10 at 30% of its MACs (needs the development data, see
`benchmarks.cifar.data_folder`), and the dense control by the same recipe.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankopt
from benchmarks.cifar import correct, images, resnet20
from benchmarks.foundation import make
from rankopt._report.tables import table, to_text
from rankopt.latency import Interval, Timings, time_interleaved
from rankopt.training import Fixed, Freezer, NoFreezing, Schedule, Sequential
from rankopt_strategies import ParameterRatio

# Table 3 of arXiv 2407.20266, ResNet-50: training throughput over dense.
PUBLISHED = {"vanilla": 1.0607, "fixed": 1.2457}


def trainer(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """One training step as a function."""
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimiser.step()

    return step


def cpu_interleaved(candidates: dict[str, Callable[[], None]], rounds: int) -> Timings:
    """CPU milliseconds of this process: for machines that are shared; use one thread."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    for turn in range(rounds + 1):
        random.Random(turn).shuffle(order)
        for name in order:
            started = time.process_time()
            candidates[name]()
            if turn:  # the first round warms up
                times[name].append(1000 * (time.process_time() - started))
    return Timings({name: np.asarray(values) for name, values in times.items()})


def throughput(timings: Timings, name: str, baseline: str) -> Interval:
    """Median ratio of steps per second with its interval."""
    ratio = timings.ratio(name, baseline)
    return Interval(1 / ratio.median, 1 / ratio.high, 1 / ratio.low)


def speed(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    x = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
    x = x.to(memory_format=torch.channels_last)
    y = torch.randint(0, 1000, (arguments.batch,))
    dense = make(arguments.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plan = rankopt.search(
        dense, None, strategy=ParameterRatio(ratio=2.0), example_inputs=x[:1], ignore=["conv1"]
    )
    phases: dict[str, tuple[Schedule, int]] = {
        "vanilla": (NoFreezing(), 0),
        "fixed": (Fixed(), 0),
        "sequential, even": (Sequential(), 0),
        "sequential, odd": (Sequential(), 1),
    }
    candidates = {"dense": trainer(dense.train(), x, y)}
    ceilings = {}
    for name, (schedule, phase) in phases.items():
        small = rankopt.apply(dense, plan).train()
        freezer = Freezer(small, schedule)
        ceilings[name] = freezer.ceiling(phase, x[:1])
        freezer.step(phase)
        candidates[name] = trainer(small, x, y)
    timings = (
        cpu_interleaved(candidates, arguments.rounds)
        if arguments.clock == "cpu"
        else time_interleaved(candidates, rounds=arguments.rounds)
    )
    # Epochs of both phases in turn take the mean of both times.
    both = timings.latency_ms["sequential, even"] + timings.latency_ms["sequential, odd"]
    timings = Timings({**timings.latency_ms, "sequential": both / 2})
    even, odd = ceilings["sequential, even"], ceilings["sequential, odd"]
    ceilings["sequential"] = 2 / (1 / even + 1 / odd)
    made = table(
        f"{arguments.model} at 2x, batch {arguments.batch}, {arguments.size} px, training steps",
        "variant", "over dense", "published", "over vanilla", "ceiling", "of ceiling − 1",
        caption=f"throughput ratios, median of {arguments.rounds} interleaved rounds with 95% "
        f"intervals, {arguments.clock} time; dense step {timings.interval('dense')} ms, "
        f"threads {torch.get_num_threads()}",
    )  # fmt: skip
    for name in [*phases, "sequential"]:
        over = throughput(timings, name, "vanilla")
        gained = (over.median - 1) / (ceilings[name] - 1) if ceilings[name] > 1 else None
        made.add_row(
            name,
            str(throughput(timings, name, "dense")),
            f"{PUBLISHED[name]:.3f}" if name in PUBLISHED else "–",
            "–" if name == "vanilla" else str(over),
            "–" if name == "vanilla" else f"{ceilings[name]:.3f}",
            "–" if gained is None else f"{100 * gained:.0f}%",
        )
    print(to_text(made))


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def accuracy(arguments: argparse.Namespace) -> None:
    dense = resnet20().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, y = images("train", 0, arguments.images // 10)
    test = images("val", 0, 500)
    x, test = last(x), (last(test[0]), test[1])
    data = torch.utils.data.TensorDataset(x, y)
    loader: Any = torch.utils.data.DataLoader(data, batch_size=128, shuffle=True, drop_last=True)
    held = list(x[:1024].split(128))
    plan = rankopt.search(dense, "macs<=30%", example_inputs=x[:64], calibration=held)
    small = rankopt.apply(dense, plan, calibration=held)
    made = table(
        f"ResNet-20, CIFAR-10, macs<=30%, {arguments.epochs} epochs of {len(x)} images",
        "model", "accuracy", "CPU seconds",
        caption=f"{len(test[1])} validation images, never used for choosing; standard error "
        "about 0.5; the recipe is the same for all",
    )  # fmt: skip

    def row(name: str, model: nn.Module, seconds: float = 0.0) -> None:
        right = 100 * correct(model, *test).double().mean().item()
        made.add_row(name, f"{right:.2f}", f"{seconds:.0f}" if seconds else "–")
        print(f"{name}: {right:.2f}% ({seconds:.0f} s)", flush=True)

    def tuned(name: str, model: nn.Module, **settings: Any) -> None:
        model = copy.deepcopy(model)
        started = time.process_time()
        rankopt.finetune(
            model,
            loader,
            epochs=arguments.epochs,
            learning_rate=arguments.learning_rate,
            augment="auto",
            **settings,
        )
        row(name, model, time.process_time() - started)

    row("dense", dense)
    row("30%, applied", small)
    tuned("dense control", dense)
    tuned("30%, full", small)
    tuned("30%, sequential", small, freezing="sequential")
    if arguments.distilled:
        logits = rankopt.training.Distillation(weights=0, logits=1.0)
        teaching: dict[str, Any] = {"teacher": dense, "distillation": logits}
        tuned("30%, full, distilled", small, **teaching)
        tuned("30%, sequential, distilled", small, freezing="sequential", **teaching)
    print(to_text(made))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    fast = commands.add_parser("speed")
    fast.add_argument("--model", default="resnet50")
    fast.add_argument("--batch", type=int, default=32)
    fast.add_argument("--size", type=int, default=224)
    fast.add_argument("--rounds", type=int, default=5)
    fast.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    fast.set_defaults(run=speed)
    exact = commands.add_parser("accuracy")
    exact.add_argument("--epochs", type=int, default=3)
    exact.add_argument("--images", type=int, default=10_000)
    exact.add_argument("--learning-rate", type=float, default=1e-3)
    exact.add_argument("--distilled", action="store_true", help="also with the dense teacher")
    exact.set_defaults(run=accuracy)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()

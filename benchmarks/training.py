"""Training speed of decomposed networks with frozen factors.

Run: python -m benchmarks.training [--model resnet50] [--batch 32] [--size 224] [--rounds 5]
     [--variants NAME ...] [--clock wall|cpu] [--compile] [--plans FOLDER] [--kernels]

Times whole training steps (forward, backward, SGD), interleaved with the dense model's, and
prints throughput ratios. Freezing is held against 3 / (3 − f), the most a step can gain if time
goes by MACs, f being the share of MACs whose weight gradient is skipped. ``--kernels`` adds what
can be gained in fact: the weight-gradient kernels of the frozen factors are timed by
themselves, and the plain model's step is taken without them.

Variants: vanilla (each layer to a half), profiled (ranks as timed in training), both with -fixed
and -sequential, and merged (bottlenecks to half their width). ``--plans`` keeps the profiled plan.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankopt
from benchmarks.foundation import make
from rankopt._model.hooks import hooked
from rankopt._timing.latency import Interval, Timings, time_interleaved
from rankopt._utils.tables import table, to_text
from rankopt.training import Fixed, Freezer, NoFreezing, Schedule, Sequential
from rankopt.training.freezing import Factor, factors
from rankopt_strategies import ParameterRatio, Profiled

# Table 3 of arXiv 2407.20266, ResNet-50: training throughput over dense.
PUBLISHED = {"vanilla": 1.0607, "profiled": 1.1416, "vanilla-fixed": 1.2457, "merged": 1.4364}
# Each variant's plan and the phases of freezing that take turns.
FREEZING: dict[str, tuple[Schedule, tuple[int, ...]]] = {
    "": (NoFreezing(), (0,)),
    "-fixed": (Fixed(), (0,)),
    "-sequential": (Sequential(), (0, 1)),
}
VARIANTS = (*(plan + how for plan in ("vanilla", "profiled") for how in FREEZING), "merged")
KERNEL_RUNS = 5


def trainer(model: nn.Module, x: Tensor, y: Tensor, compiled: bool = False) -> Callable[[], None]:
    """One training step as a function."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, weight_decay=1e-4)
    run = torch.compile(model) if compiled else model

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        F.cross_entropy(run(x), y).backward()
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


def kernel_ms(model: nn.Module, frozen: set[str], x: Tensor, clock: Callable[[], float]) -> float:
    """Milliseconds of the weight-gradient kernels of the factors named, each timed alone."""
    found: list[tuple[Factor, Tensor, Tensor]] = []

    def keep(factor: Factor) -> Callable[..., None]:
        def hook(_: Any, inputs: Any, output: Tensor) -> None:
            found.append((factor, inputs[0].detach(), torch.randn_like(output)))

        return hook

    watched = [factor for factor in factors(model) if f"{factor.name}.weight" in frozen]
    with hooked(f.module.register_forward_hook(keep(f)) for f in watched), torch.no_grad():
        model(x)
    total = 0.0
    while found:  # one at a time, as their inputs fill the memory
        kernel = _weight_gradient(*found.pop())
        times = []
        for _ in range(KERNEL_RUNS + 1):
            started = clock()
            kernel()
            times.append(clock() - started)
        total += 1000 * float(np.median(times[1:]))
    return total


def _weight_gradient(factor: Factor, x: Tensor, gradient: Tensor) -> Callable[[], Any]:
    module: Any = factor.module
    weight = factor.weight.detach()
    if not hasattr(module, "kernel_size"):
        flat = gradient.flatten(0, -2).t()
        return lambda: flat @ x.flatten(0, -2)
    where = module.stride, module.padding, module.dilation
    return lambda: torch.ops.aten.convolution_backward(
        gradient, x, weight, None, *where, False, [0] * len(module.stride), module.groups,
        [False, True, False],
    )  # fmt: skip


def plans(arguments: argparse.Namespace, dense: nn.Module, x: Tensor) -> dict[str, Any]:
    """The plan of each kind that is asked for."""
    wanted = {name.split("-")[0] for name in arguments.variants}
    made: dict[str, Any] = {}
    if "vanilla" in wanted:
        made["vanilla"] = rankopt.search(
            dense, None, strategy=ParameterRatio(ratio=2.0), example_inputs=x[:1], ignore=["conv1"]
        )
    if "profiled" in wanted:
        path = Path(arguments.plans or ".") / f"{arguments.model}-profiled.json"
        if arguments.plans and path.exists():
            made["profiled"] = rankopt.RankPlan.load(path)
        else:
            timed = rankopt.ProfileTable(
                mode="training", rounds=5, clock="process" if arguments.clock == "cpu" else "wall"
            )
            made["profiled"] = rankopt.search(
                dense,
                None,
                strategy=Profiled(base={"name": "parameter_ratio", "settings": {"ratio": 2.0}}),
                example_inputs=x[: arguments.profile_batch],
                ignore=["conv1"],
                profile=timed,
            )
            if arguments.plans:
                path.parent.mkdir(parents=True, exist_ok=True)
                made["profiled"].save(path)
    if "merged" in wanted:
        made["merged"] = rankopt.merge_plan(dense, example_inputs=x[:1])
    return made


def speed(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    x = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
    x = x.to(memory_format=torch.channels_last)
    y = torch.randint(0, 1000, (arguments.batch,))
    dense = make(arguments.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    made = plans(arguments, dense, x)
    candidates = {"dense": trainer(dense.train(), x, y, arguments.compile)}
    ceilings: dict[str, list[float]] = {}
    skipped: dict[str, float] = {}  # milliseconds of kernels a variant need not run
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    applied = {kind: rankopt.apply(dense, plan).train() for kind, plan in made.items()}
    for name in arguments.variants:
        kind, _, how = name.partition("-")
        schedule, phases = FREEZING[f"-{how}" if how else ""]
        for phase in phases:
            small = copy.deepcopy(applied[kind])
            freezer = Freezer(small, schedule)
            ceilings.setdefault(name, []).append(freezer.ceiling(phase, x[:1]))
            freezer.step(phase)
            if arguments.kernels and freezer.frozen:
                spent = kernel_ms(small, set(freezer.frozen), x, clock)
                skipped[name] = skipped.get(name, 0.0) + spent / len(phases)
            candidates[f"{name} {phase}"] = trainer(small, x, y, arguments.compile)
    timings = (
        cpu_interleaved(candidates, arguments.rounds)
        if arguments.clock == "cpu"
        else time_interleaved(candidates, rounds=arguments.rounds)
    )
    # Epochs of all phases in turn take the mean of their times.
    means = {
        name: np.mean([timings.latency_ms[f"{name} {i}"] for i in range(len(found))], axis=0)
        for name, found in ceilings.items()
    }
    show(arguments, Timings({**timings.latency_ms, **means}), ceilings, skipped)


def show(
    arguments: argparse.Namespace,
    timings: Timings,
    ceilings: dict[str, list[float]],
    skipped: dict[str, float],
) -> None:
    """The table."""
    made = table(
        f"{arguments.model}, batch {arguments.batch}, {arguments.size} px, training steps",
        "variant", "over dense", "published", "over unfrozen", "ceiling", "of ceiling − 1",
        "kernels' ceiling",
        caption=f"throughput ratios, median of {arguments.rounds} interleaved rounds with 95% "
        f"intervals, {arguments.clock} time; dense step {timings.interval('dense')} ms, "
        f"threads {torch.get_num_threads()}",
    )  # fmt: skip
    for name, found in ceilings.items():
        plain = name.partition("-")[0]
        over, ceiling = "–", "–"
        share, kernels = "–", "–"
        if name != plain:
            # Times add, so ceilings average as times do.
            bound = len(found) / sum(1 / ceiling for ceiling in found)
            ceiling = f"{bound:.3f}"
            if plain in ceilings:
                gain = throughput(timings, name, plain)
                over, share = str(gain), f"{100 * (gain.median - 1) / (bound - 1):.0f}%"
                if name in skipped:
                    step = float(np.median(timings.latency_ms[plain]))
                    kernels = f"{step / (step - skipped[name]):.3f}"
        made.add_row(
            name,
            str(throughput(timings, name, "dense")),
            f"{PUBLISHED[name]:.3f}" if name in PUBLISHED else "–",
            over,
            ceiling,
            share,
            kernels,
        )
    for name, found in ceilings.items():
        if len(found) > 1:
            for phase, bound in enumerate(found):
                label = f"{name} {phase}"
                ratio = throughput(timings, label, "dense")
                made.add_row(f"  phase {phase} of {name}", str(ratio), "", "", f"{bound:.3f}")
    print(to_text(made, width=150))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--compile", action="store_true", help="every model by torch.compile")
    parser.add_argument("--plans", default="", metavar="FOLDER", help="where the plan is kept")
    parser.add_argument("--profile-batch", type=int, default=8, help="of the profiled plan")
    parser.add_argument("--kernels", action="store_true", help="time weight gradients alone too")
    speed(parser.parse_args())


if __name__ == "__main__":
    main()

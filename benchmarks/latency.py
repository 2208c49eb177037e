"""Time as measured: ranks found by few timings, and whole models under a budget on latency.

Run: python -m benchmarks.latency [layers] [resnet50] [resnet20] [--batch 1 8] [--quick]
[--clock process] [--compile]. ``resnet20`` needs the development data (see `benchmarks.cifar`).
On a machine shared with other work use ``--clock process``: CPU time on one thread.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import rankopt
from benchmarks.foundation import make
from rankopt._decompositions import BranchedTucker
from rankopt._timing.latency import Interval
from rankopt._utils.tables import table, to_text
from rankopt.errors import BudgetInfeasible, RankoptWarning
from rankopt_strategies import ParameterRatio, Profiled

# Network, layer, module, input: ten shapes and more.
LAYERS: list[tuple[str, nn.Conv2d | nn.Linear, tuple[int, ...]]] = [
    ("resnet50 layer1.1.conv2", nn.Conv2d(64, 64, 3, padding=1, bias=False), (64, 56, 56)),
    ("resnet50 layer2.1.conv2", nn.Conv2d(128, 128, 3, padding=1, bias=False), (128, 28, 28)),
    ("resnet50 layer3.1.conv2", nn.Conv2d(256, 256, 3, padding=1, bias=False), (256, 14, 14)),
    ("resnet50 layer4.1.conv2", nn.Conv2d(512, 512, 3, padding=1, bias=False), (512, 7, 7)),
    ("resnet50 layer2.1.conv3", nn.Conv2d(128, 512, 1, bias=False), (128, 28, 28)),
    ("resnet50 layer3.1.conv1", nn.Conv2d(1024, 256, 1, bias=False), (1024, 14, 14)),
    ("resnet50 layer4.1.conv1", nn.Conv2d(2048, 512, 1, bias=False), (2048, 7, 7)),
    ("resnet50 layer4.1.conv3", nn.Conv2d(512, 2048, 1, bias=False), (512, 7, 7)),
    ("resnet50 fc", nn.Linear(2048, 1000), (2048,)),
    ("vgg16 features.12", nn.Conv2d(256, 256, 3, padding=1), (256, 56, 56)),
    ("vgg16 features.19", nn.Conv2d(512, 512, 3, padding=1), (512, 28, 28)),
    ("vgg16 features.26", nn.Conv2d(512, 512, 3, padding=1), (512, 14, 14)),
    ("vgg16 classifier.3", nn.Linear(4096, 4096), (4096,)),
]
DUEL_ROUNDS = 40


def fresh(arguments: argparse.Namespace, rounds: int) -> rankopt.ProfileTable:
    return rankopt.ProfileTable(
        ":memory:", clock=arguments.clock, rounds=rounds, compile=arguments.compile
    )


def duel(
    one: nn.Module, other: nn.Module, inputs: Any, arguments: argparse.Namespace, rounds: int
) -> Interval:
    """Time of `one` as a paired ratio to that of `other`, timed by themselves."""
    found = fresh(arguments, rounds).compare(
        {"one": one, "other": other}, inputs, device=torch.device("cpu")
    )
    return found.ratio("one", "other")


def layer_rows(arguments: argparse.Namespace) -> None:
    """`profiled` with few timings against every rank between its bounds."""
    made = table(
        f"profiled against every rank, parameter ratio 2 to 3, batch {arguments.batch[0]}, "
        "channels_last",
        "layer", "rank", "runs", "best", "runs", "runs x", "family x", "time / best's",
        caption="runs: every call, warm-up too. 'runs x' counts every rank between the bounds, "
        "'family x' extrapolates to every rank of the layer. Last: paired, timed again.",
    )  # fmt: skip
    chosen = [layer for layer in LAYERS if arguments.only in layer[0]]
    for name, module, shape in chosen[:4] if arguments.quick else chosen:
        torch.manual_seed(0)
        model: Any = nn.Sequential(module).eval()
        x = torch.randn(arguments.batch[0], *shape)
        if x.dim() == 4:
            model = model.to(memory_format=torch.channels_last)
            x = x.contiguous(memory_format=torch.channels_last)
        plans = [
            rankopt.search(
                model,
                None,
                strategy=Profiled(candidates=candidates),
                example_inputs=x,
                profile=fresh(arguments, rounds=9),
            )
            for candidates in ("aligned", "every")
        ]
        ours, best = (plan["0"].ranks for plan in plans)
        runs = [plan.extensions["profiled"]["runs"] for plan in plans]
        upper = rankopt.search(model, None, strategy=ParameterRatio(2.0))["0"].ranks
        lower = rankopt.search(model, None, strategy=ParameterRatio(3.0))["0"].ranks
        per_rank = runs[1] / (max(upper) - max(lower) + 2)
        # Tucker's two ranks grow together until the larger is all channels; SVD has one.
        channels = module.weight.shape[:2]
        family = (max if module.weight.shape[2:].numel() > 1 else min)(channels)
        ratio: Interval | str = "the same"
        if ours != best:
            few, every = (rankopt.apply(model, plan) for plan in plans)
            ratio = duel(few, every, x, arguments, DUEL_ROUNDS)
        cells = [
            name,
            "x".join(map(str, ours)) or "dense",
            str(runs[0]),
            "x".join(map(str, best)) or "dense",
            str(runs[1]),
            f"{runs[1] / runs[0]:.1f}",
            f"{per_rank * family / runs[0]:.1f}",
            str(ratio),
        ]
        made.add_row(*cells)
        print(*cells, sep=" | ", flush=True)
    print(to_text(made, width=130))


def resnet50(batch: int) -> tuple[Any, torch.Tensor]:
    """The network and inputs, channels_last."""
    model: Any = make("resnet50", "trained-like")
    x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    return model.to(memory_format=torch.channels_last), x


def check(arguments: argparse.Namespace) -> None:
    """In a process of its own: the time of a saved plan's model against dense."""
    model, x = resnet50(arguments.batch[0])
    small = rankopt.apply(model, rankopt.RankPlan.load(arguments.plan))
    print(duel(small, model, x, arguments, max(5, arguments.rounds // arguments.batch[0])))


def checked(plan: rankopt.RankPlan, batch: int, arguments: argparse.Namespace) -> str:
    """`check` in another process."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/plan.json"
        plan.save(path)
        command = [sys.executable, "-m", "benchmarks.latency", "check", "--plan", path]
        command += ["--batch", str(batch), "--clock", arguments.clock]
        command += ["--rounds", str(arguments.rounds)] + ["--compile"] * arguments.compile
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def whole_rows(arguments: argparse.Namespace, batch: int) -> None:
    """Plans of ResNet-50: time against dense, and what share of the MACs saved it realises."""
    model, x = resnet50(batch)
    made = table(
        f"ResNet-50, batch {batch}, channels_last, {torch.get_num_threads()} thread(s), "
        f"{arguments.clock} clock" + ", under torch.compile" * arguments.compile,
        "plan", "macs", "time / dense", "throughput x", "realised", "predicted", "another process",
        "search",
    )  # fmt: skip
    shared = fresh(arguments, rounds=7)

    def searched(budget: str | None, strategy: Any, methods: Any = None) -> rankopt.RankPlan:
        return rankopt.search(
            model, budget, strategy=strategy, methods=methods, example_inputs=x, profile=shared
        )

    def branched(branches: int) -> rankopt.RankPlan:
        methods = ("svd", BranchedTucker(branches=branches))
        return searched(None, ParameterRatio(2.0), methods)

    plans: list[tuple[str, Callable[[], rankopt.RankPlan]]] = [
        ("vanilla 2x", lambda: searched(None, ParameterRatio(2.0))),
        ("branched 2x, N=2", lambda: branched(2)),
        ("branched 2x, N=4", lambda: branched(4)),
        ("merged 2x", lambda: rankopt.merge_plan(model, example_inputs=x)),
        ("profiled, from 2x", lambda: searched(None, Profiled())),
        ("knapsack, macs<=50%", lambda: searched("macs<=50%", "knapsack")),
        ("knapsack, latency<=70%", lambda: searched("latency<=70%", "knapsack")),
    ]
    for name, make_plan in (plan for plan in plans if arguments.only in plan[0]):
        started = time.perf_counter()
        try:
            plan = make_plan()
        except BudgetInfeasible as error:
            print(name, error, sep=": ", flush=True)
            continue
        seconds = time.perf_counter() - started
        rounds = max(5, arguments.rounds // batch)
        ratio = duel(rankopt.apply(model, plan), model, x, arguments, rounds)
        entry = plan.totals["macs"]
        share = float(entry["measured"] or 0) / float(entry["before"] or 1)
        found = plan.extensions.get("latency", {}).get("rounds", [])
        cells = [
            name,
            f"{100 * share:.1f}%",
            str(ratio),
            f"{1 / ratio.median:.2f} [{1 / ratio.high:.2f}, {1 / ratio.low:.2f}]",
            f"{share / ratio.median:.2f}",
            ", ".join(f"{r['predicted']:.2f}→{r['measured']:.2f}" for r in found) or "–",
            checked(plan, batch, arguments) if found else "–",
            f"{seconds:.0f} s",
        ]
        made.add_row(*cells)
        print(*cells, sep=" | ", flush=True)
    print(to_text(made, width=160))


def small_rows(arguments: argparse.Namespace) -> None:
    """ResNet-20, batch 64: plans that are faster, and what they cost in accuracy."""
    from benchmarks.calibrated import percent
    from benchmarks.cifar import correct, images, resnet20

    model = resnet20()
    samples = 256 if arguments.quick else 1024
    data = list(torch.split(images("train", 0, 103)[0][:samples], 128))
    test = images("val", 0, 100 if arguments.quick else 500)
    x = data[0][:64]
    made = table(
        f"ResNet-20, CIFAR-10 (JPEG), batch 64, {torch.get_num_threads()} thread(s), "
        f"{arguments.clock} clock, {len(test[0])} validation images",
        "plan", "macs", "time / dense", "accuracy", "recovered", "reached",
    )  # fmt: skip
    print("dense", percent(correct(model, *test)), sep=" | ", flush=True)
    shared = fresh(arguments, rounds=9)
    plans: list[tuple[str, str | None, Any]] = [
        ("knapsack, macs<=50%", "macs<=50%", "knapsack"),
        ("profiled, from 2x", None, Profiled()),
        *((f"knapsack, latency<={n}%", f"latency<={n}%", "knapsack") for n in (90, 80, 70)),
    ]
    for name, budget, strategy in (plan for plan in plans if arguments.only in plan[0]):
        try:
            plan = rankopt.search(
                model,
                budget,
                strategy=strategy,
                example_inputs=x,
                calibration=data,
                profile=shared,
            )
        except BudgetInfeasible as error:
            made.add_row(name, *"––––", str(error))
            print(name, error, sep=" | ", flush=True)
            continue
        small = rankopt.apply(model, plan, calibration=data)
        entry = plan.totals["macs"]
        cells = [
            name,
            f"{100 * float(entry['measured'] or 0) / float(entry['before'] or 1):.1f}%",
            str(duel(small, model, x, arguments, DUEL_ROUNDS)),
            percent(correct(small, *test)),
            recovered(small, model, data, test, arguments),
            f"{len(plan.changes)} layers decomposed",
        ]
        made.add_row(*cells)
        print(*cells, sep=" | ", flush=True)
    print(to_text(made, width=150))


def recovered(small: Any, dense: Any, data: Any, test: Any, arguments: argparse.Namespace) -> str:
    """Accuracy after the label-free repair, if there is to be one."""
    if not arguments.recover:
        return "–"
    done = rankopt.recover(
        small, teacher=dense, calibration=data, seconds=arguments.recover, precision="bf16"
    )
    print(done, flush=True)
    from benchmarks.calibrated import percent
    from benchmarks.cifar import correct

    return percent(correct(small, *test))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["layers", "resnet50", "resnet20"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=30, help="of the final measurement")
    parser.add_argument("--clock", choices=["wall", "process"], default="wall")
    parser.add_argument("--compile", action="store_true", help="under torch.compile")
    parser.add_argument("--quick", action="store_true", help="four layers, fewer images")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--recover", type=float, default=0.0, help="seconds, for resnet20")
    parser.add_argument("--plan", help="of `check`, which `resnet50` calls in another process")
    arguments = parser.parse_args()
    if arguments.clock == "process":
        torch.set_num_threads(1)
    warnings.simplefilter("always", RankoptWarning)
    if "check" in arguments.parts:
        check(arguments)
    if "layers" in arguments.parts:
        layer_rows(arguments)
    for batch in arguments.batch if "resnet50" in arguments.parts else ():
        whole_rows(arguments, batch)
    if "resnet20" in arguments.parts:
        small_rows(arguments)


if __name__ == "__main__":
    main()

"""Figures of the relaxed search: time, memory, budgets, damage, accuracy, convergence.

Run: python -m benchmarks.relaxed [PART ...], the parts being `shapes` (torchvision shapes,
no data), `latency` (the same under a budget on measured time), `paper` (against the
published mode on ResNet-20), `accuracy` (against the knapsack on ResNet-20) and `seeds`.
`--models` and `--budgets` choose single rows. `paper`, `accuracy` and `seeds` need the
development data (see `benchmarks.cifar.data_folder`). Every part prints as it goes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from typing import Any

import torch

import rankopt
from benchmarks.cifar import correct, images, resnet20
from benchmarks.foundation import make
from rankopt.errors import BudgetInfeasible
from rankopt_strategies import Knapsack, Relaxed

IMAGE = torch.zeros(1, 3, 224, 224)


def shares(plan: rankopt.RankPlan) -> dict[str, float]:
    """Measured shares of the original."""
    return {a: float(e["measured"] or 0) / float(e["before"] or 1) for a, e in plan.totals.items()}


def under(plan: rankopt.RankPlan) -> float:
    """How far below its budget a plan is, as a share of the budget; the fullest axis counts."""
    assert plan.budget is not None
    measured = shares(plan)
    return min(1 - measured[axis] / plan.budget.ratio(axis) for axis in plan.budget.axes)


def show(part: str, **facts: Any) -> None:
    """One line of results."""
    print(part, json.dumps(facts), flush=True)


PEAK = """
import json, time, torch, rankopt
from benchmarks.foundation import make, import_torchvision
from benchmarks.relaxed import IMAGE
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
import_torchvision().models.resnet18()
base = peak()
model = make({name!r}, {spectra!r})
made = peak()
size = sum(p.numel() * p.element_size() for p in model.parameters())
started = time.perf_counter()
rankopt.search(model, {budget!r}, strategy="relaxed", example_inputs={inputs})
print(json.dumps([time.perf_counter() - started, (peak() - base) / size, (made - base) / size]))
"""


def alone(name: str, budget: str, spectra: str) -> tuple[float, float, float]:
    """Seconds and peak memory in a process of its own, in models; also that of making it."""
    inputs = "IMAGE" if "macs" in budget else "None"
    code = PEAK.format(name=name, budget=budget, spectra=spectra, inputs=inputs)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, memory, made = json.loads(out.stdout.splitlines()[-1])
    return seconds, memory, made


def shapes(names: list[str], budgets: list[str]) -> None:
    """No data: time, memory, how full the budget is, distance from the knapsack."""
    for name in names:
        seconds, memory, made = alone(name, budgets[0], "random")
        show("cost", model=name, budget=budgets[0], seconds=round(seconds, 1),
             peak_in_models=round(memory, 2), made_in_models=round(made, 2))  # fmt: skip
        model = make(name, "trained-like")
        for budget in budgets:
            ours = rankopt.search(model, budget, strategy="relaxed", example_inputs=IMAGE)
            facts = {"model": name, "budget": budget, "under": under(ours)}
            theirs = rankopt.search(
                model,
                budget,
                strategy=Knapsack("equal"),
                example_inputs=IMAGE,
                methods=Relaxed.methods,
            )
            found = ours.extensions["relaxed"]
            show(
                "damage",
                **facts,
                seconds=ours.seconds,
                knapsack_seconds=theirs.seconds,
                against_knapsack=found["damage"] / theirs.extensions["knapsack"]["damage"] - 1,
                above_bound=found["damage"] / found["bound"] - 1,
            )


def latency(names: list[str], share: float, batch: int, rounds: int) -> None:
    """A budget on measured time: how full it is by the median, and the interval it is held by."""
    inputs = IMAGE.expand(batch, -1, -1, -1).contiguous()
    for name in names:
        model, budget = make(name, "trained-like"), f"latency<={share}"
        table = rankopt.ProfileTable(rounds=rounds)
        try:
            plan = rankopt.search(
                model, budget, strategy="relaxed", example_inputs=inputs, profile=table
            )
        except BudgetInfeasible as error:
            show("latency", model=name, budget=budget, batch=batch, infeasible=str(error))
            continue
        facts = plan.extensions["latency"]
        show("latency", model=name, budget=budget, batch=batch, seconds=plan.seconds,
             under=under(plan), ratio=facts["ratio"], low=facts["low"], high=facts["high"],
             tried=facts["rounds"])  # fmt: skip


def against_paper(updates: int) -> None:
    """ResNet-20, half of the MACs: the nested search and the published one."""
    code = """
import json, sys, time, torch, rankopt
from benchmarks.cifar import resnet20
from benchmarks.relaxed import shares
from rankopt_strategies import Relaxed, RelaxedSettings
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
model, x = resnet20(), torch.zeros(1, 3, 32, 32)
methods = ["svd", "tucker2"]
rankopt.search(model, "macs<=90%", strategy="energy", example_inputs=x, methods=methods)
updates = int(sys.argv[2])
settings = RelaxedSettings(updates=updates, warmup=min(updates, 20))
strategy = Relaxed(mode=sys.argv[1], paper=settings)
rankopt.clear_cache()
base = peak()
started = time.perf_counter()
plan = rankopt.search(model, "macs<=50%", strategy=strategy, example_inputs=x, methods=methods)
seconds = time.perf_counter() - started
damage = sum((decision.error or 0) ** 2 for decision in plan)
print(json.dumps([seconds, (peak() - base) / 2**20, shares(plan)["macs"], damage]))
"""
    for mode in ("nested", "paper"):
        out = subprocess.run(
            [sys.executable, "-c", code, mode, str(updates)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        seconds, memory, macs, damage = json.loads(out.stdout.splitlines()[-1])
        show("paper", mode=mode, seconds=round(seconds, 2), added_mib=round(memory, 1), macs=macs,
             damage=damage, updates=updates)  # fmt: skip


def accuracy(
    relaxed: Relaxed,
    budgets: list[str],
    methods: list[str],
    *,
    draws: int,
    held_out: bool,
    factors: bool,
) -> None:
    """ResNet-20, 1,024 unlabelled images: distillation against the knapsack, applied.

    Each draw of calibration images is searched anew. Differences from the knapsack are paired by
    image, and of several draws averaged by image first: their standard error is that over images.
    With `held_out`, on training images that no search sees, to choose settings by. With
    `factors`, the distillation says how factors are made, too; the knapsack so aided is shown
    beside.
    """
    model = resnet20()
    x, y = images("train", 4500, 500) if held_out else images("val", 0, 500)
    show("accuracy", plan="dense", right=100 * correct(model, x, y).double().mean().item())
    rows: list[tuple[Any, bool]] = [(Knapsack(), False), (relaxed, factors)]
    rows += [(Knapsack(), True)] * factors
    for budget in budgets:
        right = defaultdict[str, list[torch.Tensor]](list)
        for draw in range(draws):
            seen = images("train", 103 * draw, 103)[0][:1024]
            data = list(torch.split(seen, 128))
            for strategy, chosen in rows:
                choice: Any = "search" if chosen else False
                plan = rankopt.search(
                    model,
                    budget,
                    strategy=strategy,
                    example_inputs=data[0][:64],
                    calibration=data,
                    methods=methods,
                    asymmetric=choice,
                    fisher=choice,
                )
                small = rankopt.apply(model, plan, calibration=data)
                name = strategy.name + " with factors" * chosen
                right[name].append(correct(small, x, y).double())
                facts = plan.extensions[strategy.name]
                losses = {k: facts[k] for k in ("first_loss", "loss", "soft_loss") if k in facts}
                show("accuracy", budget=budget, plan=name, draw=draw,
                     right=100 * right[name][-1].mean().item(), seconds=plan.seconds,
                     **shares(plan), **losses, factors=plan.extensions.get("factors"))  # fmt: skip
            for name, by_draw in right.items():
                gain = torch.stack(by_draw).mean(0) - torch.stack(right["knapsack"]).mean(0)
                show("accuracy", budget=budget, plan=name, draws=draw + 1,
                     right=100 * torch.stack(by_draw).mean().item(),
                     gain=100 * gain.mean().item(),
                     standard_error=100 * gain.std().item() / len(gain) ** 0.5)  # fmt: skip


def seeds() -> None:
    """Five seeds without data, and with data from two starts."""
    model, x = resnet20(), torch.zeros(1, 3, 32, 32)
    plans = [
        rankopt.search(model, "macs<=50%", strategy="relaxed", example_inputs=x, seed=seed)
        for seed in range(5)
    ]
    same = [sum(a == b for a, b in zip(plans[0], plan, strict=True)) for plan in plans]
    show("seeds", layers=len(plans[0].decisions), same_as_first=same,
         seconds=statistics.median(plan.seconds for plan in plans))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ("shapes", "latency", "paper", "seeds", "accuracy")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; all by default")
    parser.add_argument("--models", default="resnet18,vgg16_bn,mobilenet_v2,resnet50")
    parser.add_argument("--budgets", default="params<=50%,macs<=50%", help="of shapes")
    parser.add_argument("--share", type=float, default=0.8, help="of the time, for latency")
    parser.add_argument("--batch", type=int, default=1, help="of latency")
    parser.add_argument("--timing-rounds", type=int, default=15, help="of each measurement")
    parser.add_argument("--macs", default="50,30", help="percent of the MACs, for accuracy")
    parser.add_argument("--rounds", type=int, default=24, help="of the distillation")
    parser.add_argument("--slopes", choices=("measured", "gradient"), default="gradient")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the distillation")
    parser.add_argument(
        "--methods", default="svd,tucker2,spatial_svd", help="of both strategies, for accuracy"
    )
    parser.add_argument(
        "--held-out", action="store_true", help="accuracy on held-out training images instead"
    )
    parser.add_argument(
        "--factors", action="store_true", help="accuracy: let the distillation choose factors, too"
    )
    parser.add_argument("--draws", type=int, default=1, help="accuracy: of calibration images")
    parser.add_argument("--updates", type=int, default=100, help="of the published mode")
    arguments = parser.parse_args()
    chosen, models = arguments.parts or list(parts), arguments.models.split(",")
    if "shapes" in chosen:
        shapes(models, arguments.budgets.split(","))
    if "latency" in chosen:
        latency(models, arguments.share, arguments.batch, arguments.timing_rounds)
    if "paper" in chosen:
        against_paper(arguments.updates)
    if "seeds" in chosen:
        seeds()
    if "accuracy" in chosen:
        budgets = [f"macs<={percent}%" for percent in arguments.macs.split(",")]
        relaxed = Relaxed(
            rounds=arguments.rounds, slopes=arguments.slopes, temperature=arguments.temperature
        )
        methods = arguments.methods.split(",")
        accuracy(
            relaxed,
            budgets,
            methods,
            draws=arguments.draws,
            held_out=arguments.held_out,
            factors=arguments.factors,
        )


if __name__ == "__main__":
    main()

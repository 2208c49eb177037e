"""Merged bottlenecks against plain channel selection, and the time of a merged ResNet-50.

Run: python -m benchmarks.merging [--train SECONDS] [--steps N] [--rounds N]
[--ratio R].
A small bottleneck ResNet is trained on CIFAR-10 (development data, see
`benchmarks.cifar.data_folder`) with labels; all that follows uses 1,024 other training
images without labels. Both ways narrow every block alike, both get
BatchNorm statistics anew and `rankopt.recover` with the same settings and number of steps; the
5,000 validation images are only reported.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankopt
from benchmarks.calibrated import percent
from benchmarks.cifar import correct, images
from benchmarks.foundation import make
from rankopt._build.provenance import remember_plan
from rankopt._build.settle import settle_norms
from rankopt._build.skeletons import fill_skeleton
from rankopt._merging.bottlenecks import find_bottlenecks
from rankopt._merging.join import resize
from rankopt._model import surgery
from rankopt._timing.latency import time_interleaved
from rankopt._utils.tables import table, to_text
from rankopt.training.augmentation import shift_and_mirror

BATCH, LEARNING_RATE, WEIGHT_DECAY = 128, 0.1, 5e-4
LABELLED, UNLABELLED = 4890, 103  # images per class


class _Block(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * planes
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class BottleneckNet(nn.Module):
    """A ResNet of bottlenecks for 32x32 images, planes 16, 32, 64, two blocks each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        blocks, width = [], 32
        for planes, stride in ((16, 1), (16, 1), (32, 2), (32, 1), (64, 2), (64, 1)):
            blocks.append(_Block(width, planes, stride))
            width = 4 * planes
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [batch, 10]."""
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        out: Tensor = self.head(x.mean(dim=(2, 3)))
        return out


def train(model: nn.Module, x: Tensor, y: Tensor, seconds: float) -> int:
    """SGD with Nesterov momentum and a one-cycle rate over `seconds`; returns the steps."""
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.SGD(
        model.parameters(), LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    model.train()
    started, steps = time.perf_counter(), 0
    while True:
        for part in torch.randperm(len(x), generator=generator).split(BATCH):
            spent = (time.perf_counter() - started) / seconds
            if spent >= 1:
                model.eval()
                return steps
            rate = LEARNING_RATE * min(spent / 0.2, 1) * 0.5 * (1 + math.cos(math.pi * spent))
            for group in optimiser.param_groups:
                group["lr"] = rate
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(shift_and_mirror(x[part], generator)), y[part])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            steps += 1


def trained(seconds: float, cache: Path | None) -> nn.Module:
    """The dense network, trained now, or read from `cache` where it was trained before."""
    torch.manual_seed(0)
    model = BottleneckNet()
    if cache is not None and cache.exists():
        model.load_state_dict(torch.load(cache, weights_only=True))
        return model.eval()
    steps = train(model, *images("train", UNLABELLED, LABELLED), seconds)
    print(f"trained for {seconds:.0f} s, {steps} steps of {BATCH}", flush=True)
    if cache is not None:
        torch.save(model.state_dict(), cache)
    return model


def selected(model: nn.Module, plan: rankopt.RankPlan, data: list[Tensor]) -> nn.Module:
    """The shapes of `plan` by plain channel selection: filters of largest L1 norm (1608.08710)."""
    result = surgery.clone(model)
    modules: dict[str, Any] = dict(surgery.named_modules(result))
    swaps: dict[nn.Module, nn.Module] = {}
    for block in find_bottlenecks(result):
        kept = [
            modules[name].weight.detach().abs().flatten(1).sum(dim=1).topk(rank).indices.sort()[0]
            for name, rank in zip(block.targets[:2], plan[block.name].ranks, strict=True)
        ]
        with torch.no_grad():
            made = resize(modules, block, (kept[0], kept[1]))
        swaps |= {modules[name]: module for name, module in made.items()}
    result = surgery.replace(result, swaps)
    settle_norms(result, model, data)
    remember_plan(result, plan)  # `recover` then watches the same layers
    return result


def accuracy_table(train_seconds: float, steps: int, ratio: float, cache: Path | None) -> str:
    model = trained(train_seconds, cache)
    data = list(torch.split(images("train", 0, UNLABELLED)[0][:1024], 128))
    test = images("val", 0, 500)
    x = data[0][:64]
    made = table(
        "bottleneck ResNet, CIFAR-10 (JPEG), 1,024 unlabelled images, 5,000 validation images",
        "inner width", "macs", "params", "applied", f"recovered, {steps} steps",
    )  # fmt: skip
    made.add_row("dense", "1", "1", percent(correct(model, *test)), "–")
    print("dense", percent(correct(model, *test)), flush=True)

    def row(name: str, small: nn.Module, plan: rankopt.RankPlan) -> None:
        share = {a: (e["measured"] or 0) / (e["before"] or 1) for a, e in plan.totals.items()}
        cells = [name, f"{share['macs']:.3f}", f"{share['params']:.3f}"]
        cells.append(percent(correct(small, *test)))
        rankopt.recover(small, teacher=model, calibration=data, steps=steps)
        cells.append(percent(correct(small, *test)))
        made.add_row(*cells)
        print(*cells, sep=" | ", flush=True)

    plan = rankopt.merge_plan(model, ratio=ratio, example_inputs=x, calibration=data)
    row(f"{ratio:g}, plain selection", selected(model, plan, data), plan)
    row(f"{ratio:g}, merged", rankopt.apply(model, plan, calibration=data), plan)
    share = (plan.totals["macs"]["measured"] or 0) / (plan.totals["macs"]["before"] or 1)
    budget = f"macs<={100 * share:.4f}%"
    plan = rankopt.merge_plan(model, budget, example_inputs=x, calibration=data)
    row("as many MACs, by knapsack", rankopt.apply(model, plan, calibration=data), plan)
    plan = rankopt.merge_plan(model, ratio=ratio, example_inputs=x)
    row(f"{ratio:g}, merged without data", rankopt.apply(model, plan), plan)
    return to_text(made)


def speed_table(rounds: int, batch: int) -> str:
    """Time of ResNet-50 merged at r = p/2, random weights, channels_last."""
    model: Any = make("resnet50")
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    plan = rankopt.merge_plan(model, example_inputs=x[:1])
    # Times do not depend on values: the merged shapes, unfitted, will do.
    small: Any = fill_skeleton(surgery.clone(model), plan)
    small = small.eval().to(memory_format=torch.channels_last)
    with torch.no_grad():
        timings = time_interleaved(
            {"dense": lambda: model(x), "merged": lambda: small(x)}, rounds=rounds
        )
    ratio = timings.ratio("dense", "merged")
    macs = plan.totals["macs"]
    reduction = (macs["before"] or 1) / (macs["measured"] or 1)
    made = table(
        f"ResNet-50 merged at r = p/2, CPU, channels_last, batch {batch}, "
        f"{torch.get_num_threads()} threads, {rounds} rounds",
        "", "dense, ms", "merged, ms", "throughput ratio", "MACs ratio", "realised fraction",
    )  # fmt: skip
    made.add_row(
        "eager, eval",
        str(timings.interval("dense")),
        str(timings.interval("merged")),
        str(ratio),
        f"{reduction:.3f}",
        f"{ratio.median / reduction:.2f}",
    )
    return to_text(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=float, default=280.0, help="seconds of training")
    parser.add_argument("--steps", type=int, default=300, help="steps of each repair")
    parser.add_argument("--ratio", type=float, default=0.5, help="inner width after / before")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--cache", type=Path, help="file for the trained network")
    parser.add_argument("--only", choices=("accuracy", "speed"))
    arguments = parser.parse_args()
    if arguments.only != "accuracy":
        print(speed_table(arguments.rounds, arguments.batch), flush=True)
    if arguments.only != "speed":
        print(accuracy_table(arguments.train, arguments.steps, arguments.ratio, arguments.cache))


if __name__ == "__main__":
    main()

"""What the memory allocator of a CPU process adds to the times of dense and compressed networks.

Run: python -m benchmarks.allocator [--model resnet50] [--batch 8] [--train-batch 16] [--size 224]
     [--rounds 4] [--preload LIBRARY.so]

glibc returns large blocks to the system as soon as they are free, and the system clears each page
anew when it is used again. Settings read at the start of a process make it keep them. So every
round starts one process per setting, in random order; each interleaves the dense network and one
decomposed to half of each layer, in inference and in training steps, and the medians of its
repetitions are one figure. ``--preload`` adds another allocator, such as jemalloc or tcmalloc.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

import rankopt
from benchmarks.foundation import make
from benchmarks.training import trainer
from rankopt._timing.latency import Interval, Timings, time_interleaved
from rankopt._utils.tables import table, to_text
from rankopt_strategies import ParameterRatio

KEPT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
JEMALLOC_KEPT = "dirty_decay_ms:-1,muzzy_decay_ms:-1"
OTHERS = ("MALLOC_", "LD_PRELOAD", "GLIBC_TUNABLES")  # left out of every process
KINDS = ("inference", "training")


def compressed(arguments: argparse.Namespace, path: Path) -> None:
    """The network of every process, decomposed once."""
    dense = make(arguments.model)
    plan = rankopt.search(
        dense, None, strategy=ParameterRatio(ratio=2.0), ignore=["conv1"], progress=False
    )
    rankopt.save(rankopt.apply(dense, plan), path)


def worker(arguments: argparse.Namespace, path: Path) -> None:
    """Print the times of one process, in milliseconds."""
    dense = make(arguments.model)
    models = {"dense": dense, "compressed": rankopt.load(dense, path)}
    found: dict[str, float] = {}
    for kind, batch in zip(KINDS, (arguments.batch, arguments.train_batch), strict=True):
        x = torch.randn(batch, 3, arguments.size, arguments.size)
        x = x.to(memory_format=torch.channels_last)
        y = torch.randint(0, 1000, (batch,))
        candidates = {}
        for name, model in models.items():
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if kind == "training":
                candidates[name] = trainer(model.train(), x, y)
            else:
                model.eval()
                candidates[name] = torch.inference_mode()(lambda model=model, x=x: model(x))
        timings = time_interleaved(candidates, rounds=arguments.repeats)
        found |= {f"{name} {kind}": timings.interval(name).median for name in models}
    print(json.dumps(found))


def measured(arguments: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Setting to what was timed to one figure per round."""
    settings: dict[str, dict[str, str]] = {"default": {}, "kept": KEPT}
    if arguments.preload:
        name = Path(arguments.preload).name
        settings[name] = {"LD_PRELOAD": arguments.preload}
        if "jemalloc" in name:
            settings[f"{name}, kept"] = {**settings[name], "MALLOC_CONF": JEMALLOC_KEPT}
    times: dict[str, dict[str, list[float]]] = {name: {} for name in settings}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "compressed.safetensors"
        compressed(arguments, path)
        command = [sys.executable, "-m", "benchmarks.allocator", *sys.argv[1:]]
        command += ["--worker", str(path)]
        for turn in range(arguments.rounds):
            for name in random.Random(turn).sample(list(settings), len(settings)):
                environment = {k: v for k, v in os.environ.items() if not k.startswith(OTHERS)}
                done = subprocess.run(
                    command, env=environment | settings[name], stdout=subprocess.PIPE, check=True
                )
                for what, value in json.loads(done.stdout.splitlines()[-1]).items():
                    times[name].setdefault(what, []).append(value)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=8, help="of inference")
    parser.add_argument("--train-batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=4, help="processes per setting")
    parser.add_argument("--repeats", type=int, default=5, help="within each process")
    parser.add_argument("--preload", default="", metavar="LIBRARY", help="another allocator")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments, arguments.worker)
        return
    times = measured(arguments)
    made = table(
        f"{arguments.model}, {arguments.size} px: the allocator's part",
        "allocator", "", "dense, ms", "compressed, ms", "compressed / dense",
        "dense / its default", "compressed / its default",
        caption=f"{arguments.rounds} processes each, batch {arguments.batch} in inference and "
        f"{arguments.train_batch} in training, threads {torch.get_num_threads()}; medians with "
        "95% intervals",
    )  # fmt: skip
    for kind in KINDS:
        for name, found in times.items():
            cells = []
            for what in ("dense", "compressed"):
                cells.append(f"{np.median(found[f'{what} {kind}']):.0f}")
            cells.append(str(_ratio(found[f"compressed {kind}"], found[f"dense {kind}"])))
            for what in ("dense", "compressed"):
                of_default = _ratio(found[f"{what} {kind}"], times["default"][f"{what} {kind}"])
                cells.append("–" if name == "default" else str(of_default))
            made.add_row(name, kind, *cells)
    print(to_text(made, width=150))


def _ratio(times: list[float], baseline: list[float]) -> Interval:
    paired = Timings({"a": np.asarray(times), "b": np.asarray(baseline)})
    return paired.ratio("a", "b")


if __name__ == "__main__":
    main()

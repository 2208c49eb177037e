"""Foundation figures: search and factorisation speed, memory, import time, paper table.

Run: python benchmarks/foundation.py [--quick]. Prints one table; every ratio is of
two things measured in this run.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import rankopt
from rankopt._utils.tables import table, to_text
from rankopt.vision import import_torchvision
from rankopt_strategies import ParameterRatio

# Singular values of trained layers fall roughly like this power of their index.
TRAINED_DECAY = 0.5


def make(name: str, spectra: str = "random") -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = import_torchvision().models.get_model(name, weights=None).eval()
    if spectra == "trained-like":
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    decay(module.weight)
    return model


def decay(weight: Any) -> None:
    """Give both channel modes of a random weight a decaying spectrum, in place."""
    for mode in (0, 1):
        n = weight.shape[mode]
        basis = torch.linalg.qr(torch.randn(n, n))[0]
        scale = torch.arange(1, n + 1) ** -TRAINED_DECAY
        mixed = (basis * scale) @ weight.movedim(mode, 0).flatten(1)
        weight.copy_(mixed.reshape(weight.movedim(mode, 0).shape).movedim(0, mode))


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def tensorly_run(model: nn.Module, plan: rankopt.RankPlan, backend: str) -> tuple[float, float]:
    """Factorise the layers of `plan` with TensorLy; seconds and sum of squared errors."""
    import tensorly as tl
    from tensorly.decomposition import partial_tucker

    tl.set_backend(backend)
    seconds, total = 0.0, 0.0
    for decision in plan.changes:
        layer: Any = model.get_submodule(decision.targets[0])
        dense = layer.weight.detach()
        weight: Any = dense if backend == "pytorch" else dense.numpy()
        started = time.perf_counter()
        if decision.method == "svd":
            matrix = weight.reshape(weight.shape[0], -1)
            u, s, vh = tl.tenalg.svd_interface(matrix, n_eigenvecs=decision.ranks[0])
            seconds += time.perf_counter() - started
            rebuilt = (u * s) @ vh
        else:
            ranks = list(decision.ranks)[::-1]
            (core, factors), _ = partial_tucker(weight, rank=ranks, modes=[0, 1], init="svd")
            seconds += time.perf_counter() - started
            rebuilt = tl.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
        total += float(((weight.reshape(rebuilt.shape) - rebuilt) ** 2).sum())
    return seconds, total


def rankopt_errors(model: nn.Module, small: nn.Module, plan: rankopt.RankPlan) -> float:
    total = 0.0
    for decision in plan.changes:
        layer: Any = model.get_submodule(decision.targets[0])
        weight = layer.weight.detach()
        factors: Any = small.get_submodule(decision.targets[0])
        parts = [factor.weight.detach() for factor in factors]
        if len(parts) == 2:
            rebuilt = parts[1].flatten(1) @ parts[0].flatten(1)
        else:
            rebuilt = torch.einsum(
                "sp,pqij,qc->scij", parts[2].flatten(1), parts[1], parts[0].flatten(1)
            )
        total += float((weight.reshape(rebuilt.shape) - rebuilt).square().sum())
    return total


def against_tensorly(name: str, spectra: str, rounds: int) -> list[list[str]]:
    model = make(name, spectra)
    strategy = ParameterRatio(ratio=2.0)

    def ours() -> tuple[rankopt.RankPlan, nn.Module]:
        rankopt.clear_cache()
        plan = rankopt.search(model, None, strategy=strategy, ignore=["conv1"])
        return plan, rankopt.apply(model, plan)

    ours()
    seconds, (plan, small) = min((timed(ours) for _ in range(rounds)), key=lambda pair: pair[0])
    error = rankopt_errors(model, small, plan)
    rows = []
    for backend in ("numpy", "pytorch"):
        theirs, reference = tensorly_run(model, plan, backend)
        rows.append(
            [
                f"{name}, {spectra}: search + apply, TensorLy on {backend}",
                f"{theirs / seconds:.1f}x ({seconds:.2f} s, {theirs:.1f} s), "
                f"error {100 * ((error / reference) ** 0.5 - 1):+.2f}%",
                ">= 30x, <= +1%",
            ]
        )
    return rows


def search_seconds(name: str, strategy: str, settings: dict[str, Any], rounds: int) -> float:
    model = make(name)
    inputs = torch.randn(1, 3, 224, 224)
    made = rankopt.strategies.create(strategy, **settings)
    times = []
    for _ in range(rounds):
        rankopt.clear_cache()
        seconds, _ = timed(
            lambda: rankopt.search(model, "macs<=50%", strategy=made, example_inputs=inputs)
        )
        times.append(seconds)
    return statistics.median(times)


def peak_memory(name: str) -> float:
    """Peak resident memory beyond the imports, the model included, per byte of the model."""
    code = f"""
import torch, rankopt
from benchmarks.foundation import make, import_torchvision
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
import_torchvision().models.resnet18()
base = peak()
model = make({name!r})
size = sum(p.numel() * p.element_size() for p in model.parameters())
rankopt.search(model, "params<=50%")
print((peak() - base) / size)
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    return float(out)


def import_seconds(rounds: int) -> float:
    code = (
        "import time, torch; start = time.perf_counter(); import rankopt; "
        "print(time.perf_counter() - start)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(rounds)
    ]
    return statistics.median(float(run.stdout) for run in runs)


def paper_rows() -> list[list[str]]:
    expected = {
        "resnet50": ("-50.10", "-47.31"),
        "resnet101": ("-50.14", "-48.75"),
        "resnet152": ("-50.15", "-49.26"),
    }
    rows = []
    for name, (params, macs) in expected.items():
        plan = rankopt.search(
            make(name),
            None,
            strategy=ParameterRatio(ratio=2.0),
            example_inputs=torch.randn(1, 3, 224, 224),
            ignore=["conv1"],
        )
        cut = {
            axis: 100
            * (
                float(plan.totals[axis]["measured"] or 0) / float(plan.totals[axis]["before"] or 1)
                - 1
            )
            for axis in ("params", "macs")
        }
        rows.append(
            [
                f"{name}: parameter_ratio 2x, params / MACs",
                f"{cut['params']:.2f}% / {cut['macs']:.2f}%",
                f"{params} / {macs}",
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="ResNet-50 instead of ResNet-152")
    quick = parser.parse_args().quick
    large, rounds = ("resnet50", 2) if quick else ("resnet152", 3)
    made = table("foundation", "what", "measured", "goal")
    for row in paper_rows():
        made.add_row(*row)
    for spectra in ("random", "trained-like"):
        for row in against_tensorly(large, spectra, rounds):
            made.add_row(*row)
    for strategy, settings, goal in (
        ("parameter_ratio", {}, "< 1 s"),
        ("vbmf", {"noise": "compress"}, "< 10 s"),
        ("energy", {}, ""),
    ):
        seconds = search_seconds("resnet50", strategy, settings, 3)
        made.add_row(f"resnet50: search, {strategy}, macs<=50%", f"{seconds:.2f} s", goal)
    made.add_row(f"{large}: peak memory of search", f"{peak_memory(large):.2f}x the model", "< 3x")
    made.add_row("import rankopt after torch", f"{import_seconds(5):.2f} s", "<= 0.3 s")
    print(to_text(made))
    cpu = torch.backends.cpu.get_cpu_capability()
    print(f"{torch.get_num_threads()} threads, {cpu}, torch {torch.__version__}")


if __name__ == "__main__":
    main()

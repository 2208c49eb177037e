"""Fronts of studies against their warm starts, kept in a folder so that runs can be cut."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from torch import Tensor, nn

import rankopt
from benchmarks.cifar import correct
from rankopt._model.inputs import divergence_loss
from rankopt._utils.tables import table, to_text

__all__ = ["METRICS", "Case", "compare", "hypervolume", "joined"]

# Budgets at which the warm starts have plans.
SHARES = (0.7, 0.5, 0.35)
# Where all trials of a space with "+sizes" end.
SIZES = (*SHARES, 0.25)
WARM_ONLY = "warm starts only"
METRICS = ("accuracy", "loss", "agreement")
TEMPERATURE = 4.0


def hypervolume(points: Sequence[tuple[float, float]], floor: float) -> float:
    """Area between points (share of MACs, metric), a MACs share of 1 and the metric `floor`.

    Example:
        >>> hypervolume([(0.5, 80.0), (0.25, 70.0)], 60.0)
        12.5
    """
    area, best = 0.0, floor
    for share, metric in sorted(points):
        if metric > best:
            area += max(0.0, 1 - share) * (metric - best)
            best = metric
    return area


@dataclass(frozen=True)
class Case:
    """A network, what it is searched on and what is reported.

    Args:
        name: Of the files in the folder.
        model: Trained.
        calibration: Batches of inputs.
        batches: (inputs, targets) that trials are evaluated on, one after another; targets are
            labels, or the dense model's logits for the metric ``agreement``.
        test: Inputs and labels that no search sees.
        warm_starts: Strategies.
        metric: What trials are searched by: ``accuracy`` in percent, ``loss`` (cross-entropy,
            negated) or ``agreement`` (divergence from the dense model's softened classes,
            negated). Reported is accuracy in any case.
    """

    name: str
    model: Any
    calibration: list[Tensor]
    batches: list[tuple[Tensor, Tensor]]
    test: tuple[Tensor, Tensor]
    warm_starts: tuple[str, ...]
    metric: str = "accuracy"

    @property
    def searched(self) -> int:
        """Images that trials are evaluated on."""
        return sum(len(y) for _, y in self.batches)

    def evaluate(self, model: Any, batch: tuple[Tensor, Tensor]) -> tuple[float, float]:
        """The metric of a batch, and its size."""
        x, y = batch
        found = model(x)
        if self.metric == "accuracy":
            return 100 * float((found.argmax(1) == y).double().mean()), float(len(y))
        if self.metric == "loss":
            return -float(nn.functional.cross_entropy(found, y)), float(len(y))
        return -float(divergence_loss(y, found, temperature=TEMPERATURE)), float(len(y))

    def study(self, storage: Any, name: str, **more: Any) -> Any:
        """A study of this case."""
        return rankopt.study(
            self.model,
            evaluate=self.evaluate,
            batches=self.batches,
            storage=storage,
            name=name,
            example_inputs=self.batches[0][0][:32],
            calibration=self.calibration,
            warm_starts=self.warm_starts,
            progress=False,
            **more,
        )

    def right(self, plan: Any) -> Tensor:
        """Which test images the plan's model classifies rightly, [n] of 0 and 1."""
        small = self.model if plan is None else self.applied(plan)
        return correct(small, *self.test).double()

    def applied(self, plan: Any) -> Any:
        """The model of a plan."""
        return rankopt.apply(self.model, plan, calibration=self.calibration)


class Folder:
    """Studies in one journal file, figures of finished ones in one JSON file."""

    def __init__(self, path: Path, case: Case, minutes: float | None) -> None:
        path.mkdir(parents=True, exist_ok=True)
        label = f"{case.name}-{case.searched}" + f"-{case.metric}" * (case.metric != "accuracy")
        self.storage, self.figures = path / f"{label}.journal", path / f"{label}.json"
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def known(self) -> dict[str, Any]:
        """Name to figures."""
        return json.loads(self.figures.read_text()) if self.figures.exists() else {}

    def remember(self, name: str, value: Any) -> None:
        """Add one entry."""
        text = json.dumps({**self.known(), name: value}, indent=1)
        temporary = self.figures.with_suffix(".part")
        temporary.write_text(text)
        temporary.replace(self.figures)


def compare(
    case: Case,
    rows: Sequence[tuple[str, str]],
    *,
    folder: Path,
    trials: int,
    seeds: int,
    minutes: float | None,
) -> None:
    """Run or go on with the studies of (space, sampler) rows; print what is finished.

    All seeds of a space share the trials of its warm starts. A run that ends by `minutes`
    says what is left; the same command goes on with it.
    """
    kept = Folder(folder, case, minutes)
    floor = _floor(case, kept)
    for seed in range(seeds):
        for space, sampler in rows:
            _run(case, kept, space, None, 0, trials, floor)
            _run(case, kept, space, sampler, seed, trials, floor)
            if kept.left <= 0:
                print("time is up; the same command goes on", flush=True)
                return _show(case, kept, rows, trials, seeds, floor)
    return _show(case, kept, rows, trials, seeds, floor)


def _floor(case: Case, kept: Folder) -> float:
    """Accuracy of the uniform plan at 30% of the MACs, the dense one beside it."""
    if "floor" not in kept.known():
        uniform = rankopt.search(
            case.model, "macs<=30%", strategy="parameter_ratio",
            example_inputs=case.batches[0][0][:32], calibration=case.calibration,
            methods=("svd", "tucker2"), progress=False,
        )  # fmt: skip
        kept.remember("floor", 100 * case.right(uniform).mean().item())
        kept.remember("dense", 100 * case.right(None).mean().item())
    return float(kept.known()["floor"])


def _label(space: str, sampler: str | None, seed: int, trials: int) -> str:
    return f"{space}, {WARM_ONLY}" if sampler is None else f"{space}, {sampler}, {seed}, {trials}"


def _run(
    case: Case, kept: Folder, space: str, sampler: str | None, seed: int, trials: int, floor: float
) -> None:
    label = _label(space, sampler, seed, trials)
    if label in kept.known() or kept.left <= 0:
        return
    if sampler is not None:
        _copy_warm(kept, space, label)
    more: dict[str, Any] = {"sampler": sampler, "seed": seed} if sampler else {"seed": seed}
    kind, *choices = space.split("+")
    for name in ("fisher", "asymmetric"):
        more[name] = "search" if name in choices else False
    if "sizes" in choices:
        more["sizes"] = SIZES
    with case.study(kept.storage, label, space=kind, **more) as study:
        done = study.status()["counted"]
        wanted = trials if sampler else len(study.optuna.trials)
        started = time.perf_counter()
        study.run(wanted, timeout=None if math.isinf(kept.left) else max(kept.left, 0.0))
        status = study.status()
        spent = (time.perf_counter() - started) / max(1, status["counted"] - done)
        print(f"{label}: {status['counted']}/{wanted} trials, {spent:.2f} s each", flush=True)
        if status["counted"] >= wanted:
            kept.remember(label, {**_figures(case, study, floor), "seconds": spent})


def _copy_warm(kept: Folder, space: str, label: str) -> None:
    """Begin a study with the finished trials of the warm starts."""
    from rankopt._study.storage import open_storage

    storage = open_storage(kept.storage)
    if label not in optuna.get_all_study_names(storage):
        optuna.copy_study(
            from_study_name=_label(space, None, 0, 0), from_storage=storage, to_storage=storage,
            to_study_name=label,
        )  # fmt: skip


def _figures(case: Case, study: Any, floor: float) -> dict[str, Any]:
    """On the test images: hypervolume, and which images are right within each budget."""
    dense = study.request["plan"]["totals"]["macs"]["before"]
    front = [
        (point.figures["macs"] / dense, 100 * case.right(point.plan).mean().item())
        for point in study.front
    ]
    best, searched = {}, {}
    for share in SHARES:
        plan = study.best(rankopt.Budget(macs=share))
        best[str(share)] = "".join(str(int(x)) for x in case.right(plan))
        searched[str(share)] = plan.extensions["study"]["metric"]
    return {
        "hypervolume": hypervolume(front, floor),
        "front": front,
        "right": best,
        "searched": searched,
    }


def _show(
    case: Case, kept: Folder, rows: Sequence[tuple[str, str]], trials: int, seeds: int, floor: float
) -> None:
    known = kept.known()
    made = table(
        f"{case.name}: {trials} trials, median of seeds (lowest to highest); searched on "
        f"{case.searched} images by {case.metric}, reported on {len(case.test[1])}; "
        f"dense {known['dense']:.2f}, floor {floor:.2f}; "
        "± standard error of the difference to the warm starts",
        "space, sampler", "seeds", "hypervolume", *(f"macs<={share:.0%}" for share in SHARES),
        "s/trial",
    )  # fmt: skip
    for space in dict.fromkeys(space for space, _ in rows):
        warm = known.get(_label(space, None, 0, 0))
        if warm is None:
            continue
        made.add_row(f"{space}, {WARM_ONLY}", "", *_cells([warm], warm))
        for sampler in (name for kind, name in rows if kind == space):
            labels = [_label(space, sampler, seed, trials) for seed in range(seeds)]
            found = [known[label] for label in labels if label in known]
            if found:
                made.add_row(f"{space}, {sampler}", str(len(found)), *_cells(found, warm))
    print(to_text(made, width=150))


def _cells(found: list[dict[str, Any]], warm: dict[str, Any]) -> list[str]:
    cells = [joined([one["hypervolume"] for one in found])]
    for share in map(str, SHARES):
        accuracies = [100 * _mean(one["right"][share]) for one in found]
        gains = [_gain(one["right"][share], warm["right"][share]) for one in found]
        middle = statistics.median(gain for gain, _ in gains)
        error = statistics.median(error for _, error in gains)
        ours = found[0] is warm
        cells.append(joined(accuracies) + ("" if ours else f" {middle:+.2f}±{error:.2f}"))
    return [*cells, f"{statistics.median(one['seconds'] for one in found):.1f}"]


def _mean(right: str) -> float:
    return right.count("1") / len(right)


def _gain(right: str, other: str) -> tuple[float, float]:
    """Percentage points gained, and the standard error of a difference on the same images."""
    gains = [int(a) - int(b) for a, b in zip(right, other, strict=True)]
    return 100 * statistics.fmean(gains), 100 * statistics.stdev(gains) / math.sqrt(len(gains))


def joined(values: Sequence[float], show: Callable[[float], str] = "{:.2f}".format) -> str:
    """Median (lowest to highest)."""
    middle = show(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({show(min(values))}–{show(max(values))})"

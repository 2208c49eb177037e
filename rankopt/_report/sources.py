"""What a report is made from: objects in memory, or the files they were written to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rankopt import checkpoint
from rankopt._build.compare import Comparison
from rankopt._pipeline.stages import RESULT, WORK
from rankopt.errors import RankoptError
from rankopt.pipeline import Compression
from rankopt.plan import RankPlan
from rankopt.training.finetune import Training
from rankopt.training.state import RECORD

__all__ = ["Contents", "TrainingRun", "collect"]

EXPECTED: Final = (
    "a plan (.json), a checkpoint (.safetensors), a training record (.jsonl), or the folder of "
    "rankopt.finetune or rankopt.compress"
)
# What a page shows of an epoch.
_EPOCH: Final = (
    "epoch",
    "loss",
    "accuracy",
    "metric",
    "learning_rate",
    "samples_per_second",
    "seconds",
    "frozen",
)


@dataclass(frozen=True)
class TrainingRun:
    """The epochs of one fine-tuning, as in its record."""

    name: str
    epochs: tuple[Mapping[str, Any], ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Contents:
    """Everything a page can show; what is missing is left out of it."""

    plan: RankPlan | None = None
    comparison: Mapping[str, Any] | None = None
    stages: Sequence[Mapping[str, Any]] = ()
    runs: list[TrainingRun] = field(default_factory=list)

    def add(self, **parts: Any) -> None:
        """Set a plan, comparison or stages.

        Raises:
            RankoptError: There is another already: a page shows one of each.
        """
        for name, part in parts.items():
            found = getattr(self, name)
            if found and found != part:
                what = name if name == "stages" else f"a {name}"
                raise RankoptError(
                    f"two of the sources hold {what}, and a page shows one; write a report for each"
                )
            setattr(self, name, part)


def collect(source: Any) -> Contents:
    """Gather what one source, or several in a list, have to show.

    Raises:
        RankoptError: A source is none of the kinds that can be shown.
    """
    contents = Contents()
    several = isinstance(source, Sequence) and not isinstance(source, (str, bytes))
    for one in source if several else [source]:
        _add(contents, one)
    if contents == Contents():
        raise RankoptError("nothing to report; expected " + EXPECTED)
    return contents


def _add(contents: Contents, source: Any) -> None:
    if isinstance(source, RankPlan):
        contents.add(plan=source)
    elif isinstance(source, Comparison):
        contents.add(comparison=source.to_dict())
    elif isinstance(source, Compression):
        _add_result(contents, source.to_dict())
    elif isinstance(source, Training):
        contents.runs.append(TrainingRun("fine-tuning", source.history))
    elif isinstance(source, (str, os.PathLike)):
        _add_path(contents, Path(source))
    else:
        raise RankoptError(f"cannot report a {type(source).__name__}; expected {EXPECTED}")


def _add_path(contents: Contents, path: Path) -> None:
    if path.is_dir():
        _add_folder(contents, path)
    elif not path.exists():
        raise RankoptError(f"{path} does not exist; expected {EXPECTED}")
    elif path.suffix == ".safetensors":
        contents.add(plan=checkpoint.load_plan(path))
    elif path.suffix == ".jsonl":
        contents.runs.append(_record(path, path.stem))
    elif path.suffix == ".json":
        values = _json(path)
        if isinstance(values, dict) and {"stages", "comparison", "plan"} <= values.keys():
            _add_result(contents, values)
        else:
            contents.add(plan=RankPlan.load(path))
    else:
        raise RankoptError(f"cannot report {path}; expected {EXPECTED}")


def _add_folder(contents: Contents, folder: Path) -> None:
    """The folder of a fine-tuning, or of `compress`, finished or not."""
    if (folder / RECORD).exists():
        contents.runs.append(_record(folder / RECORD, folder.name))
        return
    if (folder / RESULT).exists():
        _add_result(contents, _json(folder / RESULT))
    elif (folder / WORK).exists():
        contents.add(stages=list(_json(folder / WORK)["stages"].values()))
        plans = sorted(folder.glob("plan*.json"), key=_round)
        if plans:
            contents.add(plan=RankPlan.load(plans[-1]))
    else:
        raise RankoptError(
            f"{folder} holds neither {RECORD} nor {WORK}; expected the folder of a "
            "rankopt.finetune or rankopt.compress that finished an epoch or a stage"
        )
    records = sorted(folder.glob(f"training*/{RECORD}"), key=lambda path: _round(path.parent))
    contents.runs += [_record(path, path.parent.name.replace("-", " ")) for path in records]


def _round(path: Path) -> int:
    """The number at the end of ``plan-12.json`` or ``training-12``; 0 if there is none."""
    last = path.stem.rpartition("-")[2]
    return int(last) if last.isdigit() else 0


def _add_result(contents: Contents, values: Mapping[str, Any]) -> None:
    plan = RankPlan.from_dict(values["plan"])
    contents.add(plan=plan, comparison=values["comparison"], stages=values["stages"])


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RankoptError(f"{path} cannot be read as JSON: {error}") from error


def _record(path: Path, name: str) -> TrainingRun:
    settings: dict[str, Any] = {}
    epochs = []
    number = 0
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            number += 1
            event = json.loads(line)
            kind = event.pop("event")
            if kind == "start":
                settings = event
            else:
                epochs.append({key: event[key] for key in _EPOCH})
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise RankoptError(
            f"{path}, line {number}: {type(error).__name__}: {error}; expected the record of a "
            "rankopt.finetune"
        ) from error
    return TrainingRun(name, tuple(epochs), settings)

"""compress(): search, apply, recover, fine-tune, verify and save in one call."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from torch import nn

from rankopt import checkpoint as files
from rankopt._build.compare import Comparison
from rankopt._model.measure import uncached_autocast
from rankopt._model.metric import Evaluate
from rankopt._pipeline.checks import check_stages
from rankopt._pipeline.stages import RESULT, Run, Stage
from rankopt._utils.arguments import check_integer
from rankopt._utils.files import write_text
from rankopt._utils.strict_json import strict_json
from rankopt.budget import RATIO_AXES, Budget
from rankopt.errors import BudgetError
from rankopt.plan import RankPlan
from rankopt.training.distillation import Distillation
from rankopt.training.state import make_folder

__all__ = ["Compression", "Stage", "compress"]

# Unlabelled inputs taken from `train` where there is no `calibration`.
CALIBRATION_SAMPLES: Final = 1024

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Compression:
    """The result of `compress`; prints as one table.

    Args:
        model: Reloaded from the file that was written.
        plan: The last round's.
        stages: In order.
        comparison: Of the original model with the reloaded one.
        path: The file; None without `output` and `folder`.
    """

    model: nn.Module
    plan: RankPlan
    stages: tuple[Stage, ...]
    comparison: Comparison
    path: Path | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "output": None if self.path is None else str(self.path),
            "stages": [vars(stage) for stage in self.stages],
            "comparison": self.comparison.to_dict(),
            "plan": self.plan.to_dict(),
        }

    def __str__(self) -> str:
        from rankopt._utils.tables import to_text

        return to_text(*self.tables())

    def tables(self) -> tuple[Any, Any]:
        """The stages, the dense model first, and the comparison."""
        from rankopt._build.comparison_table import comparison_table
        from rankopt._utils.tables import count, table

        made = table("compress", "stage", "seconds", "params", "metric", "result")
        made.columns[-1].justify = "left"
        compared = self.comparison
        dense = "–" if compared.metric is None else f"{compared.metric.before:.4g}"
        made.add_row("dense", "–", count(compared.params.before), dense, "")
        for stage in self.stages:
            metric = "–" if stage.metric is None else f"{stage.metric:.4g}"
            made.add_row(
                stage.name, f"{stage.seconds:.1f}", count(stage.params), metric, stage.note
            )
        return made, comparison_table(compared)


def compress(
    model: nn.Module,
    budget: str | Budget | None,
    *,
    example_inputs: Any = None,
    calibration: Any = None,
    calibration_samples: int = CALIBRATION_SAMPLES,
    train: Any = None,
    evaluate: Evaluate | None = None,
    rounds: int = 1,
    search: Settings | Callable[..., RankPlan] | None = None,
    apply: Settings | Callable[..., nn.Module] | None = None,
    recover: Settings | Callable[..., Any] | bool | None = None,
    finetune: Settings | Callable[..., Any] | bool | None = None,
    output: Any = None,
    folder: Any = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Compression:
    """Make a trained model smaller: search, apply, recover, fine-tune, verify, save.

    What is returned is the model read back from its file, after its outputs were
    found bit-identical to those of the model that was saved.

    Each stage takes settings for the function of its name, or a function in its
    place: ``search(model, budget)``, ``apply(model, plan)``, ``recover(small, teacher)`` and
    ``finetune(small, teacher, folder)``, the last two working in place. ``recover=False`` and
    ``finetune=False`` leave them out.

    Args:
        model: A trained model; not changed.
        budget: See `rankopt.search`.
        example_inputs: See `rankopt.search`; None takes the first calibration batch.
        calibration: Unlabelled inputs; None takes them from `train`, without its labels.
        calibration_samples: How many of them.
        train: Labelled data, see `rankopt.finetune`; without it there is no fine-tuning.
        evaluate: The metric of a model, shown after every stage, and for searches that use
            one: budgets on ``metric_drop`` and strategies such as ``optuna``.
        rounds: Approach the budget in so many steps of equal ratio, each recovered and
            fine-tuned (arXiv 1903.09973); later rounds decompose the model as trained so far.
        search: Settings of `rankopt.search`, or a function.
        apply: Settings of `rankopt.apply`, or a function.
        recover: Settings of `rankopt.recover` (60 seconds, unless ``steps`` are given), or a
            function. None leaves it out, with the reason in the table, where it cannot be done.
        finetune: Settings of `rankopt.finetune` (the dense model as teacher, sequential
            freezing, one final epoch of training everything), or a function.
        output: The ``.safetensors`` file to write; None for ``compressed.safetensors`` in `folder`.
        folder: Keeps what every stage made; called again with the same arguments,
            `compress` goes on where it was interrupted. `rankopt.report` draws it.
        seed: For all stages.
        progress: Whether to show progress bars.

    Raises:
        TypeError: Settings that a stage does not know, or is given anyway; before any work.
        ValueError: Settings out of range, or without the data they are of; before any work, but
            for those of ``search`` and ``apply``.
        BudgetError: A budget that cannot be read, or in milliseconds for several rounds; its
            `BudgetInfeasible` where no plan fits.
        ModelError: `model` is no module; `train` cannot be read every epoch; a function in place
            of a stage returned something else.
        CalibrationError: Calibration inputs that cannot be used.
        EvaluationError: `evaluate` raised, or gave no number; first of the dense model.
        CheckpointError: The folder holds another run, or `output` cannot be written.
        MissingDependency: Fine-tuning without accelerate.
        RankoptError: Anything else of the stages; a result that breaks the budget or does not
            survive being saved.

    Example:
        >>> dense = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> train = [(torch.randn(32, 16), torch.randint(4, (32,))) for _ in range(4)]
        >>> done = rankopt.compress(
        ...     dense, "params<=60%", train=train, recover={"steps": 20}, finetune={"epochs": 2}
        ... )
        >>> [stage.name for stage in done.stages]
        ['search', 'apply', 'recover', 'finetune', 'verify']
        >>> done.comparison.params.ratio <= 0.6
        True
    """
    for name, value, least in (
        ("rounds", rounds, 1),
        ("calibration_samples", calibration_samples, 1),
        ("seed", seed, 0),
    ):
        check_integer(name, value, least)
    stages: dict[str, Any] = {
        "search": search,
        "apply": apply,
        "recover": recover,
        "finetune": finetune,
    }
    for name, how in stages.items():
        optional = name in ("recover", "finetune")
        if how is None or callable(how) or isinstance(how, Mapping) or (optional and how is False):
            continue
        raise ValueError(
            f"{name}={how!r}: expected a mapping of settings, a function"
            + (", or False" if optional else "")
        )
    if isinstance(finetune, Mapping) and train is None:
        raise ValueError("finetune= needs train=, the labelled data")
    if isinstance(recover, Mapping) and calibration is None and train is None:
        raise ValueError("recover= needs calibration= or train=, inputs to repair it with")
    check_stages(model, stages, train)
    budgets = _budgets(Budget.parse(budget), rounds)
    with ExitStack() as stack:
        stack.enter_context(uncached_autocast())
        kept = None if folder is None else make_folder(folder)
        work = Path(kept or stack.enter_context(tempfile.TemporaryDirectory()))
        path = files.check_target(work / "compressed.safetensors" if output is None else output)
        run = Run(model, work, evaluate, seed, progress)
        run.calibrate(
            calibration, train, calibration_samples, example_inputs, labelled=_labelled(finetune)
        )
        run.begin([None if b is None else b.to_dict() for b in budgets], stages, train)
        small, plan = run.rounds(budgets, train)
        comparison = run.verify(small, plan, budgets[-1], path)
        reloaded = files.load(model, path).eval()
        done = Compression(
            reloaded,
            plan,
            tuple(run.stages),
            comparison,
            path if output is not None or kept is not None else None,
        )
        if kept is not None:
            write_text(kept / RESULT, strict_json(done.to_dict(), indent=1) + "\n")
        return done


def _labelled(finetune: Any) -> bool:
    """Whether the training data ends in labels: all does but that for distillation without them."""
    given = finetune.get("distillation") if isinstance(finetune, Mapping) else None
    return not isinstance(given, Distillation) or given.labels > 0


def _budgets(budget: Budget | None, rounds: int) -> list[Budget | None]:
    """One budget per round, in steps of equal ratio; the last is the one asked for."""
    if budget is None or rounds == 1:
        return [budget] * rounds
    if not set(budget.axes) <= set(RATIO_AXES):
        raise BudgetError(
            f"rounds={rounds} needs a budget of shares of the original model, which "
            f"{', '.join(budget.axes)} is not"
        )
    steps = [
        replace(budget, **{axis: budget.ratio(axis) ** (step / rounds) for axis in budget.axes})
        for step in range(1, rounds)
    ]
    return [*steps, budget]

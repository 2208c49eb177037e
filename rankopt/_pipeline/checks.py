"""What `rankopt.compress` refuses: before it does any work, and of what came of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import nn

from rankopt._build.apply import apply
from rankopt._build.compare import Figure
from rankopt._search.search import search
from rankopt.budget import Budget
from rankopt.errors import RankoptError
from rankopt.training.finetune import check_request, finetune
from rankopt.training.front import check_fronts
from rankopt.training.launcher import require_accelerate
from rankopt.training.repair import check_settings, recover
from rankopt.training.schedules import Schedule

__all__ = ["TUNING", "check_budget", "check_stages"]

# The function of each stage, and how many of its arguments `compress` gives by position.
FUNCTIONS: Final[Mapping[str, tuple[Callable[..., Any], int]]] = {
    "search": (search, 2),
    "apply": (apply, 2),
    "recover": (recover, 1),
    "finetune": (finetune, 2),
}
TUNING: Final[Mapping[str, Any]] = {"freezing": "sequential", "final_epochs": 1}


def check_stages(model: nn.Module, stages: Mapping[str, Any], train: Any) -> None:
    """Raise what a stage would, once those before it had run.

    Raises:
        TypeError: Settings that a stage does not know, or is given anyway.
        ValueError: A setting out of range.
        ModelError: `train` cannot be trained on, nothing in the model trains, or it has no module
            up to which a front is to be frozen.
        MissingDependency: Fine-tuning without accelerate.
    """
    for name, how in stages.items():
        if isinstance(how, Mapping):
            function, given = FUNCTIONS[name]
            try:
                inspect.signature(function).bind_partial(*[None] * given, **how)
            except TypeError as error:
                raise TypeError(f"{name}={dict(how)!r}: {error}") from error
    repair, tuning = stages["recover"], stages["finetune"]
    if isinstance(repair, Mapping):
        names = inspect.signature(check_settings).parameters
        check_settings(**{name: repair[name] for name in names if name in repair})
    if train is not None and tuning is not False and not callable(tuning):
        settings = {"teacher": model, **TUNING, **(tuning or {})}
        # What a function in place of `apply` returns is not known yet.
        known = None if callable(stages["apply"]) else model
        recipe = check_request(known, train, **settings)
        if known is not None and isinstance(recipe.freezing, Schedule):
            check_fronts(known, recipe.freezing.modules())
        require_accelerate()


def check_budget(budget: Budget | None, figures: Mapping[str, Figure | None]) -> None:
    """Hold counted figures to the budget; latency was held by the search.

    Args:
        budget: The user's; None for none.
        figures: By axis; other entries are left alone.

    Raises:
        RankoptError: One is above it.
    """
    for axis in ("params", "macs", "memory"):
        figure = figures.get(axis)
        if budget is None or axis not in budget.axes or figure is None:
            continue
        if figure.after > budget.ratio(axis) * figure.before:
            raise RankoptError(
                f"the result's {axis} is {100 * figure.ratio:.2f}% of the original's, above the "
                f"budget ({budget.explain()}); no output was written"
            )

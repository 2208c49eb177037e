"""Every exception and warning a user of rankopt can meet.

All exceptions derive from `RankoptError` and from the built-in exception a
caller would expect, so ``except ValueError`` keeps working.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Final

__all__ = [
    "BudgetError",
    "BudgetInfeasible",
    "CalibrationError",
    "CheckpointError",
    "DeadlineExceeded",
    "EvaluationError",
    "ExportError",
    "LayerError",
    "MissingDependency",
    "ModelError",
    "PlanError",
    "RankoptError",
    "RankoptWarning",
    "RegistryError",
    "StudyError",
    "TrainingError",
    "warn",
]

# Besides rankopt's own, what stands between a user's line and ours: decorators, hooks, studies.
_INSIDE: Final = frozenset({"rankopt", "rankopt_strategies", "torch", "optuna", "contextlib"})


class RankoptError(Exception):
    """Base class of every error raised on purpose by rankopt."""


class BudgetError(RankoptError, ValueError):
    """A budget that cannot be read, or that asks for an unknown quantity."""


class BudgetInfeasible(BudgetError):
    """No plan of this strategy fits the budget.

    Attributes:
        smallest: For each axis of the budget, the smallest ratio to the
            original model that the strategy can reach.
    """

    def __init__(self, message: str, smallest: Mapping[str, float]) -> None:
        super().__init__(message)
        self.smallest = dict(smallest)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.smallest)


class PlanError(RankoptError, ValueError):
    """A plan file that is damaged, or that does not fit the model at hand."""


class LayerError(RankoptError, ValueError):
    """A layer whose weights or form make the request impossible."""


class ModelError(RankoptError, ValueError):
    """A model, or example inputs for it, that rankopt cannot work with."""


class RegistryError(RankoptError, LookupError):
    """An unknown or doubly registered strategy or decomposition."""


class CalibrationError(RankoptError, ValueError):
    """Calibration data a model cannot run on, or that says nothing."""


class CheckpointError(RankoptError, ValueError):
    """A checkpoint that is damaged or does not fit the model."""


class ExportError(RankoptError, RuntimeError):
    """A model another format cannot hold, or a file that computes something else."""


class TrainingError(RankoptError, RuntimeError):
    """Training that cannot go on: a batch it cannot use, or a loss that is not finite."""


class MissingDependency(RankoptError, ImportError):
    """An optional package is needed; the message says what to install."""


class EvaluationError(RankoptError, RuntimeError):
    """The user's ``evaluate`` raised, gave no number that can be used, or changed the model."""


class StudyError(RankoptError, RuntimeError):
    """A study that cannot be opened, does not fit the request, or has no answer yet."""


class DeadlineExceeded(RankoptError, TimeoutError):
    """The search ran into its deadline before it had a plan to return."""


class RankoptWarning(UserWarning):
    """Something a user should know that does not stop the work."""


def warn(message: str, category: type[Warning] = RankoptWarning) -> None:
    """Warn at the line outside rankopt that led here, however deep the call.

    Python shows a warning once per line: at one of ours, the second model of a program
    would get none.
    """
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        if frame.f_back is None:  # a thread of our own
            break
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )

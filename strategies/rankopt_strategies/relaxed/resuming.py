"""What a search leaves in a folder, to go on from after a crash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from rankopt._model.inputs import digest
from rankopt.errors import CheckpointError
from rankopt.plan import FISHER
from rankopt.strategy import Problem
from rankopt.training.state import load_state, make_folder, save_state
from rankopt_strategies.relaxed.objective import Objective

__all__ = ["Checkpoint"]

# How near what the dense model gives has to be to what it gave when the search began.
SAME: Final = 1e-3
ROUNDING: Final = 1e-9


class Checkpoint:
    """The state of one search in a folder; without a folder nothing is kept.

    A search under several budgets (on latency, on the metric), without and with the Fisher
    information, has one file for each.

    Args:
        folder: Where; made if need be.
        settings: Of the strategy; those that change the result.
        problem: What is searched.
        objective: Its loss on data, if any.
        dense_loss: What that is for the dense model: another criterion has another.
    """

    def __init__(
        self,
        folder: str | None,
        settings: Mapping[str, Any],
        problem: Problem,
        objective: Objective | None,
        dense_loss: float | None = None,
    ) -> None:
        self._folder = None if folder is None else make_folder(folder)
        if self._folder is None:
            return
        budget = "none" if problem.budget is None else repr(problem.budget)
        named = budget + FISHER * problem.fisher
        self._name = f"relaxed-{hashlib.sha256(named.encode()).hexdigest()[:12]}.pt"
        self._identity = {
            "budget": budget,
            "settings": json.dumps(settings, sort_keys=True),
            "weights": problem.model.get("weights"),
            "layers": json.dumps(
                [[site.name, [repr(method) for method in site.methods]] for site in problem.sites]
            ),
            "round_to": problem.round_to,
            "calibration": (
                f"{problem.calibration}{FISHER}" if problem.fisher else problem.calibration
            ),
            "data": (None if objective is None or objective.distils else digest(objective.batches)),
        }
        # What follows from a forward pass is not the same to the last bit everywhere.
        self._computed: list[float] = []
        if objective is not None:
            assert dense_loss is not None
            self._computed = [dense_loss, *(objective.summary() if objective.distils else [])]

    @property
    def path(self) -> Path | None:
        """The file; None where nothing is kept."""
        return None if self._folder is None else self._folder / self._name

    def load(self) -> dict[str, Any]:
        """The state last saved; empty where there is none.

        Raises:
            CheckpointError: The file is damaged or of another search.
        """
        if self._folder is None:
            return {}
        state = load_state(self._folder, self._identity, self._name) or {}
        computed = state.pop("computed", self._computed)
        if not np.allclose(computed, self._computed, rtol=SAME, atol=ROUNDING):
            raise CheckpointError(
                f"{self.path} was made with another criterion or model: for the dense model loss "
                f"and outputs were {computed}, here they are {self._computed}; use another folder"
            )
        return state

    def save(self, **state: Any) -> None:
        """Replace the state, atomically; tensors and plain values only."""
        if self._folder is not None:
            state["computed"] = self._computed
            save_state(self._folder, self._identity, state, self._name)

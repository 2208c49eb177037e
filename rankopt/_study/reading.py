"""Reading what other processes wrote: opening Optuna studies, and which trials count."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from rankopt._study.records import ATTRIBUTE
from rankopt._study.storage import MAKE_ONE, storage_errors
from rankopt.errors import StudyError

if TYPE_CHECKING:
    import optuna

__all__ = ["DEFAULT_NAME", "counts", "load_optuna", "nothing_yet", "quiet", "record_of"]

DEFAULT_NAME: Final = "rankopt"


def record_of(trial: optuna.trial.FrozenTrial) -> Mapping[str, Any]:
    """What rankopt wrote into a trial; empty for trials that never began."""
    found = trial.user_attrs.get(ATTRIBUTE, {})
    return found if isinstance(found, dict) else {}


def counts(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a trial counts: done, stopped early, or failed with an error of its own."""
    state = trial.state.name
    return state in ("COMPLETE", "PRUNED") or (state == "FAIL" and "error" in record_of(trial))


def nothing_yet(study: optuna.Study) -> StudyError:
    """The error where no trial has completed; says what the last one failed with."""
    failed = [e for t in study.get_trials(deepcopy=False) if (e := record_of(t).get("error"))]
    last = f"; {len(failed)} failed, the last with: {failed[-1]}" if failed else "; run some"
    return StudyError(f"study {study.study_name!r} has no completed trial{last}")


def load_optuna(opened: Any, name: str | None, *, where: str) -> optuna.Study:
    """An existing Optuna study; `StudyError` where there is none."""
    import optuna

    with storage_errors(where):
        names = optuna.get_all_study_names(opened)
        if name is None and len(names) == 1:
            name = names[0]
        if name not in names:
            have = f"it has {', '.join(sorted(names)[:5])}" if names else f"it has none; {MAKE_ONE}"
            asked = "none was named" if name is None else f"there is no study {name!r}"
            raise StudyError(f"storage {where}: {asked}; {have}")
        with quiet():
            return optuna.load_study(study_name=name, storage=opened)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Optuna's own messages off: rankopt says what there is to say."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)

"""Looking at a study: a table, plans and figures."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankopt._study.front import Front
from rankopt._study.reading import counts, quiet, record_of
from rankopt._utils.files import atomic_path, write_text
from rankopt._utils.strict_json import strict_json
from rankopt._utils.tables import counted, table
from rankopt.errors import MissingDependency, RankoptError, StudyError

if TYPE_CHECKING:
    import optuna

    from rankopt._study.study import Study

__all__ = ["export", "figures", "status", "status_view"]


def status(
    name: str,
    request: Mapping[str, Any],
    trials: Sequence[optuna.trial.FrozenTrial],
    front: Front,
) -> dict[str, Any]:
    """Counts and the state of a study, as plain data."""
    states: dict[str, int] = {}
    for trial in trials:
        lost = trial.state.name == "FAIL" and not counts(trial)
        state = "lost" if lost else trial.state.name.lower()
        states[state] = states.get(state, 0) + 1
    records = [record_of(trial) for trial in trials]
    return {
        "study": name,
        "objective": front.axis,
        "direction": request["direction"],
        "space": request["space"]["kind"],
        "rankopt": request["version"],
        "counted": sum(counts(trial) for trial in trials),
        "trials": states,
        "workers": sorted({t.user_attrs["worker"] for t in trials if "worker" in t.user_attrs}),
        "dense_metric": front.dense_metric,
        "duplicates": sum("duplicate" in record for record in records),
        "timed": sum(point.timing is not None for point in front.every),
        "errors": sorted({str(record["error"]) for record in records if "error" in record}),
        "front": [
            {"trial": p.trial, "metric": p.metric, "share": front.share(p), "warm": p.warm}
            for p in front.pareto()
        ],
    }


def status_view(status: dict[str, Any]) -> list[Any]:
    """A study's front as a table, below it how the trials stand."""
    from rich.text import Text

    dense = status["dense_metric"]
    made = table(f"study {status['study']}", "trial", status["objective"], "metric", "from")
    for point in status["front"]:
        made.add_row(
            str(point["trial"]), f"{point['share']:.1%}", f"{point['metric']:.6g}",
            point["warm"] or "the sampler",
        )  # fmt: skip
    lines = [
        f"to {status['direction']} the metric, dense "
        + ("not evaluated yet" if dense is None else f"{dense:.6g}")
        + f"; space {status['space']}",
        _progress(status),
        *(f"failed: {text}" for text in status["errors"][:3]),
    ]
    return [made, *(Text(line) for line in lines)]


def _progress(status: Mapping[str, Any]) -> str:
    """How the trials stand, in words."""
    states = status["trials"]
    if states.keys() <= {"waiting"}:
        return f"{counted(states.get('waiting', 0), 'plan')} queued, none run yet"
    trials = ", ".join(f"{count} {name}" for name, count in sorted(states.items()))
    done, workers = counted(status["counted"], "trial"), counted(len(status["workers"]), "worker")
    return (
        f"{done} counted ({trials}); {status['duplicates']} answered from the study; "
        f"{workers} so far"
    )


def figures(study: Study) -> dict[str, Any]:
    """Plotly figures by name: ``pareto``, ``history`` and ``importances`` (of the metric).

    Times are the measured ones where whole models were timed.

    Raises:
        MissingDependency: plotly is not installed.
        StudyError: Too few trials for a figure.
    """
    import optuna

    try:
        import plotly  # noqa: F401
    except ImportError as error:
        raise MissingDependency("figures need plotly: pip install 'rankopt[report]'") from error
    points = {point.trial: point for point in study.points}
    if len(points) < 2:
        raise StudyError("no figures yet: they need two completed trials; run more")
    draw = optuna.visualization
    names = ["metric", study.objective]
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna's remarks on trials it leaves out
        try:
            return {
                "pareto": draw.plot_pareto_front(
                    study.optuna,
                    target_names=names,
                    targets=lambda trial: (
                        points[trial.number].metric,
                        points[trial.number].figures[study.objective],
                    ),
                ),
                "history": draw.plot_optimization_history(
                    study.optuna, target=lambda trial: trial.values[0], target_name="metric"
                ),
                "importances": draw.plot_param_importances(
                    study.optuna, target=lambda trial: trial.values[0], target_name="metric"
                ),
            }
        except (ValueError, RuntimeError) as error:
            raise StudyError(f"no figures yet: {error}; run more trials") from error


def export(
    study: Study, folder: str | os.PathLike[str], *, figures: bool = False
) -> tuple[Path, ...]:
    """Write every Pareto plan, the status, and on request the figures, into a folder.

    Args:
        study: With completed trials.
        folder: Made if it is not there.
        figures: Whether to draw HTML figures.

    Returns:
        The files: ``plan-<trial>.json``, ``status.json`` and ``<figure>.html``.
    """
    front = study.front
    drawn = _draw(study) if figures else {}
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RankoptError(f"cannot make {target}: {error.strerror or error}") from error
    written = []
    for point in front:
        written.append(target / f"plan-{point.trial}.json")
        point.plan.save(written[-1])
    written.append(target / "status.json")
    write_text(written[-1], strict_json(study.status(), indent=2) + "\n")
    for name, figure in drawn.items():
        written.append(target / f"{name}.html")
        with atomic_path(written[-1]) as temporary:
            figure.write_html(temporary, include_plotlyjs=True)
    return tuple(written)


_draw = figures

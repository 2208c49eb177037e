"""What a study stores: its request, and of every trial the options, figures and values."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from rankopt._version import __version__
from rankopt.errors import StudyError
from rankopt.plan import Factors, RankPlan
from rankopt.strategy import Option, Problem, Strategy

__all__ = [
    "ATTRIBUTE",
    "SCHEMA",
    "Point",
    "check_request",
    "key_of",
    "options_in",
    "options_of",
    "read_request",
    "rows_of",
    "template",
    "to_plan",
]

SCHEMA: Final = "rankopt.study/1"
ATTRIBUTE: Final = "rankopt"
# Devices may count the MACs of a layer differently, those of padded attention heads for one.
SAME_TOTALS: Final = 0.02


@dataclass(frozen=True)
class Point:
    """A finished trial.

    Args:
        trial: Its number in the study.
        metric: What `evaluate` gave.
        figures: Axis to the whole model's figure, such as ``macs``; ``latency`` as predicted
            from layers until the model was timed.
        plan: The plan, to `rankopt.apply`.
        warm: The strategy whose plan this is; None for points the sampler chose.
    """

    trial: int
    metric: float
    figures: Mapping[str, float]
    plan: RankPlan
    warm: str | None = None


def rows_of(options: Sequence[Option]) -> list[list[Any]]:
    """Options as JSON: method, args, costs by axis, error."""
    return [[] if option.keeps else _row(option) for option in options]


def _row(option: Option) -> list[Any]:
    kind = option.factors.kind
    return [option.method, dict(option.args), dict(option.cost), option.error, kind]


def options_of(problem: Problem, rows: Sequence[Sequence[Any]], reason: str) -> list[Option]:
    """The options that `rows_of` wrote."""
    made = []
    for site, row in zip(problem.sites, rows, strict=True):
        if not row:
            made.append(problem.keep(site, reason))
            continue
        method, args, cost, error, kind = row
        factors = Factors(kind, None if kind == "weights" else problem.calibration)
        made.append(Option(method, args, cost, error, reason, factors))
    return made


def options_in(problem: Problem, plan: RankPlan) -> list[Option]:
    """The options a plan of this problem chose."""
    made = []
    for site in problem.sites:
        decision = plan[site.name]
        if decision.keeps:
            made.append(problem.keep(site, decision.reason.removeprefix("keep: ")))
            continue
        cost = {axis: after for axis, (_, after) in decision.cost.items()}
        made.append(
            Option(
                decision.method, decision.args, cost, decision.error, decision.reason,
                decision.factors,
            )
        )  # fmt: skip
    return made


def key_of(rows: Sequence[Sequence[Any]]) -> str:
    """Digest of a configuration: two trials with the same key build the same model."""
    text = json.dumps([[*row[:2], *_special(row)] for row in rows], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _special(row: Sequence[Any]) -> list[str]:
    """The kind of a row's factors where it is not the usual one."""
    factors = Factors(row[4], None if row[4] == "weights" else "") if row else Factors()
    return [factors.kind] if factors.fisher or factors.asymmetric else []


def template(problem: Problem, environment: Mapping[str, Any]) -> dict[str, Any]:
    """The plan that keeps every layer, as JSON; trials are told as changes to it."""
    kept = [problem.keep(site, "the trial keeps it") for site in problem.sites]
    plan = RankPlan(
        model=problem.model,
        decisions=problem.decisions(kept),
        environment=environment,
        totals={
            axis: {"before": total, "predicted": total, "measured": None}
            for axis, total in problem.totals.items()
        },
    )
    return plan.to_dict()


def to_plan(
    request: Mapping[str, Any], record: Mapping[str, Any], trial: int, metric: float
) -> RankPlan:
    """The plan of a finished trial."""
    base = RankPlan.from_dict(request["plan"])
    rows = dict(zip(request["space"]["sites"], record["rows"], strict=True))
    reason = f"chosen by trial {trial} of the study"
    decisions = []
    for decision in base:
        row = rows.get(decision.targets[0])
        if not row:
            decisions.append(decision)
            continue
        method, args, cost, error, kind = row
        decisions.append(
            replace(
                decision,
                method=method,
                args=args,
                reason=reason,
                cost={axis: (before, cost[axis]) for axis, (before, _) in decision.cost.items()},
                error=error,
                factors=Factors(kind, None if kind == "weights" else request["calibration"]),
            )
        )
    totals = {
        axis: {**entry, "predicted": record["figures"][axis]} for axis, entry in base.totals.items()
    }
    settings = {key: request[key] for key in ("objective", "direction", "sampler")}
    return replace(
        base,
        decisions=tuple(decisions),
        strategy={
            "name": "optuna",
            "settings": {**settings, "space": request["space"]["kind"]},
            "seed": request["seed"],
        },
        totals=totals,
        extensions={"study": {"trial": trial, "metric": metric, "warm": record.get("warm")}},
    )


def read_request(attributes: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a study was made for.

    Raises:
        StudyError: The study is not rankopt's, or of another schema.
    """
    request = attributes.get(ATTRIBUTE)
    if not isinstance(request, dict):
        raise StudyError(
            f"study {name!r} was not made by rankopt: make one with rankopt.study(...) or "
            "`rankopt study create`, or give another name"
        )
    if request.get("schema") != SCHEMA:
        raise StudyError(
            f"study {name!r} has schema {request.get('schema')!r}; this rankopt reads {SCHEMA!r}"
        )
    return request


def check_request(found: Mapping[str, Any], wanted: Mapping[str, Any], name: str) -> None:
    """Refuse to go on with a study that was made for something else.

    Raises:
        StudyError: Names the field, what the study has and what was asked for.
    """
    if found["version"] != __version__:
        raise StudyError(
            f"study {name!r} was begun with rankopt {found['version']}, this is {__version__}: "
            "trials of both would not compare; finish it with that version, or begin another "
            "study (its front can be read with any version)"
        )
    for key, text in (
        ("class", "a model of another class"),
        ("structure", "a model of another structure"),
        ("weights", "other weights"),
    ):
        if found["model"].get(key) != wanted["model"].get(key):
            raise StudyError(
                f"study {name!r} was made for {text}: it has {found['model'].get(key)}, the model "
                f"given has {wanted['model'].get(key)}; give the same model, or another study name"
            )
    _check_totals(found["plan"]["totals"], wanted["totals"], name)
    for key in ("objective", "direction", "budget", "calibration", "round_to", "rounding"):
        if key in wanted and found[key] != wanted[key]:
            raise StudyError(
                f"study {name!r} has {key} {found[key]!r}, the request {wanted[key]!r}: give the "
                "same, or another study name"
            )
    for key in ("fisher", "asymmetric"):
        if key in wanted and found.get(key, False) != wanted[key]:
            raise StudyError(
                f"study {name!r} has {key} {found.get(key, False)!r}, the request "
                f"{wanted[key]!r}: give the same, or another study name"
            )
    if "sizes" in wanted and found["space"].get("sizes") != wanted["sizes"]:
        raise StudyError(
            f"study {name!r} has sizes {found['space'].get('sizes')}, the request "
            f"{wanted['sizes']}: give the same, or another study name"
        )
    if "methods" in wanted:
        methods, asked = (_methods(each.get("methods")) for each in (found, wanted))
        if set(methods) != set(asked):
            raise StudyError(
                f"study {name!r} has methods {', '.join(methods)}, the request "
                f"{', '.join(asked)}: give the same, or another study name"
            )
    if "space" in wanted and found["space"]["kind"] != wanted["space"]:
        raise StudyError(
            f"study {name!r} searches the space {found['space']['kind']!r}, the request "
            f"{wanted['space']!r}: give the same, or another study name"
        )


def _methods(names: Sequence[str] | None) -> list[str]:
    """Decompositions as text that is the same in every process."""
    return [re.sub(" at 0x[0-9a-f]+", "", name) for name in names or Strategy.methods]


def _check_totals(
    found: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, float], name: str
) -> None:
    """Refuse other figures of the same dense model: shares of both would not compare."""
    for axis in ("params", "memory", "macs"):
        before, now = found.get(axis, {}).get("before"), wanted.get(axis)
        if before is None or now is None:
            same = before is now
        else:
            same = abs(before - now) <= SAME_TOTALS * before
        if not same:
            had, got = ("none" if value is None else f"{value:,}" for value in (before, now))
            raise StudyError(
                f"study {name!r} was made with other example_inputs: the dense model has {axis} "
                f"{had} there, {got} here; give the same, or another study name"
            )

"""RankPlan: what to do with every layer of a model, and why.

A plan is a frozen value with a versioned JSON form that reads well in a diff.
It is what every strategy returns and what `rankopt.apply` consumes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from rankopt._plan_json import check_keys, listed, number, pretty, refuse_constant, typed
from rankopt._utils.files import write_text
from rankopt.budget import Budget
from rankopt.errors import BudgetError, PlanError

__all__ = ["KEEP", "MERGE", "SCHEMA", "Decision", "Factors", "RankPlan"]

SCHEMA: Final = "rankopt.plan/1"
KEEP: Final = "keep"
# Three convolutions become three narrower ones; see `rankopt.merge`.
MERGE: Final = "merge"
FISHER: Final = "+fisher"
_AWARE: Final = ("whitened", "whitened+output", "asymmetric")
FACTOR_KINDS: Final = ("weights", *_AWARE, *(kind + FISHER for kind in _AWARE), "learned")


@dataclass(frozen=True)
class Factors:
    """How a decision's factors are made.

    With calibration inputs, linear layers and convolutions that have a bias of their own are
    approximated less the mean μ of their inputs, and the chain's bias is b + (W − Ŵ)μ: the mean
    of the layer's outputs stays as it is. Layers without a bias, and convolutions of which only
    the channels' moments are known, are approximated mean included.

    Args:
        kind: ``weights`` (from the weights alone), ``whitened``,
            ``whitened+output``, ``asymmetric`` (from calibration moments), one of these
            with ``+fisher`` (and gradients at the outputs) or ``learned`` (stored factors).
        digest: SHA-256 of the calibration inputs or stored factors; None for ``weights``.
    """

    kind: str = "weights"
    digest: str | None = None

    @property
    def asymmetric(self) -> bool:
        """Whether factors are fitted to what the compressed layers before pass on."""
        return self.kind.startswith("asymmetric")

    def in_order(self) -> Factors:
        """The same, fitted to what the compressed layers before pass on; as it is without data."""
        if not self.kind.startswith("whitened"):
            return self
        return replace(self, kind="asymmetric" + FISHER * self.fisher)

    @property
    def fisher(self) -> bool:
        """Whether they weigh the outputs by the Fisher information."""
        return self.kind.endswith(FISHER)

    def __post_init__(self) -> None:
        if self.kind not in FACTOR_KINDS:
            raise PlanError(
                f"factors kind {self.kind!r}: expected one of {', '.join(FACTOR_KINDS)}"
            )
        if (self.digest is None) != (self.kind == "weights"):
            raise PlanError(
                f"factors kind {self.kind!r} with digest {self.digest!r}: "
                "exactly the kinds other than 'weights' carry a digest"
            )


@dataclass(frozen=True)
class Decision:
    """What happens to one site, that is to the layers decided together.

    Args:
        targets: Full module names of the site's layers.
        shapes: Shape of each target's weight as stored in the original model.
        method: ``keep``, ``merge`` or the name of a decomposition.
        args: Settings of the method, ranks first: ``{"ranks": [r1, r2]}``,
            in the order (input, output).
        reason: Why, in words.
        cost: Axis to (before, after): ``params``, ``memory`` (bytes), ``macs``.
        error: Relative Frobenius error ‖W − Ŵ‖/‖W‖ of the truncation, 0 for
            ``keep``; None where it is not known. With calibration inputs it is the relative
            error of the layer's outputs on them, of those less their mean where the bias
            makes up for that (see `Factors`).
        factors: How the factors are made.
    """

    targets: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    method: str
    args: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    cost: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    error: float | None = None
    factors: Factors = field(default_factory=Factors)

    def __post_init__(self) -> None:
        # Plans written by hand have lists here, which no tuple equals.
        object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "shapes", tuple(tuple(shape) for shape in self.shapes))
        where = f"decision for {', '.join(self.targets) or '(no target)'}"
        if not self.targets:
            raise PlanError("a decision without targets: name at least one layer")
        if len(self.shapes) != len(self.targets):
            raise PlanError(
                f"{where}: {len(self.targets)} targets but {len(self.shapes)} shapes; give one each"
            )
        if not self.method:
            raise PlanError(f"{where}: method is empty; expected 'keep' or a decomposition")
        for rank in self.ranks:
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise PlanError(f"{where}: rank {rank!r}: ranks are integers of at least 1")
        if self.error is not None and not (math.isfinite(self.error) and self.error >= 0):
            raise PlanError(
                f"{where}: error {self.error!r}: expected a finite number of at least 0"
            )

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks, input side first; empty where the method has none."""
        ranks = self.args.get("ranks", ())
        if not isinstance(ranks, Sequence) or isinstance(ranks, str):
            raise PlanError(
                f"decision for {', '.join(self.targets)}: ranks {ranks!r} is not a list"
            )
        return tuple(ranks)

    @property
    def keeps(self) -> bool:
        """Whether the layers stay as they are."""
        return self.method == KEEP

    def to_dict(self) -> dict[str, Any]:
        """JSON form; the inverse of `from_dict`."""
        factors: dict[str, Any] = {"kind": self.factors.kind}
        if self.factors.digest is not None:
            factors["digest"] = self.factors.digest
        return {
            "targets": list(self.targets),
            "shapes": [list(shape) for shape in self.shapes],
            "method": self.method,
            "args": dict(self.args),
            "reason": self.reason,
            "cost": {
                axis: {"before": before, "after": after}
                for axis, (before, after) in self.cost.items()
            },
            "error": self.error,
            "factors": factors,
        }

    @classmethod
    def from_dict(cls, values: Any) -> Decision:
        """Read one decision, refusing unknown keys and wrong types."""
        names = values.get("targets") if isinstance(values, dict) else None
        where = f"decision for {names}" if names else "decision"
        check_keys(values, {f.name for f in fields(cls)}, where)
        try:
            cost = {
                str(axis): (entry["before"], entry["after"])
                for axis, entry in values["cost"].items()
            }
            for axis, pair in cost.items():
                for value in pair:
                    number(value, f"{where}: cost of {axis}")
            return cls(
                targets=listed(values["targets"], str, where),
                shapes=tuple(
                    listed(shape, int, where) for shape in listed(values["shapes"], list, where)
                ),
                method=typed(values["method"], str, where),
                args=typed(values["args"], dict, where),
                reason=typed(values["reason"], str, where),
                cost=cost,
                error=None if values["error"] is None else number(values["error"], where),
                factors=Factors(**values["factors"]),
            )
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"{where} is malformed: {error}") from error


@dataclass(frozen=True)
class RankPlan:
    """A complete plan: every layer with a weight is covered by one decision; prints as a table.

    Args:
        model: ``class``, ``structure`` (digest of tensor names and shapes) and
            ``weights`` (digest of values; null if not computed).
        budget: The budget the plan was made for, or None.
        strategy: ``name``, ``settings`` and ``seed``.
        environment: Versions and hardware of the search.
        seconds: Wall-clock seconds of the search.
        decisions: One per site.
        totals: Axis to ``{"before", "predicted", "measured"}`` for the whole
            model; ``measured`` is read off the built model, null if it was not built.
        extensions: Findings of strategies and studies, for reports; `apply` never reads it.

    Example:
        >>> layer = Decision(("fc",), ((10, 64),), "svd", {"ranks": [8]})
        >>> plan = RankPlan(model={"class": "Net"}, decisions=(layer,))
        >>> RankPlan.from_json(plan.to_json()) == plan
        True
    """

    model: Mapping[str, Any]
    decisions: tuple[Decision, ...]
    budget: Budget | None = None
    strategy: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    totals: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    extensions: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for decision in self.decisions:
            for name in decision.targets:
                if name in seen:
                    raise PlanError(f"layer {name}: covered by two decisions; keep one")
                seen.add(name)

    def __repr__(self) -> str:
        strategy = self.strategy.get("name", "by hand")
        bounds = "no budget" if self.budget is None else self.budget.explain()
        return (
            f"<RankPlan of {self.model.get('class', 'a model')}, {strategy}, {bounds}: "
            f"{len(self.changes)} of {len(self)} sites changed>"
        )

    def __str__(self) -> str:
        # Imported late: what draws tables stands above plans.
        from rankopt._plan_tables import plan_table, totals_table
        from rankopt._utils.tables import to_text

        return to_text(plan_table(self), totals_table(self))

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.decisions)

    def __len__(self) -> int:
        return len(self.decisions)

    def __getitem__(self, name: str) -> Decision:
        for decision in self.decisions:
            if name in decision.targets:
                return decision
        known = ", ".join(self.layer_names[:5])
        raise KeyError(f"no decision covers layer {name!r}; the plan has {known}, …")

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Every layer the plan mentions, in model order."""
        return tuple(name for decision in self.decisions for name in decision.targets)

    @property
    def changes(self) -> tuple[Decision, ...]:
        """The decisions that are not ``keep``."""
        return tuple(decision for decision in self.decisions if not decision.keeps)

    def to_dict(self) -> dict[str, Any]:
        """JSON form; the inverse of `from_dict`."""
        return {
            "schema": SCHEMA,
            "model": dict(self.model),
            "budget": None if self.budget is None else self.budget.to_dict(),
            "strategy": dict(self.strategy),
            "environment": dict(self.environment),
            "seconds": self.seconds,
            "totals": {axis: dict(entry) for axis, entry in self.totals.items()},
            "decisions": [decision.to_dict() for decision in self.decisions],
            "extensions": dict(self.extensions),
        }

    def to_json(self) -> str:
        """The plan as readable JSON text."""
        return pretty(self.to_dict()) + "\n"

    @classmethod
    def from_dict(cls, values: Any) -> RankPlan:
        """Read a plan, refusing unknown schemas and keys.

        Raises:
            PlanError: What is wrong and where.
        """
        if not isinstance(values, dict):
            raise PlanError(f"a plan is a JSON object, not {type(values).__name__}")
        if values.get("schema") != SCHEMA:
            raise PlanError(
                f"plan schema {values.get('schema')!r}: this rankopt reads {SCHEMA!r}; "
                "use the rankopt version that wrote the file"
            )
        body = {key: value for key, value in values.items() if key != "schema"}
        check_keys(body, {f.name for f in fields(cls)}, "plan")
        try:
            budget = None if body["budget"] is None else Budget.from_dict(body["budget"])
        except (BudgetError, TypeError) as error:
            raise PlanError(f"plan budget: {error}") from error
        totals = typed(body["totals"], dict, "plan totals")
        for axis, entry in totals.items():
            where = f"plan totals of {axis}"
            check_keys(typed(entry, dict, where), {"before", "predicted", "measured"}, where)
            for value in entry.values():
                if value is not None:
                    number(value, where)
        return cls(
            model=typed(body["model"], dict, "plan model"),
            decisions=tuple(
                Decision.from_dict(entry)
                for entry in typed(body["decisions"], list, "plan decisions")
            ),
            budget=budget,
            strategy=typed(body["strategy"], dict, "plan strategy"),
            environment=typed(body["environment"], dict, "plan environment"),
            seconds=number(body["seconds"], "plan seconds"),
            totals=totals,
            extensions=typed(body["extensions"], dict, "plan extensions"),
        )

    @classmethod
    def from_json(cls, text: str) -> RankPlan:
        """Read the text written by `to_json`.

        Raises:
            PlanError: The text is no JSON (truncated, say), holds NaN or
                Infinity, or is not a plan.
        """
        try:
            values = json.loads(text, parse_constant=refuse_constant)
        except RecursionError as error:
            raise PlanError("not a plan: the JSON is nested too deeply") from error
        except json.JSONDecodeError as error:
            raise PlanError(
                f"not a plan: the text is no valid JSON at line {error.lineno} ({error.msg}); "
                "the file may be truncated"
            ) from error
        return cls.from_dict(values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to `path` atomically."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RankPlan:
        """Read a plan file.

        Raises:
            PlanError: The file is missing, unreadable or not a plan.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise PlanError(f"cannot read plan {path}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise PlanError(f"{path} is not a plan: it is not UTF-8 text") from error
        try:
            return cls.from_json(text)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error

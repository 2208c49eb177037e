"""What a compressed model remembers of how it was made."""

from __future__ import annotations

from typing import Final

from torch import nn

from rankopt._model import measure, surgery
from rankopt.plan import RankPlan

__all__ = ["change_since_built", "plan_of", "remember_plan"]

_PLAN_ATTRIBUTE: Final = "rankopt_plan"
_SHAPES_ATTRIBUTE: Final = "rankopt_shapes"


def plan_of(model: nn.Module) -> RankPlan | None:
    """The plan `model` was built by, if `apply` or `load` built it."""
    plan = getattr(surgery.unwrap(model), _PLAN_ATTRIBUTE, None)
    return plan if isinstance(plan, RankPlan) else None


def remember_plan(model: nn.Module, plan: RankPlan) -> None:
    """Note on the module which plan it was built by, and the shapes of what it then held."""
    model.__dict__[_PLAN_ATTRIBUTE] = plan
    model.__dict__[_SHAPES_ATTRIBUTE] = measure.state_shapes(model)


def change_since_built(model: nn.Module) -> str | None:
    """The first tensor that is not there, or not of the shape, that the plan gave it; or None."""
    now = measure.state_shapes(model)
    then = getattr(surgery.unwrap(model), _SHAPES_ATTRIBUTE, now)
    for name in {**then, **now}:
        found, built = now.get(name), then.get(name)
        if found != built:
            state = "gone" if found is None else "new" if built is None else f"{list(found)}"
            return f"{name} is {state}" + (f", it was {list(built)}" if built else "")
    return None

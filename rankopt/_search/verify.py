"""A plan held to its budget on the built model, and the machine it was made on."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import nn

from rankopt._build.skeletons import fill_skeleton
from rankopt._model import measure, surgery
from rankopt._model.measure import tensors_in
from rankopt._model.probe import Call, Probe
from rankopt._model.sharing import shortened
from rankopt._timing.conditions import tf32
from rankopt._version import __version__
from rankopt.budget import RATIO_AXES, Budget
from rankopt.errors import ModelError, RankoptError
from rankopt.plan import RankPlan
from rankopt.strategy import LATENCY

__all__ = ["environment", "verify"]

# A run with gradients holds every activation: this many samples do. BatchNorm needs two.
SAMPLES: Final = 2


def verify(
    plan: RankPlan,
    view: nn.Module,
    seen: Probe | None,
    inputs: Any,
    *,
    asked: Budget | None = None,
    original: Mapping[str, float] | None = None,
) -> RankPlan:
    """Build the result's skeleton inside `view`, run it, and hold it to the budget.

    Args:
        plan: What a strategy returned.
        view: The model, of which the skeleton takes the kept layers.
        seen: What a run on the inputs showed.
        inputs: Example inputs.
        asked: The user's budget; None for the one the plan names.
        original: Axis to the model's figure; of what is missing the plan's word is taken, and
            of time, which it may have measured anew.
    """
    built = fill_skeleton(view, plan)
    measured: dict[str, float] = {
        "params": measure.count_params(built),
        "memory": measure.count_memory(built),
    }
    if inputs is not None:
        inputs = measure.to_device(inputs, surgery.device_of(view))
        with measure.evaluation(built):
            _run(built, inputs, "in eval mode with gradients")
            if seen is not None:
                measured["macs"] = measure.count_macs(built, inputs)
        if seen is not None and seen.trains:
            built.train()
            _run(built, inputs, "in train mode with gradients")
    timed = plan.totals.get(LATENCY, {}).get("measured")
    if timed is not None:
        measured[LATENCY] = timed
    before = {axis: float(entry["before"] or 0) for axis, entry in plan.totals.items()}
    before |= {axis: value for axis, value in (original or {}).items() if axis != LATENCY}
    budget = asked or plan.budget
    bounded = {axis for axis in budget.axes if axis in RATIO_AXES} if budget else set()
    if unknown := bounded - (measured.keys() & before.keys()):
        raise RankoptError(
            f"strategy {_name(plan)!r} returned a plan without totals of "
            f"{', '.join(sorted(unknown))}, which the budget bounds; make it with problem.plan()"
        )
    if budget is not None and not budget.fits(measured, before):
        raise RankoptError(
            f"strategy {_name(plan)!r} returned a plan that breaks its budget "
            f"({budget.explain()}): measured {measured} of {before}; the model's MACs depend "
            "on its data, or this is a defect of the strategy or of rankopt"
        )
    totals = {
        axis: {**entry, "measured": measured.get(axis)} for axis, entry in plan.totals.items()
    }
    return replace(plan, totals=totals, budget=budget)


def _name(plan: RankPlan) -> str:
    return str(plan.strategy.get("name", "by hand"))


def _run(model: nn.Module, inputs: Any, how: str) -> None:
    """Run with gradients on a few samples; on all of them if the model insists on its batch."""
    failure: Exception | None = None
    batched = any(tensor.dim() for tensor in tensors_in(inputs))
    for tried in (*(shortened([inputs], SAMPLES) if batched else ()), inputs):
        try:
            with torch.enable_grad():
                measure.call(model, tried)
        except Exception as error:
            failure = error
        else:
            return
    raise ModelError(
        f"the compressed {type(model).__name__} fails {how}: {type(failure).__name__}: {failure}; "
        "keep the layers involved with ignore= and report this"
    ) from failure


def environment(model: nn.Module, inputs: Any = None) -> dict[str, Any]:
    """Versions, hardware and numeric settings that figures depend on."""
    device = surgery.device_of(model)
    facts: dict[str, Any] = {
        "rankopt": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "dtype": str(next((p.dtype for p in model.parameters()), None)).removeprefix("torch."),
    }
    for first in list(tensors_in(inputs))[:1]:
        facts |= {"input": list(first.shape), "memory_format": Call.of(first).memory_format}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["tf32"] = tf32()[0]
    else:
        facts["isa"] = torch.backends.cpu.get_cpu_capability()
    return facts

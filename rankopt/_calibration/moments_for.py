"""What data-aware factors are made of: moments of the layers a plan changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from rankopt._calibration.collect import collect
from rankopt._calibration.fisher import output_roots
from rankopt._calibration.moments import Moments, pool
from rankopt._model.inputs import digest
from rankopt._model.layers import Layer, find_layers
from rankopt.errors import warn
from rankopt.plan import MERGE, RankPlan

__all__ = ["collect_for", "moments_for", "weigh"]


def moments_for(
    view: nn.Module, plan: RankPlan, held: list[Any], progress: bool | None
) -> dict[str, Moments]:
    """Moments of the layers whose factors are data-aware."""
    aware = [d for d in plan.changes if d.factors.kind != "weights"]
    if not aware:
        return {}
    found = digest(held)
    if any(decision.factors.digest != found for decision in aware):
        warn(
            "the calibration inputs are not those the plan was made with: ranks are applied, the "
            "errors it states do not hold"
        )
    layers = {name: layer for layer in find_layers(view) for name in layer.names}
    aware = [d for d in aware if d.method != MERGE and not d.factors.asymmetric]
    groups = [[layers[name] for name in d.targets if name in layers] for d in aware]
    weighing = [group for d, group in zip(aware, groups, strict=True) if d.factors.fisher]
    moments = collect_for(view, groups, held, progress=progress)
    return weigh(view, moments, weighing, held, progress=progress)


def collect_for(
    view: nn.Module,
    groups: Sequence[Sequence[Layer]],
    held: Any,
    *,
    progress: bool | None = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Moments]:
    """Moments for sites, under the name of each site's first layer, pooled over the site."""
    layers = [layer for group in groups for layer in group]
    found = collect(view, layers, held, max_samples=None, progress=progress, check=check)
    pooled = {}
    for group in groups:
        parts = [found[layer.name] for layer in group if layer.name in found]
        if parts:
            pooled[group[0].name] = pool(parts)
    return pooled


def weigh(
    view: nn.Module,
    moments: Mapping[str, Moments],
    groups: Sequence[Sequence[Layer]],
    held: Sequence[Any],
    *,
    progress: bool | None = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Moments]:
    """The moments of all sites, those of `groups` with their outputs weighed."""
    found = dict(moments)
    for name, root in output_roots(view, groups, held, progress=progress, check=check):
        if name in found:
            found[name] = found[name].weighing(root)
    return found

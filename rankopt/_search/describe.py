"""A model described for strategies: its layers, what keeps some dense, and the sites to decide."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import torch
from torch import Tensor, nn

from rankopt._build.apply import unpacked_clone
from rankopt._decompositions.base import Decomposition
from rankopt._model import measure, surgery
from rankopt._model.inputs import run
from rankopt._model.layers import (
    Layer,
    canonical_weight,
    check_materialised,
    check_weight,
    find_layers,
    refused_unseen,
)
from rankopt._model.patterns import Patterns, select
from rankopt._model.probe import Probe, probe, static_reads
from rankopt._model.sharing import shortened
from rankopt.budget import Budget
from rankopt.errors import ModelError
from rankopt.registry import decompositions
from rankopt.strategy import Problem, Site
from rankopt.strategy.settings import Settings

__all__ = ["as_text", "describe", "problem_of", "refused", "selected"]

# Samples of calibration inputs that show how layers are used; BatchNorm in training needs two.
SHOWN: Final = 2


def describe(
    source: nn.Module, example_inputs: Any, *, runs: bool, held: Sequence[Any] = ()
) -> tuple[nn.Module, list[Layer], Probe | None]:
    """An unpacked clone, its layers, and what a run on the inputs showed.

    Without inputs the source of the classes is read; the calibration batches `held`, if there
    are any, then show how layers are used, but stand for no size that MACs could be counted at.
    """
    check_materialised(source)
    if example_inputs is not None:
        view, layers, seen = _probed(source, example_inputs)
        return view, seen.annotate(layers), seen
    for shown in (*shortened(held, SHOWN)[:1], *held[:1]):
        with suppress(ModelError):  # some insist on their batch; reading them reports the others
            view, layers, seen = _probed(source, shown)
            reads = static_reads(view) | _unreached(view, layers, seen, held) | seen.reads
            return view, refused(layers, reads), None
    view = unpacked_clone(source, runs=runs)
    layers = refused_unseen(view, find_layers(view))
    return view, refused(layers, static_reads(view)), None


def _probed(source: nn.Module, inputs: Any) -> tuple[nn.Module, list[Layer], Probe]:
    view = unpacked_clone(source, runs=True)
    layers = find_layers(view)
    seen = probe(view, layers, inputs)
    if seen.crossed:
        # Cross-attention: one packed projection would be run for each input.
        view = unpacked_clone(source, split=seen.crossed, runs=True)
        layers = find_layers(view)
        seen = probe(view, layers, inputs)
    surgery.share_unchanged(view, source)
    return view, layers, seen


def _unreached(
    view: nn.Module, layers: Sequence[Layer], seen: Probe, held: Sequence[Any]
) -> dict[str, str]:
    """Layer name to reason, for those that no calibration batch calls; reads on until all are."""
    modules = dict(surgery.named_modules(view))
    names = [layer.name for layer in layers if layer.refusal is None]
    waiting = {name: modules[name] for name in names if name not in seen.positions}
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: waiting.pop(name, None) and None)
        for name, module in waiting.items()
    ]
    try:
        with torch.no_grad(), measure.preserve_rng(), measure.evaluation(view):
            for inputs in held:
                if waiting:
                    run(view, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return dict.fromkeys(waiting, "calibration inputs never reach it")


def refused(layers: Iterable[Layer], reads: Mapping[str, str]) -> list[Layer]:
    """The layers, those that are read from outside under any of their names refused."""
    found = []
    for layer in layers:
        reasons = [reads[name] for name in layer.names if name in reads]
        found.append(layer.refused(reasons[0]) if reasons else layer)
    return found


def selected(layers: list[Layer], only: Patterns, ignore: Patterns) -> list[Layer]:
    """The user's globs, then narrowness, then ties with kept layers."""
    chosen = []
    for layer in select(layers, only, ignore):
        narrow = None if layer.refusal else layer.too_narrow
        chosen.append(layer.refused(narrow) if narrow else layer)
    kept = {layer.name for layer in chosen if layer.refusal}
    return [
        layer.refused(f"its weight is tied to {shared}, which is kept")
        if (shared := next((name for name in layer.tied_to if name in kept), None))
        else layer
        for layer in chosen
    ]


def problem_of(
    view: nn.Module,
    layers: list[Layer],
    seen: Probe | None,
    budget: Budget | None,
    methods: str | Decomposition | Sequence[str | Decomposition],
    settings: Settings,
) -> Problem:
    if isinstance(methods, str) or not isinstance(methods, Iterable):
        methods = [methods]
    methods = list(methods)
    available = [decompositions.create(method) for method in methods]
    modules = dict(surgery.named_modules(view))

    def weight(layer: Layer) -> Tensor:
        return canonical_weight(modules[layer.name])

    layers, sites = _sites(
        [_with_values(layer, weight) for layer in layers], available, probed=seen is not None
    )
    if not sites:
        reasons = "; ".join(f"{x.name or 'root'}: {x.refusal}" for x in layers[:5])
        raise ModelError(
            f"{type(view).__name__} has no layer to decompose"
            + (f" ({reasons}{'; …' if len(layers) > 5 else ''})" if layers else " (no weights)")
        )
    totals = {"params": measure.count_params(view), "memory": measure.count_memory(view)}
    if seen is not None:
        totals["macs"] = seen.macs
    return Problem(
        layers=tuple(layers), sites=tuple(sites), budget=budget, totals=totals, weight=weight,
        methods=tuple(as_text(methods)), **vars(settings),
    )  # fmt: skip


def as_text(values: Iterable[Any]) -> list[str]:
    """Names and globs; functions and instances only as a remark."""
    return [one if isinstance(one, str) else f"<{one!r}>" for one in values]


def _with_values(layer: Layer, weight: Callable[[Layer], Tensor]) -> Layer:
    """Refuse layers without any signal; `LayerError` for NaN and infinity."""
    if layer.refusal is not None:
        return layer
    values = weight(layer)
    check_weight(layer, values)
    return layer if bool(values.any()) else layer.refused("its weight is all zero")


def _sites(
    layers: list[Layer], available: Sequence[Decomposition], *, probed: bool
) -> tuple[list[Layer], list[Site]]:
    by_name = {layer.name: layer for layer in layers}
    listed: list[Layer] = []
    sites: list[Site] = []
    placed: set[str] = set()
    for layer in layers:
        methods = tuple(method for method in available if method.applies(layer))
        if layer.refusal is None and not methods:
            reasons = "; ".join(str(method.refusal(layer)) for method in available)
            layer = layer.refused(reasons or "no decomposition was allowed")
        listed.append(layer)
        if layer.refusal is not None or layer.name in placed:
            continue
        group = (layer, *(by_name[name] for name in layer.tied_to))
        placed.update(member.name for member in group)
        cost = {"params": layer.params, "memory": layer.params * layer.itemsize}
        if probed:
            cost["macs"] = sum(member.macs or 0 for member in group)
        sites.append(Site(group, methods, cost))
    return listed, sites

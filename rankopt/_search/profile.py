"""profile(): the time of one layer's chains against their ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index
from typing import Any, Final

import torch
from torch import nn

from rankopt._decompositions.base import Decomposition, RankAxis
from rankopt._model import measure, surgery
from rankopt._model.layers import Layer
from rankopt._search.describe import describe
from rankopt._timing.candidates import cliffs, grid_values, line
from rankopt._timing.layer_profile import LayerProfile, ProfileRow
from rankopt._timing.layer_time import Chain, LayerTime
from rankopt._timing.profile_table import ProfileTable, check_table
from rankopt.errors import LayerError, ModelError
from rankopt.registry import decompositions
from rankopt.strategy import Site, Strategy
from rankopt.strategy.site_times import SiteTimes

__all__ = ["profile"]

# Evenly spaced ranks that are timed before the neighbours of cliffs.
GRID: Final = 32
MAX_CLIFFS: Final = 4


def profile(
    model: nn.Module,
    layer: str,
    *,
    example_inputs: Any,
    method: str | Decomposition | None = None,
    ranks: Sequence[int | Sequence[int]] | None = None,
    table: ProfileTable | None = None,
) -> LayerProfile:
    """Time one layer, dense and decomposed, on its real input.

    The model runs once to see that input; then the layer alone is timed, in random-order
    rounds, and every time is remembered (see `ProfileTable`).

    Args:
        model: Not changed.
        layer: Full module name.
        example_inputs: A tensor, a tuple or a mapping to call the model with.
        method: A decomposition; None for the first of svd, tucker2 and spatial_svd that applies.
        ranks: What to time, numbers or one sequence per choice. A number stands for all ranks
            in the proportion of their maxima. None for about 32 aligned ones and the
            neighbours of cliffs.
        table: Where times are kept; None for inference times in the user's cache.

    Raises:
        ModelError: No such layer, or the model fails on the inputs.
        LayerError: The layer cannot be decomposed, or a rank is infeasible.
        ValueError: `ranks` are no whole numbers, or `table` is no table.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64))
        >>> table = rankopt.ProfileTable(":memory:", rounds=3)
        >>> found = rankopt.profile(
        ...     model, "0", example_inputs=torch.zeros(8, 64), ranks=[8, 16], table=table
        ... )
        >>> [row.ranks for row in found.rows]
        [(8,), (16,)]
    """
    table = check_table(table, "table")
    wanted = None if ranks is None else _checked(ranks)
    measure.check_inputs(example_inputs)
    source = surgery.unwrap(model)
    with torch.no_grad(), measure.preserve_rng():
        _, layers, seen = describe(source, example_inputs, runs=True)
    assert seen is not None
    found = _named(layers, layer)
    chosen = _method(found, method)
    axes = chosen.rank_axes(found)
    maxima = tuple(axis.maximum for axis in axes)
    assert found.macs  # layers without work are refused
    dense_macs = float(found.macs)

    def work(ranks: Sequence[int]) -> float:
        return float(chosen.macs(found, ranks)) / dense_macs

    site = Site((found,), (chosen,), {"macs": dense_macs})
    times = SiteTimes(table, seen.calls, device=surgery.device_of(source))
    before = table.calls

    def run(points: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], LayerTime]:
        timed = times.time(site, [Chain(), *(Chain(chosen, each) for each in points)])
        return {chain.ranks: time for chain, time in timed.items()}

    if wanted is None:
        step = max(axis.step for axis in axes)
        points = [line(maxima, int(rank)) for rank in grid_values(max(maxima), GRID, step)]
        measured = run(_feasible(points, axes))
        near = _feasible(_beside_cliffs(measured, maxima, work), axes)
        measured |= run([each for each in near if each not in measured])
    elif isinstance(ranks, str) or not isinstance(ranks, Iterable):
        raise ValueError(f"ranks={ranks!r}: expected several, such as [8, 16, 32]")
    else:
        measured = run([_expanded(chosen, found, axes, rank) for rank in wanted])
    dense = measured.pop(())
    rows = tuple(
        ProfileRow(each, work(each), time.latency_ms, time.ratio)
        for each, time in sorted(measured.items())
    )
    if not rows:
        reasons = "; ".join(sorted(set(table.skipped.values())))
        raise LayerError(f"layer {layer}: no chain of {chosen.name} could be run: {reasons}")
    return LayerProfile(
        layer=found.name,
        shape=found.shape,
        method=chosen.name,
        dense_ms=dense.latency_ms,
        rows=rows,
        cliffs=tuple(_found_cliffs(measured, work)),
        conditions=table.conditions(times.device, seen.calls[found.name][0]),
        runs=table.calls - before,
    )


def _checked(ranks: Any) -> list[int | tuple[int, ...]]:
    """The ranks that a caller wants, as whole numbers of Python's own."""
    if not isinstance(ranks, Iterable) or isinstance(ranks, str):
        raise ValueError(f"ranks={ranks!r}: expected a sequence, such as [8, 16] or [(8, 4)]")
    found: list[int | tuple[int, ...]] = []
    for rank in ranks:
        several = isinstance(rank, Iterable) and not isinstance(rank, str)
        try:
            found.append(tuple(map(index, rank)) if several else index(rank))
        except TypeError as error:
            raise ValueError(
                f"ranks: {rank!r} is no rank; expected whole numbers, such as 8, or one for each "
                "axis, such as (8, 4)"
            ) from error
    if not found:
        raise ValueError("ranks: expected at least one; None times about 32 of them")
    return found


def _named(layers: Sequence[Layer], name: str) -> Layer:
    found = next((layer for layer in layers if name in layer.names), None)
    if found is None:
        known = ", ".join(layer.name for layer in layers[:6])
        raise ModelError(f"no layer {name!r} with a weight; the layers are {known}, …")
    if found.refusal is not None:
        raise LayerError(f"layer {name}: it cannot be decomposed: {found.refusal}")
    return found


def _method(layer: Layer, wanted: str | Decomposition | None) -> Decomposition:
    names = Strategy.methods if wanted is None else (wanted,)
    methods = [decompositions.create(name) for name in names]
    chosen = next((method for method in methods if method.applies(layer)), None)
    if chosen is None:
        reasons = "; ".join(str(method.refusal(layer)) for method in methods)
        raise LayerError(f"layer {layer.name}: {reasons}")
    return chosen


def _feasible(points: Sequence[tuple[int, ...]], axes: Sequence[RankAxis]) -> list[tuple[int, ...]]:
    """Points moved down to multiples of their axes' steps, each once."""
    moved = [
        tuple(max(a.step, r - r % a.step) for r, a in zip(point, axes, strict=True))
        for point in points
    ]
    return list(dict.fromkeys(moved))


def _expanded(
    method: Decomposition, layer: Layer, axes: Sequence[RankAxis], rank: int | Sequence[int]
) -> tuple[int, ...]:
    if isinstance(rank, int):
        maxima = tuple(axis.maximum for axis in axes)
        method.check_ranks(layer, [rank if a.maximum == max(maxima) else a.step for a in axes])
        return _feasible([line(maxima, rank)], axes)[0]
    method.check_ranks(layer, rank)
    return tuple(rank)


def _found_cliffs(
    measured: dict[tuple[int, ...], LayerTime], work: Any
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    order = sorted((ranks for ranks in measured if ranks), key=work)
    medians = [measured[ranks].ratio.median for ranks in order]
    pairs = cliffs(range(len(order)), medians, [work(ranks) for ranks in order])
    return [(order[fast], order[slow]) for fast, slow in pairs[:MAX_CLIFFS]]


def _beside_cliffs(
    measured: dict[tuple[int, ...], LayerTime], maxima: tuple[int, ...], work: Any
) -> list[tuple[int, ...]]:
    near = set()
    for fast, slow in _found_cliffs(measured, work):
        firsts = {max(fast) + 1, max(slow) - 1} - {max(fast), max(slow)}
        near |= {line(maxima, first) for first in firsts if first <= max(maxima)}
    return sorted(near - set(measured))

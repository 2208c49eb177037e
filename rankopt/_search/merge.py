"""merge() and merge_plan(): bottlenecks made narrower, uniformly or under a budget."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

import torch
from torch import nn

from rankopt._build.apply import apply, unpacked_clone
from rankopt._merging.bottlenecks import Bottleneck, find_bottlenecks
from rankopt._merging.join import BETWEEN
from rankopt._model import measure, surgery
from rankopt._model.inputs import MAX_SAMPLES, hold
from rankopt._model.layers import Layer, check_materialised, find_layers
from rankopt._model.patterns import Patterns, select
from rankopt._model.probe import Probe, probe, static_reads
from rankopt._search.describe import refused
from rankopt._search.merge_widths import Choice, Widths
from rankopt._search.verify import environment, verify
from rankopt.budget import Budget, check_inputs
from rankopt.errors import BudgetError, ModelError
from rankopt.plan import KEEP, MERGE, Decision, RankPlan
from rankopt.strategy.rank_choices import check_round_to

__all__ = ["merge", "merge_plan"]

RATIO: Final = 0.5


def merge(
    model: nn.Module,
    budget: str | Budget | None = None,
    *,
    ratio: float | None = None,
    example_inputs: Any = None,
    calibration: Any = None,
    calibration_samples: int | None = MAX_SAMPLES,
    between: Literal["keep", "drop"] = "keep",
    only: Patterns = (),
    ignore: Patterns = (),
    round_to: int = 1,
    progress: bool | None = None,
) -> nn.Module:
    """A new model whose bottlenecks are narrower: `merge_plan`, then `rankopt.apply`.

    Arguments and errors are those of `merge_plan`.

    Returns:
        A model of the same classes, with the same names in its state dict.

    Example:
        >>> convs = [nn.Conv2d(32, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 32, 1)]
        >>> rankopt.merge(nn.Sequential(*convs))[2]
        Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1))
    """
    if calibration is not None:  # read once: it may be a generator, or shuffle
        with measure.preserve_rng():
            calibration = hold(model, calibration, max_samples=calibration_samples)
    plan = merge_plan(
        model, budget, ratio=ratio, example_inputs=example_inputs, calibration=calibration,
        calibration_samples=None, between=between, only=only, ignore=ignore, round_to=round_to,
        progress=progress,
    )  # fmt: skip
    return apply(model, plan, calibration=calibration, calibration_samples=None, progress=progress)


@measure.outside_inference_mode
def merge_plan(
    model: nn.Module,
    budget: str | Budget | None = None,
    *,
    ratio: float | None = None,
    example_inputs: Any = None,
    calibration: Any = None,
    calibration_samples: int | None = MAX_SAMPLES,
    between: Literal["keep", "drop"] = "keep",
    only: Patterns = (),
    ignore: Patterns = (),
    round_to: int = 1,
    progress: bool | None = None,
) -> RankPlan:
    """Decide how narrow each bottleneck of a model becomes.

    A bottleneck is a k×k convolution between two 1x1 ones, with a BatchNorm and an
    activation, or one of them, or nothing, in between (ResNet, ResNeXt, inverted
    residuals with a full convolution in the middle). Tucker-2 of the middle is
    merged into its neighbours, so that three convolutions of less width remain; the
    norms are put back at that width. Other layers are kept.

    With a budget the widths minimise the total damage: the share of the energy that
    the second and third convolution of a block lose, times how far the model's
    outputs move when that block alone is halved (the square root of it; all blocks
    count alike without `calibration`).

    Args:
        model: A trained model; not changed.
        budget: On params, macs or memory of the whole model; None for `ratio`.
        ratio: Width after / before, of every bottleneck, above 0 and at most 1; 0.5
            if there is no budget.
        example_inputs: What to call the model with; needed for MACs.
        calibration: Inputs as for `rankopt.search`. The maps are then fitted to
            what the dense model computes for them, and `apply` needs the same inputs.
        calibration_samples: Where to stop reading; None reads to the end.
        between: ``keep`` puts the norms back at the new width and leaves the activations
            where they are. ``drop`` folds the norms and drops the activations: three
            linear maps, each with a bias, fitted to the dense model's activations (so
            it needs `calibration`). Much is lost where activations matter. Activation
            modules become `nn.Identity`; where one is shared or a function is called,
            the block becomes a `torch.fx.GraphModule` of the same name and state dict, which has
            no methods but forward.
        only: Case-sensitive globs or functions of a `Layer`, met by all three
            convolutions; the other bottlenecks are kept.
        ignore: The same; a bottleneck one of whose convolutions matches is kept.
        round_to: Widths are multiples of this where there are that many channels.
        progress: Whether to show progress bars; None decides by the terminal.

    Returns:
        A plan with a decision ``merge`` for each bottleneck; ``args`` holds the
        ``ranks`` (width before and after the middle), the ``norms`` and what lies ``between``.

    Raises:
        ModelError: There is no bottleneck to merge; says why not.
        BudgetError: The budget cannot be read, or needs inputs not given.
        BudgetInfeasible: It cannot be met; says what can.
        LayerError: A weight holds NaN or infinity.
        CalibrationError: `calibration` is empty, or the model fails on it.

    References:
        arXiv 2407.20266, section 2.3, for the uniform r = p/2.

    Example:
        >>> convs = [nn.Conv2d(32, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 32, 1)]
        >>> plan = rankopt.merge_plan(nn.Sequential(*convs), "params<=60%")
        >>> plan["2"].method, plan["2"].targets
        ('merge', ('0', '2', '3'))
    """
    started = time.perf_counter()
    allowed = _checked(budget, ratio, round_to, example_inputs)
    if between not in BETWEEN:
        raise ValueError(f"between={between!r}: expected one of {', '.join(BETWEEN)}")
    if between == "drop" and calibration is None:
        raise ModelError(
            "between='drop' needs calibration=: linear maps in place of norms and activations "
            "are fitted to what the dense model computes"
        )
    source = surgery.unwrap(model)
    meta = surgery.device_of(source).type == "meta"
    check_materialised(source, meta=allowed is None and calibration is None)
    with torch.no_grad(), measure.preserve_rng():
        runs = example_inputs is not None or calibration is not None
        view = unpacked_clone(source, runs=runs)
        layers, seen = find_layers(view), None
        if example_inputs is not None:
            seen = probe(view, layers, example_inputs)
            layers = seen.annotate(layers)
        reads = static_reads(view)
        if seen is None:
            layers = refused(layers, reads)
        layers = select(layers, only, ignore)
        blocks = _bottlenecks(view, layers, seen, reads)
        _check_found(view, blocks)
        free = [block for block in blocks if block.refusal is None]
        work = Widths(view, free, seen, round_to, between, progress)
        if calibration is not None:
            work.calibrate(calibration, calibration_samples)
        if allowed is None:
            chosen = work.uniform(RATIO if ratio is None else ratio)
        else:
            chosen = work.within(allowed)
        plan = RankPlan(
            model={
                "class": type(source).__name__,
                "structure": measure.structure_digest(source),
                "weights": None if meta else measure.weights_digest(source),
            },
            decisions=tuple(_decisions(layers, blocks, chosen, between)),
            budget=allowed,
            strategy={
                "name": MERGE,
                "settings": {"ratio": ratio, "round_to": round_to, "between": between},
                "seed": 0,
            },
            totals=work.totals(chosen),
        )
        shown = [example_inputs] if work.held is None else work.held
        plan = verify(plan, view, seen, shown[0] if example_inputs is None else example_inputs)
        return replace(
            plan,
            environment=environment(source),
            seconds=round(time.perf_counter() - started, 3),
        )


def _checked(
    budget: str | Budget | None, ratio: float | None, round_to: int, inputs: Any
) -> Budget | None:
    check_round_to(round_to)
    allowed = Budget.parse(budget)
    if ratio is not None:
        if allowed is not None:
            raise ValueError(f"budget and ratio={ratio!r}: give one of them")
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
            raise ValueError(f"ratio={ratio!r}: expected a share above 0 and at most 1")
    for axis in () if allowed is None else allowed.axes:
        if axis not in ("params", "macs", "memory"):
            raise BudgetError(f"merging takes budgets on params, macs and memory, not on {axis}")
    check_inputs(() if allowed is None else allowed.axes, inputs)
    return allowed


def _bottlenecks(
    view: nn.Module, layers: Sequence[Layer], seen: Probe | None, reads: Mapping[str, str]
) -> list[Bottleneck]:
    """The bottlenecks of `view`, with what is known of their layers, and what reads their norms."""
    known = {name: layer for layer in layers for name in layer.names}
    found = []
    for bottleneck in find_bottlenecks(view):
        first, middle, last = (known[name] for name in bottleneck.targets)
        reasons = [f"{x.name}: {x.refusal}" for x in (first, middle, last) if x.refusal]
        reasons += [f"{norm}: {reads[norm]}" for norm in bottleneck.norms if norm and norm in reads]
        calls = [] if seen is None else [len(seen.calls.get(n, ())) for n in bottleneck.targets]
        if len(set(calls)) > 1:
            times = ", ".join(map(str, calls))
            reasons.append(f"its convolutions are called {times} times, so outside of it too")
        reason = next(iter((*filter(None, [bottleneck.refusal]), *reasons)), None)
        found.append(replace(bottleneck, layers=(first, middle, last), refusal=reason))
    return found


def _check_found(view: nn.Module, blocks: Sequence[Bottleneck]) -> None:
    if any(block.refusal is None for block in blocks):
        return
    reasons = "; ".join(f"{block.name}: {block.refusal}" for block in blocks[:5])
    raise ModelError(
        f"{type(view).__name__} has no bottleneck to merge: "
        + (reasons or "no k×k convolution lies between two 1x1 ones that torch.fx can see")
        + ("; …" if len(blocks) > 5 else "")
    )


def _decisions(
    layers: Sequence[Layer],
    blocks: Sequence[Bottleneck],
    chosen: Sequence[Choice],
    between: str,
) -> list[Decision]:
    """One decision per bottleneck, where its first layer stands, and one per other layer."""
    free = [block for block in blocks if block.refusal is None]
    merged = {
        name: (block, choice)
        for block, choice in zip(free, chosen, strict=True)
        if choice.ranks is not None
        for name in block.targets
    }
    whole = {block.name: f"keep: {c.reason}" for block, c in zip(free, chosen, strict=True)}
    reasons = {block.name: f"keep: {block.refusal}" for block in blocks if block.refusal} | whole
    decisions = []
    for layer in layers:
        if layer.name not in merged:
            reason = reasons.get(layer.name) or f"keep: {layer.refusal or 'in no bottleneck'}"
            decisions.append(
                Decision((layer.name,), (layer.shape,), KEEP, reason=reason, error=0.0)
            )
            continue
        block, choice = merged[layer.name]
        if layer.name != block.targets[0]:
            continue
        assert choice.ranks is not None
        decisions.append(
            Decision(
                targets=block.targets,
                shapes=tuple(part.shape for part in block.layers),
                method=MERGE,
                args={
                    "ranks": list(choice.ranks),
                    "norms": list(block.norms),
                    "between": between,
                },
                reason=choice.reason,
                cost=choice.cost,
                error=choice.error,
                factors=choice.factors,
            )
        )
    return decisions

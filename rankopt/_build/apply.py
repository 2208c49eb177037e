"""Plan to model: check every decision, build the chains, put them in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from rankopt._build.asymmetric import fitted_in_order
from rankopt._build.chains import Step, build_chains, check_arguments, factoriser, steps_of
from rankopt._build.provenance import remember_plan
from rankopt._build.settle import settle_norms
from rankopt._calibration.batchnorm import copy_statistics, has_norms
from rankopt._calibration.fisher import output_roots
from rankopt._calibration.moments import Moments
from rankopt._calibration.moments_for import moments_for
from rankopt._merging import fit as merge_fit
from rankopt._merging import join as merging
from rankopt._merging import linear as merge_linear
from rankopt._merging.join import Merge
from rankopt._model import measure, surgery
from rankopt._model.inputs import MAX_SAMPLES, hold, run
from rankopt._model.layers import (
    check_materialised,
    find_layers,
)
from rankopt._model.unpack import unpack
from rankopt._utils.memory import give_back
from rankopt.errors import PlanError, warn
from rankopt.plan import RankPlan

__all__ = [
    "apply",
    "apply_",
    "check_structure",
    "placed",
    "settle_norms",
    "swap",
    "unpack_for",
    "unpacked_clone",
]


@measure.outside_inference_mode
def apply(
    model: nn.Module,
    plan: RankPlan,
    *,
    calibration: Any = None,
    calibration_samples: int | None = MAX_SAMPLES,
    progress: bool | None = None,
) -> nn.Module:
    """A new model with every decision of `plan` carried out.

    Dtype, device, memory format, mode, requires_grad and the names of kept
    parameters survive; dense weights that are replaced are never copied.

    Args:
        model: The model the plan was made for; not changed.
        plan: From `rankopt.search` or `RankPlan.load`.
        calibration: The inputs the plan was made with, for data-aware factors; also
            refreshes BatchNorm statistics (see `rankopt.recalibrate`).
        calibration_samples: As given to `search`.
        progress: Whether to show a progress bar; None decides by the terminal.

    Returns:
        The compressed model, unwrapped from torch.compile and DataParallel.

    Raises:
        PlanError: The plan does not fit the model, or needs `calibration`; the message
            names the layer, what was expected and what was found.
        ModelError: `model` is no module, or holds what cannot be copied.
        LayerError: A weight holds NaN or infinity.
        CalibrationError: `calibration` is empty or no iterable of inputs, the model fails on
            it, or what its layers take in is not finite.
        ValueError: `calibration_samples` is below 1.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> plan = rankopt.search(model, "params<=50%")
        >>> rankopt.compare(model, rankopt.apply(model, plan)).params.ratio < 0.5
        True
    """
    check_arguments(model, plan)
    _check_sources(plan, calibration)
    source = surgery.unwrap(model)
    held = _held(source, calibration, calibration_samples)
    view, chains, merges = _computed_chains(source, plan, held, progress)
    result = placed(view, chains, merges)
    theirs = set(source.parameters())
    made = [t for t in (*result.parameters(), *result.buffers()) if t not in theirs]
    result = surgery.clone(result, share=made)  # with its own copies of the kept parameters
    if held is not None:
        settle_norms(result, source, held)
    remember_plan(result, plan)
    return result


@measure.outside_inference_mode
def apply_(
    model: nn.Module,
    plan: RankPlan,
    *,
    calibration: Any = None,
    calibration_samples: int | None = MAX_SAMPLES,
    progress: bool | None = None,
) -> nn.Module:
    """Carry out `plan` inside `model` and return it; see `apply`.

    All chains and BatchNorm statistics are computed before the first module is replaced,
    so a failure or an interruption leaves the model as it was.

    Raises:
        PlanError: As `apply`; also if the root module itself would be
            replaced, which cannot happen in place.
    """
    check_arguments(model, plan)
    _check_sources(plan, calibration)
    source = surgery.unwrap(model)
    held = _held(source, calibration, calibration_samples)
    view, chains, merges = _computed_chains(source, plan, held, progress)
    trial = surgery.clone(view, share=[*view.parameters(), *view.buffers()])
    rewritten = placed(trial, {}, merges) is not trial
    if "" in chains or rewritten or (chains and type(view) is not type(source)):
        raise PlanError(
            f"the plan replaces the root module {type(source).__name__} itself; "
            "use rankopt.apply, which returns a new model"
        )
    settled = None
    if held is not None and has_norms(view):
        settled = surgery.clone(placed(view, chains, merges))
        settle_norms(settled, source, held)
    placed(unpack_for(source, plan), chains, merges)
    if settled is not None:
        copy_statistics(settled, source)
    remember_plan(source, plan)
    return model


def _held(model: nn.Module, calibration: Any, samples: int | None) -> list[Any] | None:
    """Calibration batches kept for several passes, so that a generator will do."""
    if calibration is None:
        return None
    with measure.preserve_rng():  # a shuffling DataLoader draws from the global generator
        return hold(model, calibration, max_samples=samples)


def _computed_chains(
    source: nn.Module,
    plan: RankPlan,
    held: list[Any] | None,
    progress: bool | None,
) -> tuple[nn.Module, dict[str, nn.Module], list[Merge]]:
    """The unpacked view, finished modules for all that the plan changes, and its merges."""
    view = _unpacked_view(source, plan)
    steps = _checked_steps(view, source, plan)
    merges = merging.planned(view, plan)
    moments: dict[str, Moments] = {}
    watched = view
    if held is not None:
        give_back()
        watched = surgery.clone(view)
        with torch.no_grad(), measure.preserve_rng(), measure.evaluation(watched):
            run(watched, held[0])
        surgery.share_unchanged(watched, view)
        moments = moments_for(watched, plan, held, progress)
    ordered = [step for step in steps if step.decision.factors.asymmetric]
    others = [step for step in steps if step not in ordered]
    if not ordered and not merges:
        watched = view  # the clone is not run again: let go of it
    chains = build_chains(view, others, factoriser(moments), progress)
    if ordered:
        assert held is not None
        student = swap(surgery.clone(watched, share=watched.parameters()), chains)
        with torch.no_grad():
            weighing = [step.layers for step in ordered if step.decision.factors.fisher]
            roots = dict(output_roots(watched, weighing, held, progress=progress))
            chains |= fitted_in_order(watched, student, ordered, held, roots, progress=progress)
    with torch.no_grad():
        chains.update(merge_fit.fit(watched, merges, held, progress=progress))
    return view, chains, merges


def unpacked_clone(model: nn.Module, split: Iterable[str] = (), *, runs: bool = False) -> nn.Module:
    """A clone with every parent unpacked and its own buffers.

    Args:
        model: The model to clone.
        split: Attention modules whose packed projection becomes three.
        runs: Whether the clone will be run. It then has its own parameters too, for
            a forward may write into them (renormed embeddings, merged adapters).
    """
    share = () if runs else tuple(model.parameters())
    return unpack(surgery.clone(model, share=share), split=split)


def _check_sources(plan: RankPlan, calibration: Any) -> None:
    for decision in plan.changes:
        kind, name = decision.factors.kind, decision.targets[0]
        if kind == "learned":
            raise PlanError(
                f"layer {name}: its factors are learned, so they cannot be made from the weights; "
                "a soft model carries out its own plan (build), and the file that a model was "
                "saved to has its factors: rankopt.load(model, file)"
            )
        if kind != "weights" and calibration is None:
            raise PlanError(
                f"layer {name}: its factors are {kind!r}: pass the calibration inputs the plan was "
                "made with, apply(..., calibration=...); they are never replaced by factors from "
                "weights alone"
            )


def _split(plan: RankPlan) -> set[str]:
    """Attention modules whose packed projection the plan treats as three."""
    parts = (name.rpartition(".") for name in plan.layer_names)
    return {parent for parent, _, leaf in parts if leaf in ("q_proj", "k_proj", "v_proj")}


def unpack_for(model: nn.Module, plan: RankPlan, *, whole: bool = False) -> nn.Module:
    if whole:
        return unpack(model, split=_split(plan))
    targets = [name for decision in plan.changes for name in decision.targets]
    return unpack(model, only=targets, split=_split(plan)) if targets else model


def _unpacked_view(source: nn.Module, plan: RankPlan) -> nn.Module:
    return unpack_for(surgery.clone(source, share=source.parameters()), plan)


def _checked_steps(view: nn.Module, source: nn.Module, plan: RankPlan) -> list[Step]:
    """The steps of a plan that was made for `source`, or `PlanError`."""
    check_materialised(source)
    check_structure(source, plan)
    steps = steps_of(view, plan)
    expected = plan.model.get("weights")
    if expected is not None and expected != measure.weights_digest(source):
        warn(
            "the plan was made for other weights of this architecture: its ranks are applied, "
            "the errors it states do not hold"
        )
    return steps


def check_structure(source: nn.Module, plan: RankPlan) -> None:
    expected = plan.model.get("structure")
    if expected is None or expected == measure.structure_digest(source):
        return
    layers = {layer.name: layer for layer in find_layers(unpacked_clone(source, _split(plan)))}
    for decision in plan:
        for name, shape in zip(decision.targets, decision.shapes, strict=True):
            if name not in layers:
                raise PlanError(
                    f"layer {name}: expected by the plan with weight {list(shape)}, not found in "
                    f"this {type(source).__name__}; the plan was made for a "
                    f"{plan.model.get('class')}"
                )
            if layers[name].shape != shape:
                raise PlanError(
                    f"layer {name}: the plan expected a weight {list(shape)}, "
                    f"found {list(layers[name].shape)}"
                )
    raise PlanError(
        f"the plan was made for a {plan.model.get('class')} with other parameters or buffers than "
        f"this {type(source).__name__}; search again on this model"
    )


def swap(root: nn.Module, chains: dict[str, nn.Module]) -> nn.Module:
    modules = dict(surgery.named_modules(root))
    return surgery.replace(root, {modules[name]: chain for name, chain in chains.items()})


def placed(root: nn.Module, chains: dict[str, nn.Module], merges: Sequence[Merge]) -> nn.Module:
    """`root` with the modules in their places, and without the activations that merges drop."""
    dropping = [merge.bottleneck for merge in merges if merge.between == "drop"]
    return merge_linear.drop_activations(swap(root, chains), dropping)

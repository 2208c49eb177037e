"""Asymmetric factors: each layer fitted to what the layers before it really pass on.

Zhang et al., arXiv 1505.06798, section 3.4: the target is the response of the original
layer to its original input, the input is that of the network compressed so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rankopt._build.chains import Fill, Filling, Step, chains_for
from rankopt._calibration.collect import MAX_FEATURES, centres, layer_inputs
from rankopt._calibration.moments import Centre, Moments
from rankopt._calibration.normal_equations import Sums
from rankopt._decompositions.cache import BasisCache
from rankopt._model import measure, surgery
from rankopt._model.hooks import hooked
from rankopt._model.inputs import run
from rankopt._model.layers import Layer
from rankopt._utils.progress import progress_bar
from rankopt.errors import CalibrationError

__all__ = ["fitted_in_order"]


@dataclass(frozen=True)
class _Found:
    """What is known of a site's inputs, dense and compressed.

    Args:
        mapping: A [groups, n, n].
        moments: Of x̂.
        mean: Of x, [groups, n], where the moments have a mean.
    """

    mapping: Tensor
    moments: Moments
    mean: Tensor | None


class _Reached(Exception):  # noqa: N818  not an error
    """Raised by a hook: what follows the layer need not run."""


def fitted_in_order(
    view: nn.Module,
    student: nn.Module,
    steps: Sequence[Step],
    held: Sequence[Any],
    roots: Mapping[str, Tensor],
    *,
    progress: bool | None = None,
) -> dict[str, nn.Module]:
    """Layer name to chain, each fitted with the chains before it in place.

    With rows x of a layer's dense inputs and x̂ of its inputs in the compressed model,
    A minimises ‖x − A x̂‖², and the chain approximates W A under the moments of x̂: the
    best answer of its ranks to ‖W x − Ŵ x̂‖². Where a bias makes up for means, rows are
    taken less theirs, μ and μ̂, and the bias grows by W μ − Ŵ μ̂.

    Args:
        view: The unpacked dense model.
        student: A clone of it whose other decompositions are in place; changed.
        steps: What to fit.
        held: Calibration batches.
        roots: How sites weigh their outputs, see `rankopt._calibration.fisher.output_roots`.
        progress: Whether to show a progress bar.
    """
    chains: dict[str, nn.Module] = {}
    names = [layer.name for step in steps for layer in step.layers]
    called = [_calls(view, names, batch) for batch in held]  # batches may call other layers
    order = dict.fromkeys(name for each in called for name in each)
    first = {name: place for place, name in enumerate(order)}
    ordered = sorted(steps, key=lambda step: min(first.get(x.name, 0) for x in step.layers))
    with progress_bar("fitting in order", len(ordered), enabled=progress) as advance:
        for step in ordered:
            calls = [sum(each.count(layer.name) for layer in step.layers) for each in called]
            found = _moments(view, student, step.layers, held, calls)
            root = roots.get(step.layers[0].name)
            if found is not None and root is not None:
                found = replace(found, moments=found.moments.weighing(root))
            made = chains_for(step, _asymmetric(found))
            modules = dict(surgery.named_modules(student))
            student = surgery.replace(
                student, {modules[name]: chain for name, chain in made.items()}
            )
            chains |= made
            advance()
    return chains


def _calls(view: nn.Module, names: Sequence[str], batch: Any) -> list[str]:
    """Names of layers in the order in which a run calls them, as often as it does."""
    modules, called = dict(surgery.named_modules(view)), list[str]()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: called.append(name)

    handles = (modules[name].register_forward_pre_hook(note(name)) for name in names)
    with hooked(handles), torch.no_grad(), measure.preserve_rng(), measure.evaluation(view):
        run(view, batch)
    return called


def _moments(
    view: nn.Module,
    student: nn.Module,
    layers: Sequence[Layer],
    held: Sequence[Any],
    calls: Sequence[int],
) -> _Found | None:
    """What all calls of a site's layers tell.

    None if they are too wide, or never called; `calls` are those of each batch.
    """
    if layers[0].group_shape[0] > MAX_FEATURES:
        return None
    sums, given, dense = Sums(), Centre(), Centre()
    centred = all(centres(layer) for layer in layers)
    with torch.no_grad(), measure.evaluation(view), measure.evaluation(student):
        for batch, count in zip(held, calls, strict=True):
            if not count:
                continue
            with measure.preserve_rng():
                wanted = _inputs(view, layers, batch, count)
            with measure.preserve_rng():
                found = _inputs(student, layers, batch, count)
            shapes = [[x.shape for _, x in calls_of] for calls_of in (wanted, found)]
            if shapes[0] != shapes[1]:
                raise CalibrationError(
                    f"layer {layers[0].name}: asymmetric=True pairs its inputs with those after "
                    "compression, but they differ in number, as where a model routes tokens by "
                    "their values; leave it out"
                )
            for (layer, x), (_, y) in zip(wanted, found, strict=True):
                rows, targets = (layer_inputs(layer, part, seed=sums.count) for part in (y, x))
                if centred:
                    rows, targets = given.deviations(rows), dense.deviations(targets)
                sums.add(rows, targets)
    if not sums.count:
        return None
    if not bool(sums.gram.isfinite().all() and sums.cross.isfinite().all()):
        raise CalibrationError(
            f"layer {layers[0].name}: its inputs on the calibration data are not finite"
        )
    size = sums.gram.shape[-1]
    eye = torch.eye(size, dtype=torch.float64, device="cpu").expand(len(sums.gram), -1, -1)
    second, mean, dense_mean = sums.gram / sums.count, None, None
    if centred:
        second, mean, dense_mean = given.covariance(second), given.mean, dense.mean
        sums.gram = sums.count * second
        sums.cross -= sums.count * dense.offset[:, :, None] * given.offset[:, None, :]
        still = second.diagonal(dim1=-2, dim2=-1) == 0  # constant x̂: nothing goes along with it
        sums.cross.masked_fill_(still[:, None, :], 0.0)
    moments = Moments(second, size // layers[0].group_shape[0], sums.count, mean)
    return _Found(sums.solve(eye), moments, dense_mean)


def _inputs(
    model: nn.Module, layers: Sequence[Layer], batch: Any, calls: int
) -> list[tuple[Layer, Tensor]]:
    """What the first `calls` calls of some layers were given; the run ends there."""
    modules, seen = dict(surgery.named_modules(model)), list[tuple[Layer, Tensor]]()

    def watch(layer: Layer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            x = measure.first_argument(args, kwargs)
            ends = len(seen) + 1 == calls
            seen.append((layer, x if ends else x.clone()))  # the model may write into it
            if ends:
                raise _Reached

        return hook

    handles = (
        modules[x.name].register_forward_pre_hook(watch(x), with_kwargs=True) for x in layers
    )
    with hooked(handles), suppress(_Reached):
        run(model, batch)
    return seen


def _asymmetric(found: _Found | None) -> Fill:
    def fill(step: Step, chain: nn.Sequential, weight: Tensor) -> Filling:
        if found is None:
            return Filling(step.method.prepare(weight).factors(step.decision.ranks))
        once, moments = BasisCache(max_bytes=0), found.moments  # no other model has this weight
        dense, mapping = weight.double(), found.mapping.to(weight.device)
        if moments.pixels == math.prod(weight.shape[3:]):
            wanted = dense.flatten(2) @ mapping
        else:  # of a large kernel only channels are known: every pixel gets the same map
            wanted = torch.einsum("gsck,gcd->gsdk", dense.flatten(3), mapping)
        effective = wanted.reshape(weight.shape).to(weight.dtype)
        factors = once.get(step.method, effective, moments).factors(step.decision.ranks)
        if found.mean is None or moments.mean is None:
            return Filling(factors)
        return Filling(factors, (found.mean, moments.mean))

    return fill

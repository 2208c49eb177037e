"""Fisher information of a model's outputs with respect to a layer's: which errors matter.

Given the second moments A of a layer's inputs and F of the gradients at its outputs, the
divergence of the model's outputs grows by tr(F ΔW A ΔWᵀ) with an error ΔW in the weight, to
second order and with the two taken as independent (K-FAC, arXiv 1503.05671, section 3). A
factorisation of R W, F = RᵀR, followed by R⁻¹ in its last factor minimises that (generalised
Fisher-weighted SVD, arXiv 2505.17974); it holds for every decomposition whose last factor
gives the layer's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rankopt._calibration.collect import channel_rows, in_passes
from rankopt._model import measure, surgery
from rankopt._model.hooks import hooked
from rankopt._model.inputs import class_dim, compared, run, scores_classes
from rankopt._model.layers import Layer
from rankopt._utils.memory import give_back
from rankopt._utils.progress import progress_bar
from rankopt.errors import CalibrationError

__all__ = ["output_roots"]

# What logits are divided by: at 1 the samples that the model is sure of tell nothing.
TEMPERATURE: Final = 4.0
# Share of the mean eigenvalue that every direction counts at least: far from the dense
# weight, where few ranks are left, directions matter that the gradient there does not see.
DAMPING: Final = 0.1
_LEAVE: Final = "Leave fisher=True out if the model runs without it"
# Layers with more outputs, such as those of a vocabulary, have theirs weighed alike.
MAX_OUTPUTS: Final = 4096


def output_roots(
    view: nn.Module,
    groups: Sequence[Sequence[Layer]],
    held: Sequence[Any],
    *,
    progress: bool | None = None,
    check: Callable[[], None] = lambda: None,
) -> Iterator[tuple[str, Tensor]]:
    """The name of a site's first layer and its R [groups, out/groups, out/groups], F = RᵀR.

    F is damped and scaled to a mean eigenvalue of 1. Sites that no gradient reaches, or
    that have more than `MAX_OUTPUTS`, are left out. Roots come one by one, so that they
    need not be held together.

    Args:
        view: An unpacked clone whose modules the layers name; not changed.
        groups: The layers of each site.
        held: Calibration batches.
        progress: Whether to show a progress bar.
        check: Called after every batch, to raise when there is no more time.

    Raises:
        CalibrationError: The model cannot be differentiated, or gradients are not finite.
    """
    sites = {group[0].name: list(group) for group in groups}
    first = [group[0] for group in groups if group[0].group_shape[1] <= MAX_OUTPUTS]
    if not first:
        return
    model = surgery.clone(view).requires_grad_(False)
    reached = False
    with progress_bar("differentiating", None, enabled=progress) as advance:

        def tick() -> None:
            advance()
            check()

        for part in in_passes(first, measure.count_memory(view), lambda x: x.group_shape[1]):
            found, backward = _moments(model, [sites[x.name] for x in part], held, tick)
            reached |= backward
            for name in list(found):
                second = found.pop(name)
                if bool(second.any()):
                    yield name, _root(second)
            give_back()
    if not reached:
        raise CalibrationError(
            "fisher=True needs the gradient of the model's output, which has none: is it computed "
            f"under no_grad, or does it not depend on the layers? {_LEAVE}"
        )


def _moments(
    model: nn.Module,
    groups: Sequence[Sequence[Layer]],
    held: Sequence[Any],
    tick: Callable[[], None],
) -> tuple[dict[str, Tensor], bool]:
    """Sums of g gᵀ, g the gradient at a site's outputs, and whether there were any gradients."""
    modules = dict(surgery.named_modules(model))
    sums: dict[str, Tensor] = {}

    def watch(layer: Layer, site: str) -> Callable[..., Tensor]:
        @measure.no_autocast()
        def add(gradient: Tensor) -> None:
            exact = gradient if gradient.dtype == torch.float64 else gradient.float()
            rows = _rows(layer, exact)
            product = (rows.mT @ rows).double()
            sums[site] = sums[site] + product if site in sums else product

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return output
            if not output.requires_grad:  # the first: no weight needs a gradient
                output = output.detach().requires_grad_().clone()  # may be written into
            output.register_hook(add)
            return output

        return hook

    handles = (
        modules[layer.name].register_forward_hook(watch(layer, group[0].name))
        for group in groups
        for layer in group
    )
    generator, backward = torch.Generator().manual_seed(0), False
    with (
        hooked(handles),
        torch.enable_grad(),
        measure.preserve_rng(),
        measure.evaluation(model),
    ):
        for inputs in held:
            backward |= _probe(model, _detached(inputs), generator)
            tick()
    for name, second in sums.items():
        if not bool(second.isfinite().all()):
            raise CalibrationError(
                f"layer {name}: gradients at its outputs on the calibration data are not finite; "
                "leave fisher=True out, or compress in float32"
            )
    return sums, backward


def _detached(inputs: Any) -> Any:
    """The inputs without a history, which the gradient would follow into the caller's model."""
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, inputs)


def _probe(model: nn.Module, inputs: Any, generator: torch.Generator) -> bool:
    """A backward pass from a random direction v with E[v vᵀ] the Fisher of the outputs.

    That is diag(p) − p pᵀ for class probabilities p, which v = √p∘ε − p·Σ(√p∘ε) has for
    normal ε; other outputs count as means of unit Gaussians.

    Returns:
        Whether the outputs depend on any layer that is watched.
    """
    try:
        output = run(model, inputs)
        values = compared(output)
        # On the CPU, and whether it is used or not: the same on every device and in every pass.
        drawn = torch.randn(values.shape, generator=generator, device="cpu").to(values.device)
        if not values.requires_grad:
            return False
        if scores_classes(output):
            dim = class_dim(values)
            p = values.detach().float().div(TEMPERATURE).softmax(dim=dim)
            drawn = p.sqrt() * drawn
            drawn = drawn - p * drawn.sum(dim=dim, keepdim=True)
        values.backward(drawn.to(values.dtype))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, CalibrationError) as error:
        raise CalibrationError(
            f"fisher=True differentiates the model in eval mode, which fails: {error}. {_LEAVE}"
        ) from error
    return True


def _rows(layer: Layer, gradient: Tensor) -> Tensor:
    """[groups, positions, out/groups] of the gradient at a layer's outputs."""
    if not layer.is_conv:
        return gradient.reshape(1, -1, gradient.shape[-1])
    if gradient.dim() == len(layer.kernel) + 1:
        gradient = gradient.unsqueeze(0)
    return channel_rows(gradient, layer.groups)


def _root(second: Tensor) -> Tensor:
    """Upper root of the damped matrix; one scale for all groups, whose errors add up."""
    size = second.shape[-1]
    mean = second.diagonal(dim1=-2, dim2=-1).mean()
    eye = torch.eye(size, dtype=second.dtype, device=second.device)
    damped = (1 - DAMPING) * second / mean + DAMPING * eye
    upper: Tensor = torch.linalg.cholesky(0.5 * (damped + damped.mT)).mT.contiguous()
    return upper

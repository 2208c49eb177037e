"""From chains of factors back to dense weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankopt._build.provenance import plan_of
from rankopt._build.skeletons import build_empty, emptied
from rankopt._model import measure, surgery
from rankopt._model.layers import canonical_weight
from rankopt.errors import ModelError
from rankopt.plan import RankPlan

__all__ = ["check_foldable", "effective_weight", "fold"]

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def effective_weight(chain: Iterable[nn.Module]) -> Tensor:
    """The product of a chain's factors as one weight, differentiably.

    Args:
        chain: `nn.Linear` or `nn.ConvNd` modules in order of application, with
            nothing between them.

    Returns:
        The weight as [groups, out / groups, in / groups, *kernel].

    Example:
        >>> chain = nn.Sequential(nn.Conv2d(4, 2, (3, 1)), nn.Conv2d(2, 6, (1, 3), bias=False))
        >>> tuple(effective_weight(chain).shape)
        (1, 6, 4, 3, 3)
    """
    modules: list[Any] = list(chain)
    groups = math.gcd(*(getattr(module, "groups", 1) for module in modules))
    weight = _grouped(modules[0], groups)
    for module in modules[1:]:
        weight = _composed(weight, _grouped(module, groups))
    return weight


@measure.no_autocast()
def fold(model: nn.Module, original: nn.Module) -> nn.Module:
    """The function of a compressed model in the architecture of the original one.

    Decomposed layers become dense again, with weights of low rank. A plan made for the result
    fits the original architecture, so a second round of compression can start from it.

    Args:
        model: From `rankopt.apply` or `rankopt.load`, possibly trained since.
        original: The dense model; only its architecture is used, and it is not changed.

    Returns:
        A new model that computes what `model` computes, to rounding.

    Raises:
        ModelError: The model carries no plan, or was changed by more than chains:
            unpacked attention, say.

    Example:
        >>> dense = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> small = rankopt.apply(dense, rankopt.search(dense, "params<=60%"))
        >>> type(fold(small, dense)[0])
        <class 'torch.nn.modules.linear.Linear'>
    """
    small, result = surgery.unwrap(model), surgery.clone(surgery.unwrap(original))
    plan = plan_of(small)
    if plan is None:
        raise ModelError(
            f"this {type(small).__name__} carries no plan; fold takes what rankopt.apply or "
            "rankopt.load made"
        )
    chains = dict(surgery.named_modules(small))
    layers: dict[str, Any] = dict(surgery.named_modules(result))
    targets = [name for decision in plan.changes for name in decision.targets]
    written: dict[Tensor, tuple[str, Tensor]] = {}
    with torch.no_grad():
        for name in targets:
            chain, layer = chains.get(name), layers.get(name)
            if not isinstance(chain, nn.Sequential) or not hasattr(layer, "weight"):
                raise _unfoldable(name)
            weight = effective_weight(chain)
            assert layer is not None
            slot = canonical_weight(layer)
            if slot.shape != weight.shape:
                raise _unfoldable(name)
            _check_tied(name, weight, *written.setdefault(layer.weight, (name, weight)))
            slot.copy_(weight)
            bias = getattr(layer, "bias", None)
            if bias is not None:
                bias.copy_(chain[-1].bias)
        aliases = [
            name
            for name, layer in result.named_modules(remove_duplicate=False)
            if any(layer is layers[target] for target in targets)
        ]
        _copy_kept(small, result, [*targets, *map(surgery.normalised, aliases)])
    return result.train(small.training)


def check_foldable(plan: RankPlan, original: nn.Module) -> None:
    """Raise the `ModelError` of `fold` before a model is made by `plan`: no values are needed."""
    source = surgery.unwrap(original)
    fold(build_empty(source, plan), emptied(source))


def _copy_kept(small: nn.Module, result: nn.Module, targets: list[str]) -> None:
    """Every parameter and buffer outside of `targets`."""
    prefixes = tuple(f"{name}." if name else "" for name in targets)
    states = [
        {
            name: value
            for raw, value in model.state_dict(keep_vars=True).items()
            if not (name := surgery.normalised(raw)).startswith(prefixes)
        }
        for model in (small, result)
    ]
    for name in sorted(states[0].keys() ^ states[1].keys()):
        raise _unfoldable(name)
    written: dict[Tensor, tuple[str, Tensor]] = {}
    for name, value in states[0].items():
        if not surgery.is_extra_state(name):
            slot = states[1][name]
            _check_tied(name, value, *written.setdefault(slot, (name, value)))
            slot.copy_(value)
    for name, module in surgery.named_modules(result):
        if (held := f"{name}._extra_state".removeprefix(".")) in states[0]:
            module.set_extra_state(states[0][held])


def _check_tied(name: str, value: Tensor, first: str, held: Tensor) -> None:
    """Raise if one tensor of the original is to hold two."""
    if value is held or value.is_meta or torch.equal(value, held):
        return
    raise ModelError(
        f"{name} has other values than {first}, and both are one tensor in the original "
        "architecture; give one in which they are two"
    )


def _unfoldable(name: str) -> ModelError:
    return ModelError(
        f"{name} is not in the original architecture, or is no chain of factors: models whose "
        "attention was unpacked or whose blocks were merged cannot be folded; leave those layers "
        "out with ignore="
    )


def _grouped(module: Any, groups: int) -> Tensor:
    """The weight for fewer groups than the module has, as block diagonals."""
    blocks = getattr(module, "groups", 1) // groups
    weight: Tensor = module.weight.unflatten(0, (groups, blocks, -1))
    if blocks == 1:
        return weight.squeeze(1)
    eye = torch.eye(blocks, dtype=weight.dtype, device=weight.device)
    spread = torch.einsum("gboi...,bn->gboni...", weight, eye)
    blocked: Tensor = spread.flatten(3, 4).flatten(1, 2)
    return blocked


def _composed(before: Tensor, after: Tensor) -> Tensor:
    """The weight of `after` applied to the output of `before`, both [groups, out, in, *kernel]."""
    kernel = before.shape[3:]
    if math.prod(after.shape[3:]) == 1:
        product = after.flatten(2) @ before.flatten(2)
        shaped: Tensor = product.unflatten(2, (before.shape[2], *kernel))
        return shaped
    if math.prod(kernel) == 1:
        mixed: Tensor = torch.einsum("gom...,gmi->goi...", after, before.flatten(2))
        return mixed
    # Correlating twice is correlating once with the convolution of both kernels.
    dims = len(kernel)
    spatial = tuple(range(-dims, 0))
    inputs = before.movedim(2, 0).flatten(1, 2)
    kernels = after.flatten(0, 1).flip(spatial)
    padding = [size - 1 for size in after.shape[3:]]
    out = _CONVOLVE[dims](inputs, kernels, padding=padding, groups=len(before))
    composed: Tensor = out.unflatten(1, (len(before), -1)).movedim(0, 2)
    return composed

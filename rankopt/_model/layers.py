"""Layer: what rankopt knows of one module with a weight.

A `Layer` is a plain description; the module stays in the model. Layers that
cannot be decomposed are described too, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rankopt._model import surgery
from rankopt._model.kinds import CONVS, attached, attributes, known_class
from rankopt._model.unpack import type_name
from rankopt.errors import LayerError, ModelError

__all__ = [
    "MIN_CHANNELS",
    "Layer",
    "canonical_weight",
    "check_materialised",
    "check_weight",
    "find_layers",
    "refused_unseen",
    "stored_weight",
]

# Below this many channels per group on either side no chain is worth its two extra layers.
MIN_CHANNELS: Final = 4
# Transformers' GPT-2 layer: a linear layer that stores its weight as [in, out].
_HF_CONV1D: Final = "transformers.pytorch_utils.Conv1D"


@dataclass(frozen=True)
class Layer:
    """One module with a weight, described without holding it.

    Args:
        name: Full module name in the (unpacked) model.
        type: Class name of the module.
        shape: Shape of the weight as stored.
        in_channels: Input channels or features, all groups together.
        out_channels: Output channels or features, all groups together.
        kernel: Kernel size, empty for linear layers.
        stride: Stride, as the module states it.
        padding: Padding, numbers or ``same``/``valid``.
        dilation: Dilation.
        groups: Groups; 1 for linear layers.
        padding_mode: Of a convolution.
        bias: Whether there is a bias.
        own_bias: Whether there is one that no layer has but those that share the weight.
        dtype: Of the weight, such as ``float32``.
        transposed: Whether the weight is stored [in, out].
        aliases: Other names of the same module.
        tied_to: Names of other layers that share the weight tensor.
        positions_in: Input positions (batch times pixels or tokens) over all
            calls for one `example_inputs`; None if not probed.
        positions_out: The same on the output side.
        positions_between: The same between the factors of a separated kernel: after
            the first spatial side has been convolved, after the first two, and so on.
        refusal: Why the layer is kept whatever the strategy; None if it is free.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    in_channels: int = 0
    out_channels: int = 0
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: str | tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    bias: bool = False
    own_bias: bool = False
    dtype: str = "float32"
    transposed: bool = False
    aliases: tuple[str, ...] = ()
    tied_to: tuple[str, ...] = ()
    positions_in: int | None = None
    positions_out: int | None = None
    positions_between: tuple[int, ...] | None = None
    refusal: str | None = None

    @property
    def is_conv(self) -> bool:
        """Whether the layer is a convolution of any dimension."""
        return bool(self.kernel)

    @property
    def pointwise(self) -> bool:
        """Linear layers and convolutions with a kernel of one pixel."""
        return math.prod(self.kernel) == 1

    @property
    def group_shape(self) -> tuple[int, int]:
        """(input, output) channels of one group."""
        return self.in_channels // self.groups, self.out_channels // self.groups

    @property
    def params(self) -> int:
        """Elements of the weight."""
        return math.prod(self.shape)

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates for one `example_inputs`; None if not probed."""
        return None if self.positions_out is None else self.positions_out * self.params

    @property
    def itemsize(self) -> int:
        """Bytes of one weight element."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype.itemsize

    @property
    def names(self) -> tuple[str, ...]:
        """The name and the aliases."""
        return (self.name, *self.aliases)

    @property
    def too_narrow(self) -> str | None:
        """Why no chain can pay off for want of channels; None if one might."""
        inputs, outputs = self.group_shape
        if min(inputs, outputs) >= MIN_CHANNELS:
            return None
        groups = f" in each of {self.groups} groups" if self.groups > 1 else ""
        return f"only {inputs} input and {outputs} output channels{groups}"

    def refused(self, reason: str) -> Layer:
        """Return this layer with a reason to be kept; an earlier reason stays."""
        return self if self.refusal else replace(self, refusal=reason)


def canonical_weight(module: Any) -> Tensor:
    """The weight as [groups, out / groups, in / groups, *kernel], a view where it can be.

    Example:
        >>> tuple(canonical_weight(nn.Conv2d(8, 6, 3, groups=2)).shape)
        (2, 3, 4, 3, 3)
    """
    weight: Tensor = module.weight.detach()
    if type_name(module) == _HF_CONV1D:
        weight = weight.T
    groups = int(getattr(module, "groups", 1))
    grouped: Tensor = weight.unflatten(0, (groups, -1))
    return grouped


def stored_weight(layer: Layer, weight: Tensor) -> Tensor:
    """A canonical weight as the module stores it, differentiable."""
    flat = weight.flatten(0, 1)
    return flat.T if layer.transposed else flat


def check_weight(layer: Layer, weight: Tensor) -> None:
    """Raise `LayerError` if `weight` holds NaN or infinity."""
    # A finite norm proves finiteness in one read; an infinite one may have
    # overflowed, so only then is every element looked at.
    if math.isfinite(float(torch.linalg.vector_norm(weight))):
        return
    bad = int((~weight.isfinite()).sum())
    if bad:
        raise LayerError(
            f"layer {layer.name}: its weight {list(layer.shape)} holds {bad} NaN or infinite "
            "values, so no decomposition exists; repair or reload the checkpoint, "
            f"or keep the layer with ignore=['{layer.name}']"
        )


def refused_unseen(model: nn.Module, layers: Iterable[Layer]) -> list[Layer]:
    """The layers, those refused that others may use otherwise: for where no run tells.

    Attributes of `model` may hold and call them, and those set on a layer may be read.
    """
    modules, held = dict(surgery.named_modules(model)), surgery.held_outside(model)
    found = []
    for layer in layers:
        module = modules[layer.name]
        if module in held:
            layer = layer.refused(f"{held[module]} holds it too, outside the module tree")
        elif own := attributes(module):
            layer = layer.refused(
                f"its attribute {own[0]} may be read, and a chain has none; example inputs tell"
            )
        found.append(layer)
    return found


def find_layers(model: nn.Module) -> list[Layer]:
    """Describe every module of `model` that owns a weight, in model order.

    Args:
        model: The tree to read; unpack it first (see `rankopt._model.unpack`).
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in surgery.named_modules(model):
        entry = names.setdefault(module, [])
        if name not in entry:
            entry.append(name)
    layers: list[tuple[Layer, nn.Module]] = []
    owners: dict[int, list[tuple[str, str]]] = {}
    for module, paths in names.items():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((paths[0], key))
    for module, paths in names.items():
        layer = _describe(module, paths[0], tuple(paths[1:]))
        if layer is not None:
            layers.append((layer, module))
    described = {layer.name: layer for layer, _ in layers}

    def users(module: nn.Module, key: str) -> list[tuple[str, str]]:
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        return owners.get(id(own.get(key)), [])

    tied = [(_resolve_ties(x, users(m, "weight"), described), m) for x, m in layers]
    return [replace(x, own_bias=_owns(x, users(m, "bias"))) for x, m in tied]


def check_materialised(model: nn.Module, *, meta: bool = False) -> None:
    """Raise `ModelError` for parameters without plain values; `meta` allows the meta device."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ModelError(f"parameter {name} is not initialised; run the lazy model once first")
        if is_traceable_wrapper_subclass(parameter):
            raise ModelError(
                f"parameter {name} is a {type(parameter).__name__}, not a plain tensor; compress "
                "the model first, and quantise or shard the result"
            )
        if parameter.is_meta and not meta:
            raise ModelError(
                f"parameter {name} is on the meta device and has no values; "
                "materialise the model (model.to_empty(device='cpu') and load its weights) first"
            )


def _describe(module: nn.Module, name: str, aliases: tuple[str, ...]) -> Layer | None:
    base: dict[str, Any] = {"name": name, "type": type(module).__name__, "aliases": aliases}
    known = known_class(module)
    if known is nn.Linear or type_name(module) == _HF_CONV1D:
        fields = _linear_fields(module)
    elif known is not None:
        fields = _conv_fields(module)
    else:
        return _other(module, base)
    weight = module._parameters.get("weight")
    if weight is None:
        return Layer(
            **base,
            shape=_shape(module),
            refusal="its weight is no plain parameter (weight norm, pruning or a tensor subclass)",
        )
    layer = Layer(
        **base, **fields, shape=tuple(weight.shape), dtype=str(weight.dtype).removeprefix("torch.")
    )
    reason = _refusal(layer, module, weight)
    return layer if reason is None else layer.refused(reason)


def _shape(module: nn.Module) -> tuple[int, ...]:
    """Shape of a weight that is no plain parameter.

    It is not evaluated: spectral norm moves its power iteration on whenever it is.
    """
    stored = [p for key, p in module.named_parameters() if "weight" in key]
    if stored:  # its direction, its original: the largest has its shape
        return tuple(max(stored, key=lambda parameter: parameter.numel()).shape)
    weight = {**vars(module), **module._buffers}.get("weight")
    return tuple(weight.shape) if isinstance(weight, Tensor) else ()


def _linear_fields(module: Any) -> dict[str, Any]:
    transposed = type_name(module) == _HF_CONV1D
    weight = module.weight
    inputs, outputs = weight.shape if transposed else weight.shape[::-1]
    return {
        "in_channels": inputs,
        "out_channels": outputs,
        "bias": module.bias is not None,
        "transposed": transposed,
    }


def _conv_fields(module: Any) -> dict[str, Any]:
    return {
        "in_channels": module.in_channels,
        "out_channels": module.out_channels,
        "kernel": tuple(module.kernel_size),
        "stride": tuple(module.stride),
        "padding": module.padding if isinstance(module.padding, str) else tuple(module.padding),
        "dilation": tuple(module.dilation),
        "groups": module.groups,
        "padding_mode": module.padding_mode,
        "bias": module.bias is not None,
    }


def _refusal(layer: Layer, module: nn.Module, weight: Tensor) -> str | None:
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}, not a plain parameter"
    if not weight.is_floating_point():
        return f"its weight is {layer.dtype}, not floating point"
    if weight.dtype.itemsize < 2:  # torch computes no norm or decomposition of these
        return f"its weight is {layer.dtype}, which cannot be decomposed; 16 bits are the least"
    if layer.groups > 1 and layer.groups == layer.in_channels:
        return "depthwise: each group has one input channel"
    registered = {**module._parameters, **module._buffers, **module._modules}
    if others := [key for key in registered if key not in ("weight", "bias")]:
        return f"it holds {others[0]} beside its weight and bias"
    return attached(module)


def _other(module: nn.Module, base: Mapping[str, Any]) -> Layer | None:
    """Modules of other classes are listed if they own a matrix called weight."""
    parent = next((c for c in (nn.Linear, *CONVS) if isinstance(module, c)), None)
    matrices = [
        parameter
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 2 and "weight" in key
    ]
    if parent is not None:
        shape = _shape(module)
        reason = f"{type(module).__name__} is a subclass of {parent.__name__} that may do more"
        return Layer(**base, shape=shape, refusal=reason)
    if matrices:
        shape = tuple(matrices[0].shape)
        reason = f"{type(module).__name__} is not a layer rankopt decomposes"
        return Layer(**base, shape=shape, refusal=reason)
    return None


def _owns(layer: Layer, users: list[tuple[str, str]]) -> bool:
    """Whether the users of a bias are the layer and those that share its weight."""
    return bool(users) and {(name, "bias") for name in (layer.name, *layer.tied_to)} >= {*users}


def _resolve_ties(
    layer: Layer, owners: list[tuple[str, str]], described: Mapping[str, Layer]
) -> Layer:
    others = [(name, key) for name, key in owners if name != layer.name]
    if not others or layer.refusal:
        return layer
    for name, key in others:
        other = described.get(name)
        if other is None or key != "weight" or other.refusal:
            what = f"{other.type} {name}" if other else f"{name}.{key}"
            return layer.refused(f"its weight is tied to {what}")
        same = (other.kernel, other.groups, other.transposed) == (
            layer.kernel,
            layer.groups,
            layer.transposed,
        )
        if not same:
            return layer.refused(f"its weight is tied to {other.type} {name} of another form")
    return replace(layer, tied_to=tuple(name for name, _ in others))

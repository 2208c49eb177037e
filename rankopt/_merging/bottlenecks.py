"""Finding bottlenecks: a k×k convolution between two 1x1 ones, with norms and activations.

The model is traced by torch.fx; where its root cannot be traced, the largest parts
that can be are. Only the graph is read: what is put in place later are modules.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rankopt._model import measure, surgery
from rankopt._model.kinds import attached
from rankopt._model.layers import Layer, find_layers, refused_unseen

__all__ = ["Activation", "Bottleneck", "every_bottleneck", "find_bottlenecks"]

_CONVS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# Each works on every element alone, so that it commutes with a choice of channels.
_ACTIVATIONS: Final = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Hardtanh, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign,
)  # fmt: skip
_FUNCTIONS: Final = (
    F.relu, F.relu_, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish,
    F.hardswish, F.hardtanh, F.hardsigmoid, F.sigmoid, F.tanh, F.softplus, F.softsign,
    torch.relu, torch.relu_, torch.sigmoid, torch.tanh,
)  # fmt: skip
_METHODS: Final = ("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_")
_PASSED: Final = (nn.Identity, nn.modules.dropout._DropoutNd)


@dataclass(frozen=True)
class Activation:
    """An elementwise function between two convolutions.

    Args:
        target: Full name of a module, name of a tensor method, or a function.
        kind: ``call_module``, ``call_method`` or ``call_function``, as torch.fx has it.
        args: Arguments after the tensor.
        kwargs: Keyword arguments.
    """

    target: str | Callable[..., Any]
    kind: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, modules: Mapping[str, nn.Module], x: Tensor) -> Tensor:
        """Apply it to `x`, with the modules of the model by name."""
        if self.kind == "call_module":
            made: Tensor = modules[str(self.target)](x)
        elif self.kind == "call_method":
            made = getattr(x, str(self.target))(*self.args, **self.kwargs)
        else:
            assert callable(self.target)
            made = self.target(x, *self.args, **self.kwargs)
        return made


@dataclass(frozen=True)
class Bottleneck:
    """A 1x1, a k×k and a 1x1 convolution in a row.

    Args:
        layers: The three convolutions.
        norms: Names of the BatchNorm layers after the first and the second; None
            where there is none.
        activations: What follows each of the two norms; None where there is nothing.
        refusal: Why the three cannot be merged; None if they can.
    """

    layers: tuple[Layer, Layer, Layer]
    norms: tuple[str | None, str | None] = (None, None)
    activations: tuple[Activation | None, Activation | None] = (None, None)
    refusal: str | None = None

    @property
    def name(self) -> str:
        """Name of the convolution in the middle."""
        return self.layers[1].name

    @property
    def targets(self) -> tuple[str, str, str]:
        """Names of the three convolutions."""
        first, middle, last = (layer.name for layer in self.layers)
        return first, middle, last

    @property
    def widths(self) -> tuple[int, int]:
        """Channels on both sides of the middle, the largest ranks."""
        return self.layers[1].in_channels, self.layers[1].out_channels

    @property
    def groups(self) -> int:
        """Groups of the middle convolution; ranks are multiples of it."""
        return self.layers[1].groups


def find_bottlenecks(model: nn.Module) -> list[Bottleneck]:
    """Every 1x1, k×k, 1x1 sequence in `model`, also those that cannot be merged.

    Args:
        model: Not changed; it may lie on the meta device.

    Returns:
        In the order of execution; each with the reason if it cannot be merged. Of those that
            share a convolution only the first can.

    Example:
        >>> convs = [nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 16, 1)]
        >>> [found.targets for found in find_bottlenecks(nn.Sequential(*convs))]
        [('0', '1', '2')]
    """
    return _apart(every_bottleneck(model))


def every_bottleneck(model: nn.Module) -> list[Bottleneck]:
    """As `find_bottlenecks`, each by itself: several that can be merged may share convolutions."""
    plain = surgery.unwrap(surgery.clone(model, share=[*model.parameters(), *model.buffers()]))
    for parent in list(plain.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None:  # tracing would enter torch.compile's wrapper
                parent._modules[name] = getattr(child, "_orig_mod", child)
    described = refused_unseen(plain, find_layers(plain))
    layers = {name: layer for layer in described for name in layer.names}
    found: list[Bottleneck] = []
    with measure.preserve_rng():
        for prefix, graph in _graphs(plain, ""):
            found += _Reader(plain, prefix, graph, layers).bottlenecks()
    return found


def _apart(found: Sequence[Bottleneck]) -> list[Bottleneck]:
    """Of free blocks that share a convolution, only the first stays free."""
    made, taken = list[Bottleneck](), dict[str, str]()
    for block in found:
        shared = next((name for name in block.targets if name in taken), None)
        if block.refusal is None and shared is not None:
            reason = f"shares {shared} with the bottleneck at {taken[shared]}"
            block = replace(block, refusal=reason)
        elif block.refusal is None:
            taken |= dict.fromkeys(block.targets, block.name)
        made.append(block)
    return made


class _Tracer(fx.Tracer):
    """Sees convolutions and norms of other classes too, parametrised ones say."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*_CONVS, *_NORMS)) or super().is_leaf_module(m, module_qualified_name)


def _graphs(module: nn.Module, prefix: str) -> Iterator[tuple[str, fx.Graph]]:
    """The graph of `module`, or else those of its children, with their prefixes."""
    try:
        graph = _Tracer().trace(module)
    except Exception:  # control flow on values and the like; fx raises whatever the code does
        for name, child in module.named_children():
            if not isinstance(child, (*_CONVS, *_NORMS, nn.Linear)):
                yield from _graphs(child, f"{prefix}{name}.")
        return
    yield prefix, graph


class _Reader:
    """Walks from each k×k convolution of a graph to its neighbours on both sides."""

    def __init__(
        self, model: nn.Module, prefix: str, graph: fx.Graph, layers: Mapping[str, Layer]
    ) -> None:
        self.prefix, self.graph, self.layers = prefix, graph, layers
        self.modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        nodes = [node for node in graph.nodes if node.op == "call_module"]
        self.calls = Counter(id(self.module(node)) for node in nodes)

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module a node calls; None for other nodes."""
        if node.op != "call_module":
            return None
        found: nn.Module = self.modules[f"{self.prefix}{node.target}"]
        return found

    def layer(self, node: fx.Node) -> Layer | None:
        """The convolution a node calls; None for other nodes."""
        if not isinstance(self.module(node), _CONVS):
            return None
        return self.layers.get(f"{self.prefix}{node.target}")

    def pointwise(self, node: fx.Node) -> bool:
        """Whether a node calls a convolution with a kernel of one pixel."""
        conv: Any = self.module(node)
        return self.layer(node) is not None and math.prod(conv.kernel_size) == 1

    def bottlenecks(self) -> list[Bottleneck]:
        found = []
        for node in self.graph.nodes:
            layer = self.layer(node)
            if layer is None or self.pointwise(node):
                continue
            before, after = self.walk(node, back=True), self.walk(node, back=False)
            if not (self.pointwise(before[-1]) and self.pointwise(after[-1])):
                continue
            # From the first convolution to the last, both included.
            found.append(self.describe([*reversed(before[1:]), before[0], *after[1:]], node))
        return found

    def walk(self, start: fx.Node, *, back: bool) -> list[fx.Node]:
        """Nodes from `start` to the next convolution, or to where no single way leads on."""
        way = [start]
        while len(way) == 1 or self.layer(way[-1]) is None:
            node = way[-1]
            steps = node.all_input_nodes if back else list(node.users)
            if not back and len(steps) > 1:  # a convolution that is not the only user is reported
                steps = [step for step in steps if self.layer(step) is not None][:1]
            if len(steps) != 1:
                return way
            way.append(steps[0])
        return way

    def describe(self, way: list[fx.Node], middle: fx.Node) -> Bottleneck:
        cut = way.index(middle)
        layers = [self.layer(node) for node in (way[0], middle, way[-1])]
        assert all(layers)
        reasons = [self.refusal_of_convs(*layers)]  # type: ignore[arg-type]
        norms: list[str | None] = []
        activations: list[Activation | None] = []
        for part in (way[: cut + 1], way[cut:]):
            norm, activation, reason = self.between(part)
            norms.append(norm)
            activations.append(activation)
            reasons.append(reason)
        for node in way:
            module = self.module(node)
            if module is None:
                continue
            if self.calls[id(module)] > 1 and (self.layer(node) or self.is_norm(node)):
                reasons.append(f"{self.prefix}{node.target} is called several times")
            if (lost := attached(module)) is not None:
                reasons.append(f"{self.label(node)}: {lost}")
            if self.is_norm(node) and (owner := self.tied(module)):
                reasons.append(f"{self.label(node)} shares its parameters with {owner}")
        reason = next((text for text in reasons if text is not None), None)
        return Bottleneck(tuple(layers), tuple(norms), tuple(activations), reason)  # type: ignore[arg-type]

    def refusal_of_convs(self, first: Layer, middle: Layer, last: Layer) -> str | None:
        if middle.groups > 1 and middle.groups == middle.in_channels:
            return f"{middle.name} is depthwise: it mixes no channels, so it has no Tucker factors"
        for layer in (first, middle, last):
            if layer.refusal:
                return f"{layer.name}: {layer.refusal}"
            if layer.tied_to:
                return f"{layer.name}: its weight is shared with {layer.tied_to[0]}"
        for layer in (first, last):
            if layer.groups > 1:
                return f"{layer.name} has {layer.groups} groups; a factor cannot be merged into it"
        for layer in (first, last):
            if isinstance(layer.padding, tuple) and any(layer.padding):
                return f"{layer.name} pads its input although its kernel is one pixel"
        return None

    def tied(self, module: nn.Module) -> str | None:
        """Another module that owns a parameter of `module`."""
        own = {id(parameter) for parameter in module.parameters(recurse=False)}
        for name, other in self.modules.items():
            if other is not module and own & {id(p) for p in other.parameters(recurse=False)}:
                return name
        return None

    def is_norm(self, node: fx.Node) -> bool:
        return type(self.module(node)) in _NORMS

    def between(self, part: list[fx.Node]) -> tuple[str | None, Activation | None, str | None]:
        """Norm and activation between two convolutions, or why they do not qualify."""
        norm: str | None = None
        activation: Activation | None = None
        for node in part[:-1]:
            if len(node.users) != 1:
                return norm, activation, f"the output of {self.label(node)} is used elsewhere too"
        for node in part[1:-1]:
            module = self.module(node)
            if isinstance(module, _PASSED):
                continue
            if self.is_norm(node) and norm is None and activation is None:
                norm = f"{self.prefix}{node.target}"
                continue
            found = self.activation(node)
            if found is None or activation is not None:
                return (
                    norm,
                    activation,
                    f"{self.label(node)} lies between {self.label(part[0])} and "
                    f"{self.label(part[-1])}; only a BatchNorm and then an activation may",
                )
            activation = found
        return norm, activation, None

    def activation(self, node: fx.Node) -> Activation | None:
        """The elementwise function a node calls; None for anything else."""
        if len(node.all_input_nodes) != 1 or not node.args:
            return None
        rest, kwargs = tuple(node.args[1:]), dict(node.kwargs)
        if node.op == "call_module" and type(self.module(node)) in _ACTIVATIONS:
            return Activation(f"{self.prefix}{node.target}", node.op)
        if node.op == "call_function" and node.target in _FUNCTIONS:
            return Activation(node.target, node.op, rest, kwargs)
        if node.op == "call_method" and node.target in _METHODS:
            return Activation(node.target, node.op, rest, kwargs)
        return None

    def label(self, node: fx.Node) -> str:
        module = self.module(node)
        if module is not None:
            return f"{type(module).__name__} {self.prefix}{node.target}"
        return f"{getattr(node.target, '__name__', node.target)}()"

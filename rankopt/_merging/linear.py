"""Merging without what lies between: norms folded, activations dropped, three linear maps.

The maps are fitted one after the other to what the dense model computes: the
first to the kept channels that enter its middle convolution, the second to those that
leave it, the third to what the block's last convolution gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from rankopt._calibration.normal_equations import Sums, batched, paired_rows, put, run_watched
from rankopt._merging.bottlenecks import Bottleneck
from rankopt._merging.channels import Modules
from rankopt._model import measure, surgery
from rankopt._model.layers import Layer
from rankopt.errors import LayerError

__all__ = ["Linear", "drop_activations", "fit_linear", "holder"]

_STAGES: Final = 3


@dataclass
class Linear:
    """A block being fitted: what is kept, and the modules."""

    bottleneck: Bottleneck
    kept: tuple[Tensor, Tensor]
    made: Mapping[str, Any]

    def layer(self, stage: int) -> Layer:
        """The convolution of a stage at its new width."""
        layer = self.bottleneck.layers[stage]
        inputs = layer.in_channels if stage == 0 else len(self.kept[stage - 1])
        return replace(layer, in_channels=inputs)


def fit_linear(
    view: nn.Module,
    modules: Modules,
    merges: Sequence[Linear],
    held: Sequence[Any],
    *,
    progress: bool | None = None,
) -> None:
    """Set weights and biases of every merge by regression, one pass for each convolution."""
    for stage in range(_STAGES if merges else 0):
        sums = {merge.bottleneck.name: Sums() for merge in merges}
        waiting: dict[str, Tensor] = {}
        handles: list[RemovableHandle] = []
        for merge in merges:
            first, middle, last = (modules[name] for name in merge.bottleneck.targets)
            meet = _meet(merge, stage, sums[merge.bottleneck.name], waiting)
            entering = _enter(merge, stage, waiting)
            handles.append(first.register_forward_pre_hook(entering, with_kwargs=True))
            if stage == _STAGES - 1:
                handles.append(last.register_forward_hook(_of_output(meet)))
            else:
                meeting = (middle, last)[stage]
                handles.append(meeting.register_forward_pre_hook(_of_input(meet), with_kwargs=True))
        run_watched(view, held, handles, progress=progress)
        for merge in merges:
            _set(merge, stage, sums[merge.bottleneck.name])


def _enter(merge: Linear, stage: int, waiting: dict[str, Tensor]) -> Callable[..., None]:
    """Compute what the merged block hands to the convolution of `stage`."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = batched(merge.bottleneck.layers[0], measure.first_argument(args, kwargs).detach())
        for name in merge.bottleneck.targets[:stage]:
            x = merge.made[name](x)
        waiting[merge.bottleneck.name] = x

    return hook


def _meet(
    merge: Linear, stage: int, sums: Sums, waiting: dict[str, Tensor]
) -> Callable[[Tensor], None]:
    layer = merge.layer(stage)

    def add(wanted: Tensor) -> None:
        y = batched(layer, wanted.detach())
        if stage < _STAGES - 1:
            y = y[:, merge.kept[stage]]
        for rows, targets in paired_rows(layer, waiting.pop(merge.bottleneck.name), y):
            ones = torch.ones_like(rows[..., :1])
            sums.add(torch.cat([rows, ones], dim=-1), targets)

    return add


def _of_input(meet: Callable[[Tensor], None]) -> Callable[..., None]:
    return lambda module, args, kwargs: meet(measure.first_argument(args, kwargs))


def _of_output(meet: Callable[[Tensor], None]) -> Callable[..., None]:
    return lambda module, args, output: meet(output)


def _set(merge: Linear, stage: int, sums: Sums) -> None:
    layer = merge.bottleneck.layers[stage]
    if not sums.count:
        raise LayerError(f"layer {layer.name}: the calibration inputs never reach it")
    conv = merge.made[layer.name]
    found = sums.solve(torch.zeros_like(sums.cross, device="cpu"))
    put(conv.weight, found[..., :-1], layer)
    put(conv.bias, found[..., -1], layer)


def drop_activations(root: nn.Module, bottlenecks: Iterable[Bottleneck]) -> nn.Module:
    """Take the activations of the bottlenecks out of `root`, in place.

    An activation module with one use becomes `nn.Identity`. Otherwise (one ReLU for
    a whole block, or a function) the smallest module that holds the three
    convolutions becomes a `torch.fx.GraphModule` without those calls.

    Returns:
        The root, which is new only if it is itself such a module.

    Raises:
        LayerError: That module cannot be traced on its own.
    """
    for bottleneck in bottlenecks:
        if any(activation is not None for activation in bottleneck.activations):
            root = _without(root, bottleneck)
    return root


def _without(root: nn.Module, bottleneck: Bottleneck) -> nn.Module:
    name = holder(bottleneck.targets)
    block = dict(surgery.named_modules(root))[name]
    where = f"layer {bottleneck.name}: its activations cannot be dropped"
    try:
        graph = fx.Tracer().trace(block)
    except Exception as error:
        raise LayerError(f"{where}: {name} cannot be traced on its own: {error}") from error
    if any("dropout" in getattr(node.target, "__name__", "") for node in graph.nodes):
        raise LayerError(f"{where}: {name} depends on its mode")
    prefix = f"{name}." if name else ""
    inner = [target.removeprefix(prefix) for target in bottleneck.targets]
    nodes = {node.target: node for node in graph.nodes if node.op == "call_module"}
    erased = False
    for start, end, activation in zip(inner[:2], inner[1:], bottleneck.activations, strict=True):
        node = nodes[end].all_input_nodes[0]
        while activation is not None and node is not nodes[start]:
            source = node.all_input_nodes[0]
            if (node.op, node.target) == (activation.kind, _local(activation.target, prefix)):
                uses = sum(other.target == node.target for other in graph.nodes)
                if node.op == "call_module" and uses == 1:
                    owner, _, leaf = str(node.target).rpartition(".")
                    block.get_submodule(owner)._modules[leaf] = nn.Identity()
                else:
                    node.replace_all_uses_with(source)
                    graph.erase_node(node)
                    erased = True
                break
            node = source
    if not erased:
        return root
    made = fx.GraphModule(block, graph, class_name=type(block).__name__)
    for members in ("_modules", "_parameters", "_buffers"):  # also those the graph does not use
        vars(made)[members] = {**vars(made)[members], **vars(block)[members]}
    originals = dict(block.named_modules())
    for path, module in made.named_modules():
        module.training = originals[path].training
    return surgery.replace(root, {block: made})


def holder(names: Sequence[str]) -> str:
    """The longest module path that all names share."""
    paths = [name.split(".")[:-1] for name in names]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _local(target: Any, prefix: str) -> Any:
    return target.removeprefix(prefix) if isinstance(target, str) else target

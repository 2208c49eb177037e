"""Finding out how layers are used: positions, calls, and reads from outside.

A layer whose weight or form is read by other code than its own forward would
break if a chain took its place. With example inputs the model is run once on a
clone that records such reads; without, the source of its classes is searched.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache, cached_property
from types import FrameType
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from rankopt._model import measure, surgery
from rankopt._model.hooks import hooked
from rankopt._model.layers import Layer
from rankopt._model.stand_ins import irreplaceable
from rankopt._model.unpack import UnpackedAttention, is_registered
from rankopt.errors import ModelError

__all__ = ["Call", "Probe", "probe", "static_reads"]

# What a chain of factors does not offer under the same name, or a narrower norm as it was.
_READS: Final = frozenset(
    {
        "weight",
        "bias",
        "in_features",
        "out_features",
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
        "nf",
        "num_features",
        "running_mean",
        "running_var",
        "nx",
        "in_proj_weight",
    }
)
# In names of methods that set a model up rather than run it, unless one that runs it asks.
_SETUP: Final = ("init", "reset", "load", "extra_repr")


_FORMATS: Final = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Call:
    """One input a layer was called with, described without holding it.

    Args:
        shape: Of the input.
        dtype: Such as ``float32``.
        memory_format: ``contiguous`` or ``channels_last``.
        autocast: The dtype of the autocast it was called under, the model's own or the
            caller's; None for none.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    memory_format: str = "contiguous"
    autocast: str | None = None

    @classmethod
    def of(cls, entering: Tensor) -> Call:
        """Describe an input."""
        layout = _FORMATS.get(entering.dim())
        last = layout is not None and entering.is_contiguous(memory_format=layout)
        last = last and not entering.is_contiguous()
        device = entering.device.type
        cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return cls(
            tuple(entering.shape),
            str(entering.dtype).removeprefix("torch."),
            "channels_last" if last else "contiguous",
            str(torch.get_autocast_dtype(device)).removeprefix("torch.") if cast else None,
        )

    def example(self, device: torch.device) -> Tensor:
        """A random input of this description."""
        values = torch.randn(self.shape, device=device).to(getattr(torch, self.dtype))
        return values.contiguous(memory_format=self._layout)

    def formatted(self, module: nn.Module) -> nn.Module:
        """`module` with its weights in this memory format, where they have as many axes."""
        for parameter in module.parameters():
            if parameter.dim() == len(self.shape):
                parameter.data = parameter.data.contiguous(memory_format=self._layout)
        return module

    @property
    def _layout(self) -> torch.memory_format:
        last = self.memory_format == "channels_last"
        return _FORMATS[len(self.shape)] if last else torch.contiguous_format


@dataclass
class Probe:
    """What one run of the model showed.

    Args:
        macs: Multiply-accumulates of the whole (unpacked) model.
        positions: Layer name to positions over all calls, see `_positions`;
            see `Layer`.
        calls: Layer name to the inputs it was called with, in order.
        reads: Layer name to what was read from outside its forward, or why else no
            chain can take its place.
        crossed: Packed attention called with different query and key.
        trains: Whether the model also runs in train mode on these inputs.
    """

    macs: int = 0
    positions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    calls: dict[str, tuple[Call, ...]] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)
    crossed: set[str] = field(default_factory=set)
    trains: bool = True

    def annotate(self, layers: Iterable[Layer]) -> list[Layer]:
        """Layers with positions filled in, and refused where use forbids a chain."""
        annotated = []
        for layer in layers:
            never = (0,) * (max(len(layer.kernel), 1) + 1)
            entering, *between, leaving = self.positions.get(layer.name, never)
            layer = replace(
                layer,
                positions_in=entering,
                positions_out=leaving,
                positions_between=tuple(between),
            )
            if layer.name in self.reads:
                layer = layer.refused(self.reads[layer.name])
            elif layer.name not in self.positions:
                layer = layer.refused("example_inputs never reach it")
            elif layer.macs == 0:  # an expert that no row was sent to, or a batch of none
                layer = layer.refused("example_inputs give it nothing to compute")
            annotated.append(layer)
        return annotated


def probe(view: nn.Module, layers: Iterable[Layer], example_inputs: Any) -> Probe:
    """Run an unpacked clone in eval and train mode and watch its layers.

    Args:
        view: A private clone (see `surgery.clone`).
        layers: The layers to watch.
        example_inputs: A tensor, a tuple or a mapping.

    Raises:
        ModelError: The model fails on the inputs in eval mode.
    """
    measure.check_inputs(example_inputs)
    inputs = measure.to_device(example_inputs, surgery.device_of(view))
    result = Probe()
    modules = dict(surgery.named_modules(view))
    watched = {layer.name: modules[layer.name] for layer in layers if layer.refusal is None}
    counting = True

    def count(name: str) -> Callable[..., None]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
        ) -> None:
            entering = measure.first_argument(args, kwargs)
            now = _positions(module, entering, output)
            before = result.positions.get(name, (0,) * len(now))
            added = now if counting else (0,) * len(now)
            if counting:
                result.calls[name] = (*result.calls.get(name, ()), Call.of(entering))
            result.positions[name] = tuple(a + b for a, b in zip(before, added, strict=True))

        return hook

    handles = [
        module.register_forward_hook(count(name), with_kwargs=True)
        for name, module in watched.items()
    ]
    handles += [
        module.register_forward_pre_hook(_note_crossing(result, name), with_kwargs=True)
        for name, module in modules.items()
        if isinstance(module, UnpackedAttention) and module.packed
    ]
    classes: dict[nn.Module, Any] = {module: type(module) for module in watched.values()}
    names = {id(module): name for name, module in watched.items()}
    try:
        with hooked(handles), _Recorder(result, names):
            for module, cls in classes.items():
                module.__class__ = _watching(cls)
            with measure.preserve_rng(), measure.evaluation(view):
                try:
                    result.macs = measure.count_macs(view, inputs)
                except Exception as error:
                    raise ModelError(
                        f"{type(view).__name__} fails on example_inputs in eval mode: "
                        f"{type(error).__name__}: {error}"
                    ) from error
                counting = False
                saved = [(buffer, buffer.clone()) for buffer in view.buffers()]
                view.train()
                try:
                    with torch.no_grad():
                        measure.call(view, inputs)
                except Exception:  # a batch of one before BatchNorm, say: not our failure
                    result.trains = False
                finally:  # later measurements need the running statistics the model has
                    for buffer, value in saved:
                        _restore(buffer, value)
    finally:
        for module, cls in classes.items():
            module.__class__ = cls
    if not result.crossed:  # packed projections of these are split, and all is probed again
        called = [name for name in result.calls if name not in result.reads]
        result.reads |= irreplaceable(view, called, inputs)
    return result


def _restore(buffer: Tensor, value: Tensor) -> None:
    """Copy into a buffer; what an expanded one repeats is written once."""
    if buffer.layout is torch.strided:
        for dim, stride in enumerate(buffer.stride()):
            if stride == 0 and buffer.shape[dim] > 1:
                buffer, value = buffer.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
    buffer.copy_(value)


def _positions(module: Any, entering: Any, leaving: Any) -> tuple[int, ...]:
    """Positions of one call: at the input, after each spatial side, at the output."""
    kernel = getattr(module, "kernel_size", None)
    if kernel is None:
        inside, outside = (x.numel() // max(x.shape[-1], 1) for x in (entering, leaving))
        return inside, outside
    now = entering.numel() // module.in_channels
    passed = [now]
    sides = (x.shape[-len(kernel) :] for x in (entering, leaving))
    for before, after in zip(*sides, strict=True):
        now = now // max(before, 1) * after
        passed.append(now)
    return tuple(passed)


def _note_crossing(result: Probe, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        query, key, value = (*args, *(kwargs[k] for k in ("query", "key", "value") if k in kwargs))[
            :3
        ]
        if not (query is key and key is value):
            result.crossed.add(name)

    return hook


_ACTIVE = threading.local()  # each thread's search watches its own clone


class _Recorder:
    """While active, says who reads attributes of watched modules."""

    def __init__(self, result: Probe, names: Mapping[int, str]) -> None:
        self.result, self.names = result, names
        self.inside: list[int] = []

    def __enter__(self) -> _Recorder:
        _ACTIVE.recorder = self
        return self

    def __exit__(self, *_: object) -> None:
        _ACTIVE.recorder = None

    def read(self, module: nn.Module, attribute: str, reader: FrameType) -> None:
        own = reader.f_code.co_filename == __file__ or id(module) in self.inside
        name = self.names.get(id(module))
        if own or name is None:
            return
        where = _qualified(reader)
        self.result.reads.setdefault(
            name, f"its {attribute} is read outside its own forward, by {where}"
        )


def _qualified(frame: FrameType) -> str:
    """The name of the function a frame runs, its class included."""
    if sys.version_info >= (3, 11):
        return frame.f_code.co_qualname
    owner = frame.f_locals.get("self")
    return f"{type(owner).__name__}." * (owner is not None) + frame.f_code.co_name


@cache
def _watching(cls: Any) -> Any:
    """A subclass of `cls` that reports attribute reads from outside its forward."""

    def __getattribute__(self: nn.Module, attribute: str) -> Any:  # noqa: N807
        if attribute in _READS and (recorder := getattr(_ACTIVE, "recorder", None)) is not None:
            recorder.read(self, attribute, sys._getframe(1))
        return object.__getattribute__(self, attribute)

    def __getattr__(self: nn.Module, attribute: str) -> Any:  # noqa: N807
        return nn.Module.__getattr__(self, attribute)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        recorder = getattr(_ACTIVE, "recorder", None)
        if recorder is None:
            return cls.forward(self, *args, **kwargs)
        recorder.inside.append(id(self))
        try:
            return cls.forward(self, *args, **kwargs)
        finally:
            recorder.inside.pop()

    body = {"__getattribute__": __getattribute__, "__getattr__": __getattr__, "forward": forward}
    return type(cls.__name__, (cls,), body)


def static_reads(view: nn.Module) -> dict[str, str]:
    """Layer name to reason, from the source of the classes in `view`.

    Finds ``self.child.weight`` (and the like) in methods that run the model.
    """
    reads: dict[str, str] = {}
    paths = {name for name, _ in surgery.named_modules(view)}
    for name, module in surgery.named_modules(view):
        if is_registered(module) or isinstance(module, UnpackedAttention):
            continue
        for child, attribute in sorted(_reads_in_source(cast(Any, type(module))), reverse=True):
            child = f"{child}.in_proj" if attribute == "in_proj_weight" else child
            pattern = f"{name}.{child}" if name else child
            reason = f"its {attribute} is read by {type(module).__name__} (found in its source)"
            for path in paths if "*" in pattern else {pattern} & paths:
                if fnmatchcase(path, pattern):
                    reads.setdefault(path, reason)
    return reads


@cache
def _reads_in_source(cls: Any) -> frozenset[tuple[str, str]]:
    """(child, attribute) pairs that methods of `cls` read as ``self.child.attribute``."""
    trees = {name: tree for name, member in _members(cls).items() if (tree := _parsed(member))}
    run = {name for name in trees if not any(word in name for word in _SETUP)}
    reached = {node.attr for name in run for node in ast.walk(trees[name])
               if isinstance(node, ast.Attribute)}  # fmt: skip
    used = [tree for name, tree in trees.items() if name in run | reached]
    return frozenset(pair for tree in used for pair in _attribute_chains(tree))


def _members(cls: Any) -> dict[str, Any]:
    """What a class defines beyond `nn.Module`, by name."""
    bases = [base for base in cls.__mro__ if base not in nn.Module.__mro__]
    return {name: member for base in reversed(bases) for name, member in vars(base).items()}


def _parsed(member: Any) -> ast.FunctionDef | None:
    """The source of a method or property; None where there is none."""
    for wrapper, inner in ((property, "fget"), (cached_property, "func")):
        member = getattr(member, inner) if isinstance(member, wrapper) else member
    member = getattr(member, "__func__", member)  # static and class methods
    if not inspect.isfunction(member):
        return None
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(member))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) and tree.args.args else None


def _attribute_chains(tree: ast.FunctionDef) -> Iterable[tuple[str, str]]:
    """``self.a[0].b.weight`` as ("a.*.b", "weight"); reads through local names are not seen."""
    receiver = tree.args.args[0].arg
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and node.attr in _READS):
            continue
        parts: list[str] = []
        owner = node.value
        while isinstance(owner, (ast.Attribute, ast.Subscript)):
            parts.append(owner.attr if isinstance(owner, ast.Attribute) else "*")
            owner = owner.value
        if parts and isinstance(owner, ast.Name) and owner.id == receiver:
            yield ".".join(reversed(parts)), node.attr

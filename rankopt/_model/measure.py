"""Counting parameters, bytes and multiply-accumulates of a model."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy as shallow_copy
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from rankopt._model import surgery
from rankopt._utils.parallel import for_each
from rankopt.errors import ModelError

__all__ = [
    "call",
    "check_inputs",
    "copied",
    "count_macs",
    "count_memory",
    "count_params",
    "current_device",
    "dense_parts",
    "evaluation",
    "first_argument",
    "no_autocast",
    "outside_inference_mode",
    "preserve_rng",
    "state_shapes",
    "structure_digest",
    "tensor_digest",
    "tensors_in",
    "to_device",
    "weights_digest",
    "with_tensors",
]

P = ParamSpec("P")
R = TypeVar("R")


def count_params(model: nn.Module) -> int:
    """Elements of the unique parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_memory(model: nn.Module) -> int:
    """Bytes of the unique parameters and buffers."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(p.numel() * p.element_size() for t in tensors for p in dense_parts(t.detach()))


def _sdpa_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """2 FLOPs per multiply-accumulate of QKᵀ and of its product with V; arguments are shapes."""
    batch, heads, length, width = query
    return int(2 * batch * heads * length * key[-2] * (width + value[-1]))


def _rows_times_flops(entering: Any, weights: Iterable[Any]) -> int:
    """2 FLOPs per multiply-accumulate of every row, [..., width], with every matrix; of shapes."""
    matrices = (shape for shape in weights if len(shape) > 1)  # the rest are biases
    return int(2 * math.prod(entering[:-1]) * sum(map(math.prod, matrices)))


def _mkldnn_lstm_flops(entering: Any, to_gates: Any, recurrent: Any, *_: Any, **__: Any) -> int:
    return _rows_times_flops(entering, [to_gates, recurrent])


def _cudnn_rnn_flops(entering: Any, weights: Any, *_: Any, **__: Any) -> int:
    return _rows_times_flops(entering, weights)


def _bilinear_flops(first: Any, weight: Any, *_: Any, **__: Any) -> int:
    return _rows_times_flops(first, [weight])


def count_macs(model: nn.Module, example_inputs: Any) -> int:
    """Multiply-accumulates of conv, linear, recurrent and attention products of one forward call.

    The model runs once as it is (mode, device); fused attention kernels of
    unpacked models are not visible, so pass an unpacked model.
    """
    # Imported late: it pulls in torch's decomposition tables, 0.3 s.
    from torch.utils.flop_counter import FlopCounterMode

    aten = torch.ops.aten
    fused = {
        aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops,
        aten.mkldnn_rnn_layer: _mkldnn_lstm_flops,
        aten._cudnn_rnn: _cudnn_rnn_flops,  # all layers and directions in one call
        aten._trilinear: _bilinear_flops,
    }
    counter = FlopCounterMode(display=False, custom_mapping=fused)
    with counter, torch.no_grad():
        call(model, example_inputs)
    return int(counter.get_total_flops()) // 2


def call(model: Callable[..., Any], example_inputs: Any, *, copy: bool = True) -> Any:
    """Call `model` with a tensor, a tuple (positional) or a mapping (keywords).

    It gets a copy, for a forward may write into its inputs; `copy=False` is for what is timed.
    """
    if copy:
        example_inputs = copied(example_inputs)
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a layer was called with, by position or by keyword."""
    first: Tensor = next(iter((*args, *kwargs.values())))
    return first


def to_device(inputs: Any, device: torch.device) -> Any:
    """`inputs` with every tensor on `device`."""

    def moved(tensor: Tensor) -> Tensor:
        there = tensor.to(device)
        # What was made in inference mode cannot take part in a training step.
        return there.clone() if there.is_inference() else there

    return with_tensors(inputs, moved)


def copied(inputs: Any) -> Any:
    """`inputs` with tensors of their own: a forward may write into those it is given."""
    return with_tensors(inputs, lambda t: t.detach().clone().requires_grad_(t.requires_grad))


def with_tensors(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`inputs` with every tensor changed, inside tuples, lists, mappings and dataclasses too.

    One that comes twice is changed once: attention tells self-attention by that.
    """
    made: dict[int, Tensor] = {}

    def changed(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in made:
                made[id(value)] = change(value)
            return made[id(value)]
        if isinstance(value, Mapping):
            return _filled(value, {key: changed(entry) for key, entry in value.items()})
        if isinstance(value, (tuple, list)):
            entries = [changed(entry) for entry in value]
            make = getattr(value, "_make", type(value))  # a named tuple's
            return make(entries)
        if _is_record(value):
            filled = shallow_copy(value)
            for field in fields(value):  # set aside of a frozen class's own way
                object.__setattr__(filled, field.name, changed(getattr(value, field.name)))
            return filled
        return value

    return changed(inputs)


def _is_record(value: Any) -> bool:
    """Whether a value is an instance of a dataclass."""
    return is_dataclass(value) and not isinstance(value, type)


def _filled(mapping: Mapping[Any, Any], entries: dict[Any, Any]) -> Any:
    """`entries` in a mapping of the same type: a forward may read them as attributes."""
    if type(mapping) is dict or not isinstance(mapping, MutableMapping):
        return entries
    filled = shallow_copy(mapping)
    for key, entry in entries.items():
        filled[key] = entry
    return filled


def tensors_in(inputs: Any) -> Iterator[Tensor]:
    """Every tensor inside nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, Mapping):
        for value in inputs.values():
            yield from tensors_in(value)
    elif isinstance(inputs, (tuple, list)):
        for value in inputs:
            yield from tensors_in(value)
    elif _is_record(inputs):
        for field in fields(inputs):
            yield from tensors_in(getattr(inputs, field.name))


def check_inputs(example_inputs: Any) -> None:
    """Raise `ModelError` for inputs rankopt cannot hand to a model."""
    if not isinstance(example_inputs, (Tensor, tuple, list, Mapping)):
        raise ModelError(
            f"example_inputs is a {type(example_inputs).__name__}; expected a tensor, a tuple of "
            "positional arguments or a dict of keyword arguments"
        )
    first = next((tensor for tensor in tensors_in(example_inputs) if tensor.dim()), None)
    if first is not None and first.numel() == 0:
        raise ModelError(
            f"example_inputs: a tensor of shape {list(first.shape)} holds no sample to run the "
            "model on; give at least one"
        )


@contextmanager
def evaluation(*models: nn.Module) -> Iterator[None]:
    """Eval mode for `models`; every submodule's own mode comes back after."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes:
            # A train() of its own may do more than set a flag: merge adapters, say.
            if type(module).train is not nn.Module.train and module.training != mode:
                module.train(mode)
        for module, mode in modes:
            module.training = mode


def current_device(device: torch.device | str) -> AbstractContextManager[Any]:
    """Make a CUDA device the current one: streams, events and graphs are of that."""
    chosen = torch.device(device)
    return torch.cuda.device(chosen) if chosen.type == "cuda" else nullcontext()


def outside_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Call `function` with `torch.inference_mode` off: what it makes is to be trained."""

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False):
            return function(*args, **kwargs)

    return called


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Leave the global generators of torch, NumPy and Python as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    cpu = torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)


@contextmanager
def no_autocast() -> Iterator[None]:
    """Leave the caller's autocast, if any, and keep no weights in bfloat16 between uses.

    torch drops cached weights at the end of the outermost autocast only: inside a caller's, even
    one that is not enabled, every step of a training would see the weights of the first.
    """
    with ExitStack() as stack:
        for device in ("cpu", "cuda", "xpu", "mps"):
            if device == "cpu" or torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False, cache_enabled=False))
        yield


@contextmanager
def uncached_autocast() -> Iterator[None]:
    """Run the model as the caller's autocast, if any, does, but keep no weights between uses.

    Weights change between two looks at a model's outputs; see `no_autocast`.
    """
    cached = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def tensor_digest(tensor: Tensor) -> bytes:
    """SHA-256 of a tensor's dtype, shape and values, whatever its strides or device."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    for part in dense_parts(tensor.detach()):
        flat = part.to("cpu").contiguous().view(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.digest()


def dense_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The strided tensors that a tensor is stored as: indices and values of a sparse one."""
    if tensor.layout == torch.sparse_coo:
        whole = tensor.coalesce()
        return whole.indices(), whole.values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return (tensor,)


def state_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of parameters and persistent buffers, but of no extra state: that may grow."""
    named = ((name, tuple(tensor.shape)) for name, tensor in _state(model))
    return {name: shape for name, shape in named if not surgery.is_extra_state(name)}


def structure_digest(model: nn.Module) -> str:
    """Digest of `state_shapes`."""
    digest = hashlib.sha256()
    for name, shape in state_shapes(model).items():
        digest.update(f"{name}:{shape};".encode())
    return digest.hexdigest()[:32]


def weights_digest(model: nn.Module) -> str:
    """Digest of the values of parameters and persistent buffers."""
    named = list(_state(model))
    unique = list({id(tensor): tensor for _, tensor in named}.values())
    device = surgery.device_of(model)
    values = {id(t): value for t, value in for_each(tensor_digest, unique, device=device)}
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(name.encode() + values[id(tensor)])
    return digest.hexdigest()[:32]


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    plain = surgery.unwrap(model)
    state = plain.state_dict(keep_vars=True)
    for name, value in state.items():
        if isinstance(value, Tensor):
            yield surgery.normalised(name), value

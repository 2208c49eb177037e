"""Compressed models for other runtimes: torch.export and ONNX, with BatchNorm merged."""

from __future__ import annotations

import inspect
import os
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from rankopt._model import measure, surgery
from rankopt._model.inputs import tensors_in
from rankopt._model.kinds import attached
from rankopt._utils.files import atomic_paths
from rankopt.errors import ExportError, MissingDependency

__all__ = ["merge_norms", "to_onnx", "to_program"]

BATCH: Final[Mapping[int, str]] = {0: "batch"}
# Largest difference to torch, as a share of the largest output: runtimes sum in other orders.
TOLERANCE: Final = 1e-4
HALF_TOLERANCE: Final = 2e-2
# Sets of sizes on which a written file is run.
CHECKS: Final = 3
_CONVS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def to_program(
    model: nn.Module,
    example_inputs: Any,
    *,
    dynamic: Mapping[int, str] = BATCH,
    merge: bool = True,
) -> torch.export.ExportedProgram:
    """The model as a `torch.export` program, in eval mode.

    Args:
        model: Any model; not changed.
        example_inputs: A tensor, a tuple (positional) or a mapping (keywords).
        dynamic: Dimensions of the input tensors whose size may vary, counted from 0, and what
            they are. A size of 1 beside larger ones is shared by all samples, and stays; sizes
            of vectors count beside vectors only.
        merge: Whether to merge BatchNorm into the convolutions before it, see `merge_norms`.

    Raises:
        ExportError: torch.export cannot capture the model, with its reason.
        ValueError: A dimension of `dynamic` is none.

    Example:
        >>> program = to_program(nn.Sequential(nn.Linear(4, 2)), torch.zeros(1, 4))
        >>> tuple(program.module()(torch.zeros(7, 4)).shape)
        (7, 2)
    """
    measure.check_inputs(example_inputs)
    for dim in dynamic:
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 0:
            raise ValueError(
                f"dynamic={dict(dynamic)!r}: got dimension {dim!r}; dimensions are integers of at "
                "least 0, count from the first"
            )
    plain = merge_norms(model, example_inputs) if merge else surgery.unwrap(model)
    with measure.evaluation(plain):
        return _captured(plain, example_inputs, dynamic)


def to_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    dynamic: Mapping[int, str] = BATCH,
    merge: bool = True,
    check: bool | None = None,
) -> None:
    """Write the model as an ONNX file, and run that against torch.

    Args:
        model: Any model; not changed.
        path: The file; appears only when complete, and checked. Weights above 1.5 GB lie
            beside it, in ``PATH.data``.
        example_inputs: See `to_program`.
        dynamic: See `to_program`.
        merge: See `to_program`.
        check: Whether to compare with torch on the CPU in onnxruntime, in several sizes, on
            random numbers and the example's own integers; None does where onnxruntime is
            installed and can: it has no bfloat16, and few kernels of float64.

    Raises:
        MissingDependency: onnx or onnxscript is not installed, or onnxruntime for `check`.
        ExportError: The model cannot be exported, the file computes something else, or
            onnxruntime cannot run it.
        ValueError: See `to_program`.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingDependency("to_onnx needs onnx; pip install 'rankopt[export]'") from error
    if check is None and any(t.dtype == torch.bfloat16 for t in _tensors(model, example_inputs)):
        check = False
    runtime = _runtime(check)
    program = to_program(model, example_inputs, dynamic=dynamic, merge=merge)
    try:
        with _torch_warns_less():
            converted = torch.onnx.export(program, dynamo=True, verbose=False)
    except Exception as error:
        raise ExportError(f"{type(model).__name__} cannot be written as ONNX: {error}") from error
    assert converted is not None
    with atomic_paths(path) as temporary:  # large weights come in a file of their own
        converted.save(str(temporary))
        if runtime is not None:
            try:
                _check(runtime, temporary, model, _widened(example_inputs, dynamic), dynamic)
            except ExportError as error:
                if check or type(error.__cause__).__name__ != "NotImplemented":
                    raise


def merge_norms(model: nn.Module, example_inputs: Any) -> nn.Module:
    """A copy in which BatchNorm is part of the convolution before it, for inference.

    Only where a convolution's output goes to that norm and nowhere else, and both are used
    once; which those are is read off the graph torch.export sees.

    Args:
        model: Any model; not changed.
        example_inputs: See `to_program`.

    Returns:
        A new model in eval mode; merged norms are `nn.Identity`.

    Raises:
        ExportError: torch.export cannot capture the model.

    Example:
        >>> block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> merge_norms(block, torch.zeros(2, 3, 5, 5))[1]
        Identity()
    """
    measure.check_inputs(example_inputs)
    result = surgery.clone(surgery.unwrap(model)).eval()
    modules: dict[str, Any] = dict(surgery.named_modules(result))
    program = _captured(result, example_inputs, {})
    for conv_name, norm_name in _pairs(program):
        if conv_name not in modules or norm_name not in modules:
            continue
        conv, norm = modules[conv_name], modules[norm_name]
        if type(conv) not in _CONVS or type(norm) not in _NORMS or norm.running_mean is None:
            continue
        if attached(conv) or attached(norm):  # a hook sees, or changes, what is between them
            continue
        merged: nn.Module = nn.utils.fuse_conv_bn_eval(conv, norm)
        surgery.replace(result, {conv: merged, norm: nn.Identity()})
    return result


def _captured(
    model: nn.Module, inputs: Any, dynamic: Mapping[int, str]
) -> torch.export.ExportedProgram:
    inputs = measure.to_device(_widened(inputs, dynamic), surgery.device_of(model))
    shapes = _dynamic_shapes(inputs, dynamic)
    keywords = isinstance(inputs, Mapping)
    if not keywords and not isinstance(inputs, (tuple, list)):
        inputs, shapes = (inputs,), (shapes,)
    args, named = ((), dict(inputs)) if keywords else (tuple(inputs), None)
    shapes = _by_parameter(model, (), shapes) if keywords else _by_parameter(model, shapes, {})
    try:
        with torch.no_grad(), measure.preserve_rng(), _torch_warns_less():
            return torch.export.export(
                model,
                args,
                named,
                dynamic_shapes=shapes,
            )
    except Exception as error:
        text = str(error).strip().splitlines()
        advice = ""
        if "DynamicCache" in str(error) or "EncoderDecoderCache" in str(error):
            advice = "; keep its cache out of the outputs: give the inputs with use_cache=False"
        raise ExportError(
            f"torch.export cannot capture {type(model).__name__}: "
            f"{text[0] if text else error!r}{advice}"
        ) from error


def _by_parameter(model: nn.Module, args: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """Shapes by the parameters of forward, as torch.export takes them: nested for ``*args``."""
    try:
        return inspect.signature(model.forward).bind(*args, **named).arguments
    except TypeError:  # it is the call that fails, and says why
        return dict(named) or tuple(args)


def _dynamic_shapes(inputs: Any, dynamic: Mapping[int, str]) -> Any:
    if isinstance(inputs, Tensor):
        return dict.fromkeys(_varying(inputs, dynamic), torch.export.Dim.DYNAMIC)
    if isinstance(inputs, Mapping):
        return {key: _dynamic_shapes(value, dynamic) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        make = getattr(inputs, "_make", type(inputs))  # a named tuple's
        return make([_dynamic_shapes(value, dynamic) for value in inputs])
    return None


def _varying(tensor: Tensor, dynamic: Iterable[int]) -> list[int]:
    """The dynamic dimensions of a tensor, of inputs that are `_widened`."""
    return [dim for dim in dynamic if dim < tensor.dim() and tensor.shape[dim] != 1]


def _widened(inputs: Any, dynamic: Iterable[int]) -> Any:
    """Sizes of 1 in dynamic dimensions become 2: torch.export takes a 1 for a constant.

    But where other tensors have more: what has one row for all samples keeps it. A vector
    beside tensors of more dimensions may be anything, and says nothing about them.
    """
    shapes = [tensor.shape for tensor in tensors_in(inputs)]

    def wider(tensor: Tensor) -> Tensor:
        beside = [shape for shape in shapes if len(shape) >= min(tensor.dim(), 2)]
        single = [
            dim for dim in dynamic if all(shape[dim : dim + 1] in ((), (1,)) for shape in beside)
        ]
        return _grown(tensor, dict.fromkeys(single, 1))

    return measure.with_tensors(inputs, wider)


def _grown(
    tensor: Tensor, more: Mapping[int, int], generator: torch.Generator | None = None
) -> Tensor:
    """A tensor with `more` places along dimensions; of random numbers, given a generator.

    Integers and booleans may be masks, which must not become empty, or ids: they stay those of
    the example, repeated in place, and in another order along the first dimension.
    """
    for dim, extra in more.items():
        size = tensor.shape[dim] if dim < tensor.dim() else 0
        if size and (size > 1 or generator is None):
            places = torch.arange(size + extra, device=tensor.device) * size // (size + extra)
            tensor = tensor.index_select(dim, places if dim else places.flip(0))
    if generator is None or not tensor.is_floating_point():
        return tensor
    return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)


def _pairs(program: torch.export.ExportedProgram) -> Iterator[tuple[str, str]]:
    """(convolution, norm) names where nothing else reads what is between them or in them."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for node in program.graph.nodes:
        if not str(node.target).startswith("aten.batch_norm"):
            continue
        source = node.args[0]
        if not str(source.target).startswith("aten.conv") or len(source.users) > 1:
            continue
        read = [n for n in (*source.args[1:3], *node.args[1:5]) if isinstance(n, torch.fx.Node)]
        weights = (source.args[1], node.args[3])  # of the norm the running mean, if it has one
        if all(len(n.users) == 1 for n in read) and all(
            weight in read and weight.name in names for weight in weights
        ):
            conv, norm = (surgery.normalised(names[w.name]).rpartition(".")[0] for w in weights)
            training = bool(node.args[5])
            if _called(source) == conv and _called(node) == norm and not training:
                yield conv, norm


def _called(node: torch.fx.Node) -> str | None:
    """The module whose own call a node is of; a function of its tensors is another module's."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return surgery.normalised(stack[-1][0]) if stack else None


def _runtime(check: bool | None) -> Any:
    if check is False:
        return None
    try:
        import onnxruntime
    except ImportError as error:
        if check is None:
            return None
        raise MissingDependency(
            "check=True needs onnxruntime; pip install 'rankopt[export]'"
        ) from error
    return onnxruntime


def _check(
    runtime: Any, path: Any, model: nn.Module, inputs: Any, dynamic: Mapping[int, str]
) -> None:
    """Run the file on inputs of several sizes and compare with torch."""
    with _told(model):
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    plain = surgery.clone(surgery.unwrap(model)).cpu()  # a GPU may round its products to TF32
    half = any(t.dtype == torch.float16 for t in _tensors(plain, inputs))
    tolerance = HALF_TOLERANCE if half else TOLERANCE
    generator, sizes = torch.Generator().manual_seed(0), random.Random(0)
    for _ in range(CHECKS):
        grown = {dim: sizes.randint(1, 3) for dim in dynamic}
        fresh = measure.with_tensors(inputs, partial(_grown, more=grown, generator=generator))
        with torch.no_grad(), measure.preserve_rng(), measure.evaluation(plain):
            fresh = measure.to_device(fresh, torch.device("cpu"))
            wanted = [t.numpy() for t in tensors_in(measure.call(plain, fresh))]
        fed = {n: t.numpy() for n, t in zip(names, tensors_in(fresh), strict=True)}
        with _told(model):
            found = session.run(None, fed)
        for old, new in zip(wanted, found, strict=True):
            worst = _difference(old, new)
            exact = old.dtype.kind != "f"
            scale = 0 if exact else float(np.abs(old[np.isfinite(old)]).max(initial=1e-6))
            if not worst <= tolerance * scale:
                shapes = ", ".join(str(list(t.shape)) for t in tensors_in(fresh))
                raise ExportError(
                    f"the ONNX file computes something else than {type(plain).__name__}: on inputs "
                    f"of {shapes} outputs differ by up to {worst:.3g}; nothing was written"
                )


@contextmanager
def _told(model: nn.Module) -> Iterator[None]:
    """Turn what onnxruntime raises, which may be anything, into an `ExportError`."""
    try:
        yield
    except Exception as error:
        raise ExportError(
            f"onnxruntime cannot run the ONNX file of {type(model).__name__}: {error}; nothing was "
            "written; check=False writes it without a check"
        ) from error


def _difference(old: Any, new: Any) -> float:
    """The largest difference of two outputs; infinities and NaN in the same places are none."""
    if old.shape != new.shape:
        return np.inf
    old, new = old.astype(np.float64), new.astype(np.float64)
    equal = (old == new) | (np.isnan(old) & np.isnan(new))
    differences = np.subtract(old, new, out=np.zeros(old.shape), where=~equal)
    return float(np.abs(differences).max(initial=0))


def _tensors(model: nn.Module, inputs: Any) -> Iterator[Tensor]:
    """Everything whose dtype decides how exact the model is."""
    yield from model.parameters()
    yield from tensors_in(inputs)


@contextmanager
def _torch_warns_less() -> Iterator[None]:
    """Torch's exporter warns of deprecations in itself."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        yield

"""Whether modules of another class may take the places of layers: the model is run with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from rankopt._model import measure, surgery
from rankopt._model.measure import tensors_in

__all__ = ["irreplaceable"]

_BYPASSED: Final = "it is also called outside the module tree"
_ASKED: Final = "the outputs depend on its class or attributes, so a chain would change them"
# Share of an output's largest entry; parts compiled in half precision round otherwise.
ROUNDING: Final = 1e-2


def irreplaceable(view: nn.Module, names: Iterable[str], inputs: Any) -> dict[str, str]:
    """Layer name to why no chain can take its place.

    In copies of the model layers are wrapped as `nn.Sequential(layer)`, which computes the same:
    they must be called through the wrapper, and the outputs must stay.

    Args:
        view: A model that runs on the inputs; its buffers stay as they are.
        names: Of layers.
        inputs: A tensor, a tuple or a mapping.
    """
    names = list(names)
    if not names:
        return {}
    with torch.no_grad(), measure.evaluation(view):
        return _irreplaceable(view, names, inputs)


def _irreplaceable(view: nn.Module, names: list[str], inputs: Any) -> dict[str, str]:
    dense, _ = _outputs(view, (), inputs)
    reasons: dict[str, str] = {}

    def moves(wrapped: Sequence[str]) -> bool:
        try:
            outputs, bypassed = _outputs(view, wrapped, inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever the model does with a module it does not know
            return True
        reasons.update(dict.fromkeys(bypassed, _BYPASSED))
        return not _alike(dense, outputs)

    def search(wrapped: Sequence[str]) -> list[str]:
        """The layers that move the outputs, alone or only together."""
        if not wrapped or not moves(wrapped):
            return []
        half = len(wrapped) // 2
        apart = [*search(wrapped[:half]), *search(wrapped[half:])] if half else []
        return apart or list(wrapped)

    # Outputs that differ from run to run say nothing.
    if moves(names) and _alike(dense, _outputs(view, (), inputs)[0]):
        while found := search([name for name in names if name not in reasons]):
            reasons.update(dict.fromkeys(found, _ASKED))
    return reasons


def _outputs(view: nn.Module, wrapped: Iterable[str], inputs: Any) -> tuple[list[Tensor], set[str]]:
    """Outputs with the layers `wrapped`, and the names of those called past their wrapper."""
    model = surgery.clone(view, share=view.parameters())
    modules = dict(surgery.named_modules(model))
    calls: dict[str, int] = dict.fromkeys(wrapped, 0)
    wrappers = {}
    for name in calls:
        wrappers[modules[name]] = wrapper = nn.Sequential(modules[name])
        modules[name].register_forward_hook(_add(calls, name, 1))
        wrapper.register_forward_hook(_add(calls, name, -1))
        wrapper.training = False
    model = surgery.replace(model, wrappers)
    with measure.preserve_rng():
        made = measure.call(model, inputs)
    # Sparse and nested outputs cannot be compared: they say nothing.
    dense = (t for t in tensors_in(made) if t.layout == torch.strided and not t.is_nested)
    outputs = [tensor.clone() for tensor in dense]
    return outputs, {name for name, count in calls.items() if count}


def _add(calls: dict[str, int], name: str, step: int) -> Any:
    def hook(*_: Any) -> None:
        calls[name] += step

    return hook


def _alike(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Whether outputs are equal but for rounding."""
    if [t.shape for t in before] != [t.shape for t in after]:
        return False
    for old, new in zip(before, after, strict=True):
        if not old.is_floating_point() or not old.numel() or torch.equal(old, new):
            continue
        old, new = (t.float().nan_to_num() for t in (old, new))
        if (old - new).abs().max() > ROUNDING * old.abs().max():
            return False
    return True

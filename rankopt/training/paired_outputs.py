"""What layers of a model and of its teacher give for the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from rankopt._model import surgery
from rankopt._model.hooks import hooked
from rankopt._model.inputs import compared
from rankopt.errors import CalibrationError, warn

__all__ = ["PairedOutputs"]

# A module's name, which of its calls, whether it trains and whether there are gradients.
_Mode: TypeAlias = tuple[str, int, bool, bool]


class PairedOutputs:
    """Outputs of the modules of the same names in a model and in its teacher.

    They are compared as the modules gave them, though an operation in place may follow.

    Args:
        model: Any module.
        teacher: Its unpacked dense counterpart.
        names: Modules to watch; those missing from either are left out.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, names: Iterable[str]) -> None:
        self.model, self.teacher = model, teacher
        ours = dict(surgery.named_modules(surgery.unwrap(model)))
        theirs = dict(surgery.named_modules(teacher))
        self.names = [name for name in names if name in ours and name in theirs]
        taught = _Outputs()
        self._ours = ours
        self._seen = (_Outputs(like=taught), taught)
        self._watched = [(ours, self._seen[0]), (theirs, taught)]
        self._hooks = ExitStack()
        self._checked = False
        self.watching = False  # whether outputs are being stored

    def __enter__(self) -> PairedOutputs:
        handles = (
            modules[name].register_forward_hook(seen.hook(name))
            for modules, seen in self._watched
            for name in self.names
        )
        self._hooks.enter_context(hooked(handles))
        self.watching = True
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()
        self.watching = False
        self.forget()

    def forget(self) -> None:
        """Before a forward of the teacher, and then of the model: layers may not run in each."""
        for seen in self._seen:
            seen.clear()

    def pairs(self) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """By name (the teacher's output, the model's) of each call in both models' last pass.

        Where a model routes samples by their values, a layer may have had others in the
        teacher, or other calls; such are left out.
        """
        ours, theirs = (seen.found() for seen in self._seen)
        found = {}
        for name in self.names:
            old, new = theirs.get(name, []), ours.get(name, [])
            if len(old) != len(new):
                continue
            pairs = zip(old, new, strict=True)
            if calls := [pair for pair in pairs if not _rerouted(*pair)]:
                found[name] = calls
        return found

    def ran(self) -> bool:
        """Whether any of the model's layers reported an output since `forget`."""
        return bool(self._seen[0].found())

    def check_gradients(self, pairs: Mapping[str, Iterable[tuple[Tensor, Tensor]]]) -> None:
        """Of `pairs`, where the loss made of them has a gradient, at the first time.

        Warns:
            RankoptWarning: A layer trains, but its output has no gradient.
        """
        if self._checked:
            return
        self._checked = True
        for name, calls in pairs.items():
            trains = any(p.requires_grad for p in self._ours[name].parameters())
            if trains and not any(found.requires_grad for _, found in calls):
                warn(
                    f"layer {name} trains, but its output has no gradient to learn from the "
                    "teacher's by: it is computed under no_grad, as checkpointing does with "
                    "use_reentrant=True; use_reentrant=False keeps it"
                )
                return


class _Outputs:
    """What modules gave in the last forward pass, call by call.

    A copy is kept of an output that is then written into, such as by `nn.ReLU(inplace=True)`:
    in the first pass of every module, call and mode of all outputs, later of those alone. Compiled
    models copy them all.

    Args:
        like: Of the other model, in which a pass has just ended: a call more than a module
            had there is the first of another pass, as where the model is evaluated. Without
            it, a pass ends by `clear`.
    """

    def __init__(self, like: _Outputs | None = None) -> None:
        self._like = like
        self._kept: dict[str, list[Tensor]] = {}
        # The output itself with its version, of those copied to find out whether it changes.
        self._tried: dict[_Mode, tuple[Tensor, int]] = {}
        self._written: dict[_Mode, bool] = {}

    def hook(self, name: str) -> Callable[..., None]:
        """To be registered with a module; keeps its output under `name`."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            with suppress(CalibrationError):  # it may return no tensor of floats
                found = compared(output)
                before = self._calls(name)
                mode = (name, len(before), module.training, torch.is_grad_enabled())
                # Inference tensors have no version; the compiler would guard every tensor kept.
                versioned = not (torch.compiler.is_compiling() or found.is_inference())
                if versioned and mode not in self._written:
                    self._tried[mode] = (found, found._version)
                kept = found.clone() if self._written.get(mode, True) else found
                self._kept[name] = [*before, kept]

        return hook

    def _calls(self, name: str) -> list[Tensor]:
        """Outputs of a module in this pass so far."""
        known = self._kept.get(name, [])
        if self._like is None or len(known) < len(self._like._kept.get(name, [])):
            return known
        return []

    def found(self) -> dict[str, list[Tensor]]:
        """Name to outputs."""
        for mode, (output, version) in self._tried.items():
            self._written[mode] = output._version != version
        self._tried.clear()
        return self._kept

    def clear(self) -> None:
        """Forget the outputs."""
        self._kept.clear()
        self._tried.clear()


def _rerouted(wanted: Tensor, found: Tensor) -> bool:
    """Whether two outputs differ in the number of rows alone."""
    old, new = wanted.shape, found.shape
    return old != new and old[1:] == new[1:] and len(old) > 1

"""What layers of a model and of its teacher give for the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from rankopt._model import surgery
from rankopt._model.hooks import hooked
from rankopt._model.inputs import compared
from rankopt.errors import CalibrationError

__all__ = ["PairedOutputs"]


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
        self._seen = (_Outputs(), _Outputs())
        self._watched = [(ours, self._seen[0]), (theirs, self._seen[1])]
        self._hooks = ExitStack()
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
        """Before a forward of both: layers may not run in each."""
        for seen in self._seen:
            seen.clear()

    def named_pairs(self) -> list[tuple[str, Tensor, Tensor]]:
        """(name, the teacher's output, the model's) of each that ran in both alike.

        Where a model routes samples by their values, a layer may have had others in the
        teacher; such pairs are left out.
        """
        ours, theirs = (seen.found() for seen in self._seen)
        both = [(n, theirs[n], ours[n]) for n in self.names if n in ours and n in theirs]
        return [pair for pair in both if not _rerouted(pair[1].shape, pair[2].shape)]

    def ran(self) -> bool:
        """Whether any of the model's layers reported an output since `forget`."""
        return bool(self._seen[0].found())

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """As `named_pairs`, without the names."""
        return [(wanted, found) for _, wanted, found in self.named_pairs()]


class _Outputs:
    """What modules gave in the last forward pass.

    A copy is kept of an output that is then written into, such as by `nn.ReLU(inplace=True)`:
    in the first pass of every module and mode of all outputs, later of those alone. Compiled
    models copy them all.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        # The output itself with its version, of those copied to find out whether it changes.
        self._tried: dict[tuple[str, bool, bool], tuple[Tensor, int]] = {}
        self._written: dict[tuple[str, bool, bool], bool] = {}

    def hook(self, name: str) -> Callable[..., None]:
        """To be registered with a module; keeps its output under `name`."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            with suppress(CalibrationError):  # it may return no tensor of floats
                found = compared(output)
                mode = (name, module.training, torch.is_grad_enabled())
                # Inference tensors have no version; the compiler would guard every tensor kept.
                versioned = not (torch.compiler.is_compiling() or found.is_inference())
                if versioned and mode not in self._written:
                    self._tried[mode] = (found, found._version)
                self._kept[name] = found.clone() if self._written.get(mode, True) else found

        return hook

    def found(self) -> dict[str, Tensor]:
        """Name to output."""
        for mode, (output, version) in self._tried.items():
            self._written[mode] = output._version != version
        self._tried.clear()
        return self._kept

    def clear(self) -> None:
        """Forget the outputs."""
        self._kept.clear()
        self._tried.clear()


def _rerouted(wanted: torch.Size, found: torch.Size) -> bool:
    """Whether two outputs differ in the number of rows alone."""
    return wanted != found and wanted[1:] == found[1:] and len(wanted) > 1

"""How a batch becomes the arguments of a model's forward, by its signature."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from rankopt._model import surgery
from rankopt._model.measure import tensors_in
from rankopt.errors import CalibrationError, warn

__all__ = ["Arguments", "misfit"]

# What batches of Hugging Face call them.
LABELS: Final = "labels"
# What they are called in other mappings.
_TARGETS: Final = (LABELS, "label", "target", "targets", "y")
_POSITIONAL: Final = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Arguments:
    """What a model's forward takes.

    Args:
        model: Its signature is read; one that cannot be read may take anything.

    Attributes:
        required: How many positional arguments it cannot do without.
        names: Its positional arguments; None where it takes any number.
    """

    def __init__(self, model: nn.Module) -> None:
        self.required = 1
        self.names: list[str] | None = None
        self._signature: inspect.Signature | None = None
        try:
            self._signature = inspect.signature(surgery.unwrap(model).forward)
        except (TypeError, ValueError):
            return
        parameters = self._signature.parameters.values()
        if not any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
            taken = [p for p in parameters if p.kind in _POSITIONAL]
            self.required = sum(p.default is inspect.Parameter.empty for p in taken)
            self.names = [p.name for p in taken]

    def without_labels(self, batch: Any, *, labelled: bool, name: str) -> Any:
        """A batch as `measure.call` takes it; see `rankopt._model.inputs.batches`."""
        if isinstance(batch, Mapping) and not self._requires_labels():
            return {key: value for key, value in batch.items() if key != LABELS}
        if isinstance(batch, (Tensor, Mapping)):
            return batch
        if not isinstance(batch, (tuple, list)) or not batch:
            raise CalibrationError(
                f"{name} yielded a {type(batch).__name__}; expected a tensor, a tuple, a list or "
                "a mapping of tensors"
            )
        names = self.names or []
        most = len(batch) if self.names is None else max(len(names), 1)
        if labelled and len(batch) > max(self.required, 1):
            batch = batch[:-1][:most]
        elif len(batch) > most:  # labels, indices and the like
            batch = batch[:most]
        elif len(batch) == 2 and self.required < 2 and _is_class_index(*batch):
            batch = batch[:1]
        elif (
            len(batch) == 2
            and self.required < 2
            and names
            and _may_be_labels(batch[0], batch[1], names[1])
        ):
            if names[1].lower() not in _TARGETS:
                warn(
                    f"the second of each pair that {name} yields has one entry per sample, so it "
                    "is taken for labels and left out; if it is meant for the optional argument "
                    f"{names[1]!r}, yield mappings {{{names[0]!r}: ..., {names[1]!r}: ...}}"
                )
            batch = batch[:1]
        return self.packed(batch)

    def packed(self, entries: Sequence[Any]) -> Any:
        """Positional arguments as `measure.call` takes them.

        A single tensor stands for itself; so does a mapping that forward takes as keywords, a
        tuple that it takes as arguments, and a list of all that it requires if that is several.
        Anything else is one argument, in a tuple.
        """
        if len(entries) != 1:
            return tuple(entries)
        (entry,) = entries
        spread = (
            isinstance(entry, Tensor)
            or (isinstance(entry, Mapping) and self._binds(**entry))
            or (isinstance(entry, tuple) and self._binds(*entry))
            or (isinstance(entry, list) and self.required > 1 and self._binds(*entry))
        )
        return entry if spread else (entry,)

    def _binds(self, *args: Any, **kwargs: Any) -> bool:
        if self._signature is None:
            return True
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError:
            return False
        return True

    def _requires_labels(self) -> bool:
        """Whether forward cannot do without the labels of a mapping; True if that is unknown."""
        if self._signature is None:
            return True
        parameters = self._signature.parameters
        found = parameters.get(LABELS)
        if found is None:  # taken, if at all, as one of many
            return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        return found.default is inspect.Parameter.empty

    def misfit(self, inputs: Any) -> str | None:
        """See `misfit`."""
        if self._signature is None:
            return None
        taken = f"forward takes ({', '.join(self._signature.parameters)})"
        if isinstance(inputs, Mapping):
            return None if self._binds(**inputs) else self._misnamed(inputs, taken)
        several = inputs if isinstance(inputs, (tuple, list)) else [inputs]
        if self._binds(*several):
            return None
        if self.names == []:
            first = next(iter(self._signature.parameters), "x")
            return f"{taken} by keyword only: map it, such as [{{{first!r}: b[0]}} for b in loader]"
        have = f"the batch has {len(several)}"
        return f"the entries of a tuple are passed as arguments: {taken}, {have}"

    def _misnamed(self, inputs: Mapping[Any, Any], taken: str) -> str:
        targets = [key for key in inputs if str(key).lower() in _TARGETS]
        keys = [*[key for key in inputs if key not in targets][:1], *targets[:1]]
        mapped = ", ".join(f"b[{key!r}]" for key in keys)
        mapped = f"({mapped})" if len(keys) > 1 else mapped
        whole = ", or [(b,) for b in loader] if it is one argument" if self._binds(inputs) else ""
        return (
            f"a mapping is passed as keyword arguments: {taken}, the batch has "
            f"{', '.join(map(str, inputs))}; map it, such as [{mapped} for b in loader]{whole}"
        )


def _is_class_index(first: Any, second: Any) -> bool:
    """Whether the second of a pair is, beyond doubt, an integer label for each sample."""
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        return False
    return second.dim() <= 1 and second.numel() == len(first) and not second.is_floating_point()


def _may_be_labels(first: Any, second: Any, name: str) -> bool:
    """Whether the second of a pair has an entry per sample and is no mask.

    Args:
        first: The input.
        second: What comes with it.
        name: Of the optional argument that it would be.
    """
    tokens = isinstance(first, Tensor) and not first.is_floating_point() and first.dim() > 1
    if tokens and isinstance(second, Tensor) and second.shape[:2] == first.shape[:2]:
        return False
    if isinstance(second, Tensor) and second.dtype == torch.bool and "mask" in name.lower():
        return False
    sizes = [len(tensor) for tensor in tensors_in(first) if tensor.dim()][:1]
    if isinstance(second, (tuple, list)) and [len(second)] == sizes:
        return True
    tensors = [t for t in tensors_in(second) if t.layout == torch.strided and t.dim()]
    return any([len(tensor)] == sizes for tensor in tensors)


def misfit(model: nn.Module, inputs: Any) -> str | None:
    """How a batch does not match the arguments of forward, and what to do; None where it does.

    Example:
        >>> misfit(nn.Linear(2, 2), (torch.zeros(1, 2), torch.zeros(1)))
        'the entries of a tuple are passed as arguments: forward takes (input), the batch has 2'
    """
    return Arguments(model).misfit(inputs)

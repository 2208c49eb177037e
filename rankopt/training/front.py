"""The front of a network: what a backward pass need not reach once nothing in it trains.

Reference: layers frozen from the input on as training ends, arXiv 1706.04983.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import nn

from rankopt._model import surgery
from rankopt.errors import ModelError

__all__ = ["check_fronts", "front_modules"]


def front_modules(model: nn.Module, last: str) -> dict[int, nn.Module]:
    """Every module up to and including `last`, in order of registration, by identity.

    The modules that contain `last` are among them, for the parameters of their own;
    one that is registered again after `last` is not.

    Raises:
        ModelError: The model has no such module, or nothing comes after it.
    """
    modules = list(surgery.named_modules(model))
    names = [name for name, _ in modules]
    inside = [at for at, name in enumerate(names) if f"{name}.".startswith(f"{last}.")]
    if not last or not inside:
        close = difflib.get_close_matches(last, names, 3) or [n for n in names[1:] if "." not in n]
        raise ModelError(
            f"front({last!r}): the model has no module of this name; it has {', '.join(close[:8])}"
        )
    end = inside[-1] + 1
    later = {id(module) for _, module in modules[end:]}
    if not later:
        raise ModelError(
            f"front({last!r}): this is the last module of the model, so nothing would train; name "
            "one before it"
        )
    return {id(module): module for _, module in modules[:end] if id(module) not in later}


def check_fronts(model: nn.Module, names: Iterable[str]) -> None:
    """Raise what `front_modules` will of a model that is yet to be decomposed.

    Inside a layer, which may become a chain or an attention of several projections, any name is
    taken for granted.

    Raises:
        ModelError: As by `front_modules`.
    """
    model = surgery.unwrap(model)
    modules = dict(surgery.named_modules(model))
    for name in sorted(names):
        known = name
        while known not in modules:
            known = known.rpartition(".")[0]
        layer = modules[known]
        is_layer = bool(layer._parameters) and (layer is not model or not layer._modules)
        if known == name or not is_layer:
            front_modules(model, name)

"""torchvision, importable next to a CPU-only torch."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any, Final

import torch

from rankopt.errors import MissingDependency

__all__ = ["import_torchvision"]

# torchvision registers fake kernels for these on import; wheels built against
# another torch do not load the library that defines them.
_SCHEMAS: Final = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[Any] = []  # a torch.library.Library lives as long as its handle


def import_torchvision() -> ModuleType:
    """torchvision, its models usable even where its compiled operators are not.

    PyPI's torchvision next to a CPU-only torch fails on import with "operator
    torchvision::nms does not exist"; only then the two schemas are declared.
    Detection operators stay unavailable.

    Raises:
        MissingDependency: torchvision is not installed.

    Example:
        >>> import_torchvision().__name__
        'torchvision'
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        raise MissingDependency(
            "torchvision is not installed; pip install 'rankopt[vision]'"
        ) from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _libraries.append(library)
    return importlib.import_module("torchvision")

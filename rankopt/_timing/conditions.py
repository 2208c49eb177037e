"""What times depend on besides what is run: hardware, versions, number formats."""

from __future__ import annotations

import json
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any, Final

import torch

from rankopt._model.probe import Call

__all__ = ["conditions", "tf32"]

# Environment variables by which a process gets another allocator, or the same with other habits:
# times differ by up to half (`benchmarks.allocator`).
_ALLOCATOR: Final = ("GLIBC_TUNABLES", "LD_PRELOAD", "THP_MEM_ALLOC_ENABLE")
_ALLOCATOR_PREFIXES: Final = ("MALLOC_", "MIMALLOC_", "TCMALLOC_")


def conditions(
    device: torch.device,
    call: Call | None,
    mode: str,
    *,
    cuda_graph: bool = False,
    compile: bool = False,
    clock: str = "wall",
) -> dict[str, str]:
    """The circumstances of a timing, as the cache stores them."""
    settings: dict[str, Any] = {"clock": clock, "cuda_graph": cuda_graph}
    if compile:
        settings["compile"] = True
    if call is not None and call.autocast is not None:
        settings["autocast"] = f"torch.{call.autocast}"
    elif call is None and torch.is_autocast_enabled(device.type):
        settings["autocast"] = str(torch.get_autocast_dtype(device.type))
    if device.type == "cpu":
        settings |= _allocator() | _kernels()
    if device.type == "cuda":
        if torch.backends.cudnn.deterministic:
            settings["deterministic"] = True
        settings["tf32"] = tf32()
        settings["benchmark"] = torch.backends.cudnn.benchmark
    return {
        "device": _device_name(device),
        "torch": torch.__version__,
        "dtype": "?" if call is None else call.dtype,
        "memory_format": "?" if call is None else call.memory_format,
        "threads": str(torch.get_num_threads()),
        "mode": mode,
        "settings": json.dumps(settings, sort_keys=True),
    }


def tf32() -> list[bool | str]:
    """Whether products and convolutions of float32 may be rounded to TF32 first."""
    try:
        return [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32]
    except RuntimeError:  # set by its newer name, which the older one then refuses to tell
        precise = torch.backends.cuda.matmul.fp32_precision
        conv: Any = torch.backends.cudnn
        return [precise, conv.conv.fp32_precision]


def _allocator() -> dict[str, str]:
    """What the environment says of the allocator; nothing where it says nothing."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in _ALLOCATOR or name.startswith(_ALLOCATOR_PREFIXES)
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return f"cuda {name}, CUDA {torch.version.cuda}, driver {_cuda_driver()}"
    if device.type != "cpu":
        return f"{device.type} {platform.machine()}"
    return f"cpu {_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}"


def _kernels() -> dict[str, Any]:
    """What chooses other kernels than usual on a CPU."""
    found: dict[str, Any] = {}
    if not torch.backends.mkldnn.enabled:
        found["mkldnn"] = False
    if (precision := torch.get_float32_matmul_precision()) != "highest":
        found["matmul"] = precision
    return found


def _cuda_driver() -> str:
    version = getattr(torch._C, "_cuda_getDriverVersion", None)
    return str(version()) if version else "?"


@cache
def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()

"""A device of its own for every worker of a machine, and turns at timing.

Claims are locks on files that the kernel drops when a process ends, however it ends: a
device is free again the moment its worker is gone, and nothing has to be cleaned up.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from rankopt._timing.profile_store import cache_folder
from rankopt._utils.locks import lock, turn
from rankopt.errors import RankoptError, warn

__all__ = ["AUTO", "Device", "available_devices", "claim_device", "opening_lock", "timing_lock"]

AUTO: Final = "auto"


@dataclass(frozen=True)
class Device:
    """An accelerator of this machine.

    Args:
        name: As torch calls it in this process, such as ``cuda:1``.
        identity: The same in every process, whatever ``CUDA_VISIBLE_DEVICES`` hides.
    """

    name: str
    identity: str


def available_devices() -> tuple[Device, ...]:
    """The CUDA devices that this process sees."""
    if not torch.cuda.is_available():
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append(Device(f"cuda:{index}", str(getattr(facts, "uuid", f"cuda:{index}"))))
    return tuple(found)


@contextlib.contextmanager
def claim_device(
    wanted: str = AUTO,
    *,
    share: bool = False,
    threads: int | None = None,
    devices: Sequence[Device] | None = None,
) -> Iterator[torch.device]:
    """Yield a device that no other claim of this user and machine holds, until the block ends.

    The CPU is never exclusive: several workers on it should say how many `threads` each
    may use, and then get cores of their own as long as there are enough.

    Args:
        wanted: ``auto`` for a free CUDA device where there are any, else the CPU; or a
            name such as ``cuda:1`` or ``cpu``.
        share: Whether devices that others hold will do, where none is free.
        threads: How many torch may use, pinned to as many free cores (Linux) and restored
            at the end; None leaves both alone.
        devices: To choose from; None for the CUDA devices of this process.

    Raises:
        RankoptError: There is no such device, or others hold what there is.

    Example:
        >>> with rankopt.claim_device("cpu") as device:
        ...     print(device)
        cpu
    """
    if threads is not None and (isinstance(threads, bool) or threads < 1):
        raise RankoptError(f"threads={threads!r}: expected at least 1")
    known = available_devices() if devices is None else tuple(devices)
    with contextlib.ExitStack() as held:
        chosen = _chosen(wanted, known, held, share=share)
        if threads is not None:
            held.enter_context(_threads(threads))
        yield chosen


def _chosen(
    wanted: str, known: Sequence[Device], held: contextlib.ExitStack, *, share: bool
) -> torch.device:
    if wanted == "cpu" or (wanted == AUTO and not known):
        return torch.device("cpu")
    name = "cuda:0" if wanted == "cuda" else wanted
    fitting = [device for device in known if name in (AUTO, device.name)]
    if not fitting:
        have = ", ".join(device.name for device in known) or "no CUDA device"
        raise RankoptError(f"device {wanted!r}: this machine has {have}; expected auto or cpu too")
    for device in fitting:
        if _try(f"device-{device.identity}", held):
            return torch.device(device.name)
    if not share:
        names = ", ".join(device.name for device in fitting)
        raise RankoptError(
            f"device {wanted!r}: {names} {'is' if len(fitting) == 1 else 'are'} held by other "
            "workers; wait for them, or share it (share=True)"
        )
    return torch.device(fitting[os.getpid() % len(fitting)].name)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads, on free cores if there are enough."""
    before, cores = torch.get_num_threads(), set[int]()
    with contextlib.ExitStack() as held:
        if hasattr(os, "sched_setaffinity"):
            allowed = os.sched_getaffinity(0)
            for core in sorted(allowed):
                if len(cores) < count and _try(f"core-{core}", held):
                    cores.add(core)
            if len(cores) == count:
                held.callback(os.sched_setaffinity, 0, allowed)
                os.sched_setaffinity(0, cores)
            else:
                held.close()  # leave them to workers that need fewer
        held.callback(torch.set_num_threads, before)
        torch.set_num_threads(count)
        yield


def timing_lock() -> contextlib.AbstractContextManager[None]:
    """Hold until the block ends what only one process of a machine has at a time."""
    try:
        return turn(_opened("timing"))
    except RankoptError as error:
        warn(f"{error}; models are timed without waiting for other processes that time")
        return contextlib.nullcontext()


def opening_lock(where: str, name: str) -> contextlib.AbstractContextManager[None]:
    """Let one process of a machine at a time make a study and queue what it begins with.

    Args:
        where: The storage, in words.
        name: Of the study.
    """
    place = where if "://" in where else str(Path(where).absolute())
    digest = hashlib.sha256(f"{place} {name}".encode()).hexdigest()[:16]
    try:
        return turn(_opened(f"study-{digest}"))
    except RankoptError:  # no folder to lock in: at worst, plans are queued twice
        return contextlib.nullcontext()


def _try(name: str, held: contextlib.ExitStack) -> bool:
    """Lock a name if nobody has it, until `held` ends."""
    handle = _opened(name)
    if not lock(handle, wait=False):
        os.close(handle)
        return False
    held.callback(os.close, handle)
    return True


def _opened(name: str) -> int:
    """The file to lock; the host is part of its name, for home folders are shared."""
    folder = Path(cache_folder()) / "claims"
    safe = re.sub(r"[^\w.-]", "_", f"{platform.node()}-{name}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder / safe, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise RankoptError(
            f"cannot claim {name}: {folder}: {error.strerror or error}; set RANKOPT_CACHE to a "
            "folder that is writable"
        ) from error

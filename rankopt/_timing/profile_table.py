"""ProfileTable: how long a layer's chains take, measured once and remembered.

A time depends on shapes, not on values, so layers are timed alone with random weights,
and equal layers share one measurement. Chains run interleaved with the dense layer, and
what is kept are the paired times of each round.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from rankopt._decompositions import base
from rankopt._model import measure
from rankopt._model.layers import Layer
from rankopt._model.probe import Call
from rankopt._timing.conditions import conditions
from rankopt._timing.latency import (
    MAX_WARMUP_CALLS,
    MODES,
    Clock,
    Mode,
    Timings,
    process_ms,
    runner,
    time_interleaved,
)
from rankopt._timing.layer_time import DENSE, Chain, LayerTime
from rankopt._timing.profile_store import FILE_NAME, ProfileStore, cache_folder
from rankopt.errors import LayerError

__all__ = ["ProfileTable", "check_table"]

ROUNDS: Final = 11
# Shorter timings are repeated: below this the clock and the interpreter show.
MIN_TIMING_MS: Final = 0.5
WEIGHT_SCALE: Final = 0.05
# Warm-up calls, after one to see whether it runs, of a chain that is only looked at, or was
# before; others are warmed up until steady.
LOOK_WARMUP: Final = 1
LEAST_ROUNDS: Final = 3
# Weights of the chains of one session, which are all in memory at once.
SESSION_BYTES: Final = 2**30


class ProfileTable:
    """Times of layers and of their chains, per machine and kind of run.

    Args:
        path: SQLite file; None for ``profile.sqlite`` in the user's cache folder
            (``$RANKOPT_CACHE`` or the platform's), ``":memory:"`` to forget at the end.
        mode: ``inference`` or ``training`` (forward and backward).
        rounds: Interleaved rounds per measurement, at least 3.
        cuda_graph: Whether to time replays of CUDA graphs (inference on CUDA).
        compile: Whether layers, chains and whole models run under `torch.compile`, each
            compiled by itself: seconds for each.
        refresh: Which stored times are measured anew, and replaced: None those that varied too
            much to decide by (a wide interval: the machine was busy then), True all, False none,
            so that one file gives the same decisions again. What a table has measured itself it
            keeps.
        clock: ``wall`` (CUDA events on a GPU), ``process`` for CPU time on one thread, which
            a busy machine disturbs less (see `rankopt._timing.latency.process_ms`), or a function
            that runs another and returns milliseconds, whose times are not stored on disk.

    Attributes:
        calls: Layer and chain runs so far, warm-up and repeats included.
        skipped: Chains that failed to run, with the reason.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        mode: Mode = "inference",
        rounds: int = ROUNDS,
        cuda_graph: bool = False,
        compile: bool = False,
        refresh: bool | None = None,
        clock: Literal["wall", "process"] | Clock = "wall",
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
        if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < LEAST_ROUNDS:
            raise ValueError(f"rounds={rounds!r}: expected an integer of at least 3")
        if cuda_graph and mode != "inference":
            raise ValueError("cuda_graph=True replays inference; it has no mode='training'")
        if not callable(clock) and clock not in ("wall", "process"):
            raise ValueError(f"clock={clock!r}: expected 'wall', 'process' or a function")
        if refresh not in (None, True, False):
            raise ValueError(f"refresh={refresh!r}: expected True, False or None")
        self.mode, self.rounds, self.refresh = mode, rounds, refresh
        self.cuda_graph, self.compile = cuda_graph, compile
        self.clock_name = "custom" if callable(clock) else clock
        self.clock: Clock | None = process_ms if clock == "process" else None
        if callable(clock):
            self.clock = clock
        in_memory = callable(clock) or path == ":memory:"
        self.path = None if in_memory else Path(path or cache_folder() / FILE_NAME)
        self.calls = 0
        self.skipped: dict[str, str] = {}
        self._store: ProfileStore | None = None
        self._known: dict[tuple[str, ...], dict[str, LayerTime]] = {}
        self._sessions = 0

    def conditions(self, device: torch.device, call: Call) -> dict[str, str]:
        """What a time depends on besides the layer and its ranks, as stored.

        Raises:
            ValueError: CPU time was asked for, but the work is done elsewhere.
        """
        if self.clock_name == "process" and device.type != "cpu":
            raise ValueError(f"clock='process' is CPU time, the model is on {device}; use 'wall'")
        return conditions(
            device,
            call,
            self.mode,
            cuda_graph=self.cuda_graph,
            compile=self.compile,
            clock=self.clock_name,
        )

    def time(
        self,
        layer: Layer,
        call: Call,
        chains: Iterable[Chain],
        *,
        device: torch.device,
        rounds: int | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> dict[Chain, LayerTime]:
        """Times of chains of one layer, measured now where they are not known.

        Args:
            layer: The layer.
            call: Its real input.
            chains: What to time; a chain without a method is the dense layer itself.
            device: Where to run.
            rounds: Fewer than the table's own will do, as for a first look; what was
                timed in fewer is timed in those it lacks.
            between: Called before each run; may raise to stop.

        Returns:
            A time for every chain that ran. One that failed (out of memory, say) is left
            out and listed in `skipped`.

        Raises:
            LayerError: The dense layer itself fails on its input.
        """
        where, text = self.conditions(device, call), _signature(layer, call)
        key = (*where.values(), text)
        if key not in self._known:
            self._known[key] = self._stored(where, text)
        known = self._known[key]
        wanted = list(dict.fromkeys(chains))
        enough = min(self.rounds, rounds or self.rounds)

        def lacks(chain: Chain) -> int:
            return max(0, enough - (len(known[chain.key].chain_ms) if chain.key in known else 0))

        for lacking in sorted({lacks(chain) for chain in wanted} - {0}):
            alike = [chain for chain in wanted if lacks(chain) == lacking]
            for session in _sessions(layer, alike):
                found = self._measure(layer, call, session, device, lacking, between)
                if not lacks(Chain()):  # one dense time for all sessions
                    found.pop(DENSE)
                found = {
                    name: known[name].extended(more) if name in known else more
                    for name, more in found.items()
                }
                known.update(found)
                self._opened().put(
                    where, text, {name: value.to_json() for name, value in found.items()}
                )
        return {chain: known[chain.key] for chain in wanted if chain.key in known}

    def compare(
        self, models: Mapping[str, nn.Module], inputs: Any, *, device: torch.device
    ) -> Timings:
        """Time whole models side by side, each in its mode for this table."""
        inputs = measure.copied(inputs)
        with measure.preserve_rng():
            runners = {name: self.runner(model, inputs) for name, model in models.items()}
        return self.time_runners(runners, device=device)

    def time_runners(
        self, runners: Mapping[str, Callable[[], Any]], *, device: torch.device
    ) -> Timings:
        """Time what `runner` gave side by side; again for more rounds of the same."""
        with measure.preserve_rng():
            return time_interleaved(runners, rounds=self.rounds, device=device, clock=self.clock)

    def runner(self, module: nn.Module, inputs: Any) -> Callable[[], Any]:
        """A function that runs a model or layer once, as this table times it."""
        return runner(
            module, inputs, mode=self.mode, cuda_graph=self.cuda_graph, compile=self.compile
        )

    def _stored(self, where: Mapping[str, str], layer: str) -> dict[str, LayerTime]:
        """What earlier tables measured and is not to be measured anew, by chain."""
        if self.refresh:
            return {}
        found: dict[str, LayerTime] = {}
        for name, value in self._opened().rows(where, layer).items():
            with suppress(ValueError):  # written by something else, or damaged
                time = LayerTime.from_json(value)
                # The dense layer's ratio is 1 however much its time varies.
                interval = time.latency_ms if name == DENSE else time.ratio
                if self.refresh is False or not interval.noisy:
                    found[name] = time
        return found

    def _opened(self) -> ProfileStore:
        if self._store is None:
            self._store = ProfileStore(self.path)
        return self._store

    def _measure(
        self,
        layer: Layer,
        call: Call,
        chains: Sequence[Chain],
        device: torch.device,
        rounds: int,
        between: Callable[[], None],
    ) -> dict[str, LayerTime]:
        self._sessions += 1
        session = f"{os.getpid()}-{id(self):x}-{self._sessions}"
        with measure.preserve_rng():
            inputs = call.example(device)
            try:
                runners = {DENSE: self._runner(layer, Chain(), call, inputs, device, between)}
            except RuntimeError as error:
                raise LayerError(
                    f"layer {layer.name}: it cannot be timed alone on {list(call.shape)}: {error}"
                ) from error
            for chain in chains:
                if chain.method is None:
                    continue
                try:
                    runners[chain.key] = self._runner(layer, chain, call, inputs, device, between)
                except RuntimeError as error:  # out of memory at this rank, say
                    self.skipped[f"{layer.name}: {chain.key}"] = str(error).splitlines()[0]
            timings = time_interleaved(
                runners,
                rounds=max(rounds, LEAST_ROUNDS),
                device=device,
                clock=self.clock,
                max_warmup=MAX_WARMUP_CALLS if rounds == self.rounds else LOOK_WARMUP,
                min_ms=0.0 if self.clock_name == "custom" else MIN_TIMING_MS,
            )
        self.calls += timings.calls + len(runners)
        dense = timings.latency_ms[DENSE]
        return {
            name: LayerTime(times, dense, session) for name, times in timings.latency_ms.items()
        }

    def _runner(
        self,
        layer: Layer,
        chain: Chain,
        call: Call,
        inputs: Tensor,
        device: torch.device,
        between: Callable[[], None],
    ) -> Callable[[], Any]:
        """A function that runs the chain once; it has run once already."""
        module = _build(layer, chain, call, device)
        if call.autocast is not None or torch.is_autocast_enabled(device.type):
            module = _Autocast(module, call, device)
        module.train(self.mode == "training")
        run = self.runner(module, inputs)
        between()
        try:
            run()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise
        return run


def check_table(table: Any, name: str) -> ProfileTable:
    """A table that a caller gave as argument `name`; the user's own where it is None.

    Raises:
        ValueError: It is something else, such as a path.
    """
    if table is None:
        return ProfileTable()
    if not isinstance(table, ProfileTable):
        raise ValueError(
            f"{name}={table!r}: expected a rankopt.ProfileTable, such as "
            "rankopt.ProfileTable('times.sqlite')"
        )
    return table


class _Autocast(nn.Module):
    """A layer under the autocast of the model's call, or without any, whatever the caller's is."""

    def __init__(self, module: nn.Module, call: Call, device: torch.device) -> None:
        super().__init__()
        self.module, self.enabled = module, call.autocast is not None
        self.dtype = getattr(torch, call.autocast) if call.autocast is not None else None
        self.device_type = device.type

    def forward(self, entering: Tensor) -> Tensor:
        with torch.autocast(self.device_type, self.dtype, enabled=self.enabled):
            leaving: Tensor = self.module(entering)
        return leaving


def _sessions(layer: Layer, chains: Sequence[Chain]) -> Iterator[list[Chain]]:
    """Chains that are held in memory, and so run interleaved, at the same time."""
    session: list[Chain] = []
    held = 0
    for chain in chains:
        method = chain.method
        size = 0 if method is None else method.params(layer, chain.ranks) * layer.itemsize
        if session and held + size > SESSION_BYTES:
            yield session
            session, held = [], 0
        session.append(chain)
        held += size
    if session:
        yield session


def _build(layer: Layer, chain: Chain, call: Call, device: torch.device) -> nn.Module:
    """The chain, or the dense layer, with small random weights."""
    module: nn.Module
    if chain.method is None:
        place = base.geometry(layer) if layer.is_conv else None
        module = base.conv(
            layer,
            layer.in_channels,
            layer.out_channels,
            kernel=layer.kernel,
            groups=layer.groups,
            bias=layer.bias,
            place=place,
        )
    else:
        module = chain.method.build(layer, chain.ranks)
    module = module.to(getattr(torch, layer.dtype)).to_empty(device=device)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=WEIGHT_SCALE)
    return call.formatted(module)


def _signature(layer: Layer, call: Call) -> str:
    """Everything about a layer and its input that its time depends on."""
    facts: dict[str, Any] = {
        "in": layer.in_channels,
        "out": layer.out_channels,
        "bias": layer.bias,
        "weight": layer.dtype,
        "input": list(call.shape),
    }
    if layer.is_conv:
        facts |= {"kernel": layer.kernel, "groups": layer.groups, **base.geometry(layer)}
    return json.dumps(facts, sort_keys=True)

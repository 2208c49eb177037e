"""What several commands share: naming a model, settings, showing a plan."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, Final

from rankopt._utils.files import check_writable
from rankopt.errors import RankoptError

__all__ = [
    "INTERRUPTED",
    "calibration_option",
    "check_output",
    "common_options",
    "device_option",
    "function",
    "give_plan",
    "listed",
    "made",
    "model_and_inputs",
    "model_options",
    "placed",
    "refresh_option",
    "settings",
    "show_plan",
    "table",
    "timing",
    "timing_options",
]

INTERRUPTED: Final = 130


def common_options() -> argparse.ArgumentParser:
    """Options of every command."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON on standard output")
    common.add_argument("--traceback", action="store_true", help="show where an error came from")
    return common


def model_options(common: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Options that name a model, after those of every command."""
    model = argparse.ArgumentParser(add_help=False, parents=[common])
    model.add_argument("model", metavar="MODEL", help="torchvision:NAME or FILE.py:CALLABLE")
    model.add_argument(
        "--weights",
        metavar="FILE|NAME",
        help="state dict to load; for torchvision also a name such as DEFAULT; random without",
    )
    model.add_argument(
        "--input", metavar="SHAPE", help="example input, 1,3,224,224[:dtype]; torchvision has one"
    )
    model.add_argument("--channels-last", action="store_true", help="memory format of both")
    model.add_argument("--seed", type=int, default=0)
    return model


def calibration_option(command: argparse.ArgumentParser, what: str) -> None:
    """Inputs that factors and errors of layers' outputs come from."""
    command.add_argument("--calibration", metavar="FILE.py:CALLABLE", help=what)


def timing_options(command: argparse.ArgumentParser) -> None:
    """Options that say what is timed."""
    command.add_argument("--training", action="store_true", help="time forward and backward")
    command.add_argument("--compile", action="store_true", help="time under torch.compile")
    command.add_argument(
        "--cuda-graph", action="store_true", help="time replays of CUDA graphs (inference on CUDA)"
    )


def timing(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `timing_options` say, for `rankopt.compare` and `rankopt.ProfileTable`."""
    mode = "training" if arguments.training else "inference"
    return {"mode": mode, "compile": arguments.compile, "cuda_graph": arguments.cuda_graph}


def refresh_option(command: argparse.ArgumentParser) -> None:
    """Whether layer times of earlier runs count."""
    command.add_argument(
        "--refresh", action="store_true", help="time layers anew that were timed before"
    )


def table(arguments: argparse.Namespace, **more: Any) -> Any:
    """The user's table of layer times, as `timing_options` and `refresh_option` say."""
    import rankopt

    return rankopt.ProfileTable(refresh=arguments.refresh or None, **timing(arguments), **more)


def device_option(command: argparse.ArgumentParser) -> None:
    """Where a command runs the model."""
    command.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, mps, …")


def placed(model: Any, device: Any) -> Any:
    """The model on the device that a command line names."""
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise RankoptError(f"--device {device}: {str(error).splitlines()[0]}") from error


def model_and_inputs(arguments: argparse.Namespace, *, only_times: bool = False) -> tuple[Any, Any]:
    """The model a command line names, and its example inputs if there are any.

    Args:
        arguments: With those of `model_options`.
        only_times: Whether weights do not matter to the command.
    """
    from rankopt._commands.specs import default_input, load_model, parse_input

    if not (only_times or arguments.weights) and arguments.model.startswith("torchvision:"):
        print(
            "rankopt: no --weights: random weights; times and sizes are right, ranks and metrics "
            "are not",
            file=sys.stderr,
        )
    model = load_model(arguments.model, arguments.weights, seed=arguments.seed)
    inputs = parse_input(arguments.input) if arguments.input else default_input(arguments.model)
    if arguments.channels_last:
        import torch

        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if inputs is not None and inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
    return model, inputs


def made(spec: str | None) -> Any:
    """What the function that a command line names returns: data; None without a name."""
    from rankopt._commands.specs import load_callable

    if spec is None:
        return None
    try:
        return load_callable(spec)()
    except RankoptError:
        raise
    except Exception as error:
        raise RankoptError(f"{spec} failed: {type(error).__name__}: {error}") from error


def function(spec: str | None) -> Any:
    """The function that a command line names; None without a name."""
    from rankopt._commands.specs import load_callable

    return None if spec is None else load_callable(spec)


def listed(text: str | None) -> list[str] | None:
    """Names separated by commas; None for all."""
    return [part.strip() for part in text.split(",")] if text else None


def settings(pairs: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` of ``--set``; values are JSON, or text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key:
            raise RankoptError(f"--set {pair!r}: expected KEY=VALUE")
        try:
            found[key] = json.loads(text)
        except json.JSONDecodeError:
            found[key] = text
    return found


def show_plan(plan: Any, arguments: argparse.Namespace) -> None:
    """Print a plan as tables, or as JSON."""
    if arguments.json:
        print(plan.to_json(), end="")
        return
    from rankopt._plan_tables import plan_table, totals_table
    from rankopt._utils.tables import show

    show(plan_table(plan), totals_table(plan))


def check_output(path: str | None) -> None:
    """Refuse a file that cannot be written, before the work whose result it is to hold."""
    if path:
        check_writable(path)


def give_plan(plan: Any, arguments: argparse.Namespace) -> int:
    """Show a plan, write it to ``--output`` if there is one, return the exit code."""
    show_plan(plan, arguments)
    if arguments.output:
        plan.save(arguments.output)
    if arguments.output and not arguments.json:
        print(f"plan written to {arguments.output}")
    return 0

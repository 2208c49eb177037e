"""What several commands share: naming a model, settings, showing a plan."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from textwrap import fill
from typing import Any, Final

from rankopt._utils.files import check_writable
from rankopt.errors import RankoptError

__all__ = [
    "INTERRUPTED",
    "add_command",
    "calibration_option",
    "check_output",
    "common_options",
    "evaluate_option",
    "function",
    "give_plan",
    "listed",
    "made",
    "model_and_inputs",
    "model_options",
    "option_hint",
    "placed",
    "settings",
    "show_plan",
    "table",
    "timing",
    "timing_options",
]

INTERRUPTED: Final = 130
# Characters of a line of a description.
WIDTH: Final = 80
# Arguments as messages of the library name them, and the options that give them.
OPTIONS: Final = {
    "example_inputs": "--input SHAPE, such as --input 1,3,224,224",
    "calibration=": "--calibration FILE.py:CALLABLE",
    "evaluate=": "--evaluate FILE.py:CALLABLE",
    "sampler=": "--sampler",
    "share=True": "--share-device",
}


def add_command(
    commands: Any,
    name: str,
    *,
    parents: Sequence[argparse.ArgumentParser],
    summary: str,
    description: str,
    examples: Sequence[str],
) -> argparse.ArgumentParser:
    """Add a subcommand whose help ends in examples.

    Args:
        commands: From `argparse.ArgumentParser.add_subparsers`.
        name: Of the subcommand.
        parents: Parsers whose options it has too.
        summary: What it does, in a line, for the list of commands.
        description: What it does, in its own help.
        examples: Command lines, without line breaks.
    """
    made: argparse.ArgumentParser = commands.add_parser(
        name,
        parents=parents,
        help=summary,
        description=fill(description, WIDTH),
        epilog="\n".join(["Examples:", *(f"  {line}" for line in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return made


def common_options() -> argparse.ArgumentParser:
    """Options of every command."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--json", action="store_true", help="print the result as JSON on standard output"
    )
    common.add_argument(
        "--traceback", action="store_true", help="show the Python traceback of an error"
    )
    return common


def model_options(common: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Options that name a model, after those of every command."""
    model = argparse.ArgumentParser(add_help=False, parents=[common])
    model.add_argument(
        "model", metavar="MODEL",
        help="the original model: torchvision:NAME, FILE.py:CALLABLE or package.module:CALLABLE, "
        "where the callable takes no arguments and returns a torch.nn.Module",
    )  # fmt: skip
    options = model.add_argument_group("model options")
    options.add_argument(
        "--weights", metavar="FILE|NAME",
        help="weights to load into MODEL: a state dict (.safetensors or a torch file), or for "
        "torchvision a name such as DEFAULT (default: as MODEL is built; torchvision: random)",
    )  # fmt: skip
    options.add_argument(
        "--input", metavar="SHAPE",
        help="shape of a random example input, such as 1,3,224,224 or 8,128:int64, batch first; "
        "needed to count MACs and to measure time (default for torchvision: batch 1 at the "
        "resolution of its weights)",
    )  # fmt: skip
    options.add_argument(
        "--channels-last", action="store_true",
        help="run model and inputs in channels_last memory format",
    )  # fmt: skip
    options.add_argument(
        "--seed", type=int, default=0, metavar="N",
        help="seed of random weights and of everything else that is drawn (default 0)",
    )  # fmt: skip
    return model


def calibration_option(command: Any, what: str, *, required: bool = False) -> None:
    """Inputs that factors and errors of layers' outputs come from.

    Args:
        command: A parser or a group of its options.
        what: What the command does with them.
        required: Whether it cannot do without.
    """
    command.add_argument(
        "--calibration", metavar="FILE.py:CALLABLE", required=required,
        help=f"a function that returns unlabelled inputs (an iterable of batches): {what}",
    )  # fmt: skip


def evaluate_option(command: Any, what: str, *, required: bool = False) -> None:
    """The task's metric of a model.

    Args:
        command: A parser or a group of its options.
        what: What the command does with it.
        required: Whether it cannot do without.
    """
    command.add_argument(
        "--evaluate", metavar="FILE.py:CALLABLE", required=required,
        help=f"a function of a model that returns the task's metric, such as accuracy: {what}",
    )  # fmt: skip


def timing_options(
    command: argparse.ArgumentParser, *, device: bool = True, cached: bool = False
) -> None:
    """Options that say what is timed.

    Args:
        command: Gets a group of them.
        device: Whether it runs the model on a device that is named here.
        cached: Whether layer times of earlier runs count.
    """
    timed = command.add_argument_group("timing options")
    timed.add_argument(
        "--training", action="store_true",
        help="time training steps (forward + backward) instead of inference",
    )  # fmt: skip
    timed.add_argument(
        "--compile", action="store_true", help="time models compiled by torch.compile"
    )
    timed.add_argument(
        "--cuda-graph", action="store_true",
        help="time replays of CUDA graphs (inference on CUDA only)",
    )  # fmt: skip
    if device:
        timed.add_argument(
            "--device", default="cpu", metavar="DEVICE",
            help="device to run on: cpu, cuda, cuda:1, mps, … (default cpu)",
        )  # fmt: skip
    if cached:
        timed.add_argument(
            "--refresh", action="store_true", help="measure layer times anew that are cached"
        )


def timing(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `timing_options` say, for `rankopt.compare` and `rankopt.ProfileTable`."""
    mode = "training" if arguments.training else "inference"
    return {"mode": mode, "compile": arguments.compile, "cuda_graph": arguments.cuda_graph}


def table(arguments: argparse.Namespace, **more: Any) -> Any:
    """The user's table of layer times, as `timing_options` say."""
    import rankopt

    return rankopt.ProfileTable(refresh=arguments.refresh or None, **timing(arguments), **more)


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


def option_hint(text: str) -> str:
    """The options that give the arguments which a message of the library names; "" for none.

    Example:
        >>> option_hint("strategy 'optuna' needs evaluate=")
        'on the command line: --evaluate FILE.py:CALLABLE'
    """
    named = [option for argument, option in OPTIONS.items() if argument in text]
    return f"on the command line: {'; '.join(named)}" if named else ""


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

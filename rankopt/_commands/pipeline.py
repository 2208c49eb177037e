"""``rankopt compress`` and ``report``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankopt._commands.options import (
    calibration_option,
    function,
    made,
    model_and_inputs,
    show_plan,
)
from rankopt._commands.searching import search_options, search_settings
from rankopt._utils.strict_json import strict_json
from rankopt.errors import RankoptError

__all__ = ["add_pipeline"]


def add_pipeline(
    commands: Any, common: argparse.ArgumentParser, model: argparse.ArgumentParser
) -> None:
    """Add the commands to a parser's subcommands.

    Args:
        commands: From `argparse.ArgumentParser.add_subparsers`.
        common: Options of every command.
        model: Options that name a model.
    """
    compress = commands.add_parser(
        "compress", parents=[model], help="search, apply, recover, fine-tune, verify, save"
    )
    compress.add_argument("--budget", help="such as 'macs<=50%%'")
    search_options(compress)
    compress.add_argument(
        "--train", metavar="FILE.py:CALLABLE", help="makes the labelled batches or DataLoader"
    )
    calibration_option(compress, "makes unlabelled inputs; else --train's")
    compress.add_argument("--evaluate", metavar="FILE.py:CALLABLE", help="metric of a model")
    compress.add_argument("--recover", type=float, metavar="SECONDS", help="0 leaves it out")
    compress.add_argument("--epochs", type=int, metavar="N", help="of fine-tuning; 0 for none")
    compress.add_argument("--learning-rate", type=float, metavar="RATE")
    compress.add_argument("--freezing", help="none, fixed or sequential (default)")
    compress.add_argument("--rounds", type=int, default=1, metavar="N", help="steps to the budget")
    compress.add_argument("--folder", metavar="FOLDER", help="work folder, to go on from")
    compress.add_argument("-o", "--output", metavar="OUT.safetensors", required=True)
    compress.set_defaults(run=_compress)

    report = commands.add_parser(
        "report", parents=[common], help="show plans and runs, as tables or one HTML page"
    )
    report.add_argument(
        "sources",
        nargs="+",
        metavar="PLAN|RUN",
        help="plan; with -o also checkpoint, record.jsonl, or the folder of finetune or compress",
    )
    report.add_argument("-o", "--output", metavar="REPORT.html", help="the page to write")
    report.add_argument("--plot", metavar="FILE.html", help="draw how the ranks moved (plotly)")
    report.set_defaults(run=_report)


def _compress(arguments: argparse.Namespace) -> int:
    import rankopt
    from rankopt._utils.tables import show

    search = search_settings(arguments)
    tuning = {
        key: getattr(arguments, key)
        for key in ("epochs", "learning_rate", "freezing")
        if getattr(arguments, key) is not None
    }
    if tuning and not arguments.train and arguments.epochs != 0:
        options = ", ".join(f"--{key.replace('_', '-')}" for key in tuning)
        raise RankoptError(f"{options} is of fine-tuning, which needs --train")
    model, inputs = model_and_inputs(arguments)
    done = rankopt.compress(
        model,
        arguments.budget,
        example_inputs=inputs,
        train=made(arguments.train),
        calibration=made(arguments.calibration),
        evaluate=function(arguments.evaluate),
        rounds=arguments.rounds,
        search=search,
        recover=None if arguments.recover is None else _seconds(arguments.recover),
        finetune=False if arguments.epochs == 0 else tuning or None,
        output=arguments.output,
        folder=arguments.folder,
        seed=arguments.seed,
    )
    if arguments.json:
        print(strict_json(done.to_dict()))
    else:
        show(*done.tables())
        print(f"{done.path} written")
    return 0


def _seconds(seconds: float) -> Any:
    return {"seconds": seconds} if seconds else False


def _report(arguments: argparse.Namespace) -> int:
    import rankopt

    written = {
        key: path for key, path in (("output", arguments.output), ("plot", arguments.plot)) if path
    }
    if arguments.output:
        rankopt.report(arguments.sources, arguments.output)
    if arguments.plot or not arguments.output:
        plan = rankopt.RankPlan.load(_only_plan(arguments.sources))
    if arguments.plot:
        from rankopt._report.ranks import write_ranks

        write_ranks(plan, arguments.plot)
    if not arguments.output:
        show_plan(plan, arguments)
    elif arguments.json:
        print(strict_json(written))
    if not arguments.json:
        for kind, path in written.items():
            print(f"{'report' if kind == 'output' else kind} written to {path}")
    return 0


def _only_plan(sources: Sequence[str]) -> str:
    """The one plan that a terminal or a plot can show."""
    if len(sources) != 1:
        raise RankoptError(
            f"{len(sources)} sources: tables and plots show one plan; -o REPORT.html takes runs too"
        )
    if Path(sources[0]).is_dir() or sources[0].endswith((".jsonl", ".safetensors")):
        raise RankoptError(f"{sources[0]} is no plan file: draw it as a page, -o REPORT.html")
    return sources[0]

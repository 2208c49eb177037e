"""``rankopt compress`` and ``report``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from rankopt._commands.options import (
    add_command,
    calibration_option,
    evaluate_option,
    function,
    made,
    model_and_inputs,
    show_plan,
)
from rankopt._commands.searching import search_options, search_settings
from rankopt._utils.strict_json import strict_json
from rankopt.errors import RankoptError
from rankopt.training.schedules import FREEZING

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
    _add_compress(commands, model)
    _add_report(commands, common)


def _add_compress(commands: Any, model: argparse.ArgumentParser) -> None:
    compress = add_command(
        commands, "compress", parents=[model],
        summary="search, apply, recover, fine-tune, verify and save in one run",
        description="Compress a model from start to end: search a plan under the budget, apply "
        "it, recover without labels, fine-tune with --train, verify the result and save it. "
        "Stages whose data is missing are left out.",
        examples=(
            "rankopt compress nets.py:build --weights net.pt --input 1,3,32,32 --budget 'macs<=50%'"
            " --train data.py:train --evaluate data.py:accuracy --folder run -o small.safetensors",
            "rankopt compress torchvision:resnet18 --weights DEFAULT --budget 'macs<=60%' "
            "--calibration data.py:inputs -o small.safetensors",
        ),
    )  # fmt: skip
    compress.add_argument(
        "--budget",
        help="bounds on the whole model, such as 'macs<=50%%' or 'params<=40%%, latency<=70%%' "
        "(default: the strategy decides how much to compress)",
    )
    compress.add_argument(
        "-o", "--output", metavar="OUT.safetensors", required=True,
        help="file to write the compressed model to",
    )  # fmt: skip
    compress.add_argument(
        "--folder", metavar="FOLDER",
        help="directory for checkpoints; rerun the same command to resume (default: none are kept)",
    )  # fmt: skip
    compress.add_argument(
        "--train", metavar="FILE.py:CALLABLE",
        help="a function that returns the labelled training data, a DataLoader or a list of "
        "(inputs, labels) batches; without it there is no fine-tuning",
    )  # fmt: skip
    calibration_option(compress, "for search and recovery (default: --train's inputs)")
    evaluate_option(compress, "shown after each stage; needed for budgets on metric_drop")
    compress.add_argument(
        "--rounds", type=int, default=1, metavar="N",
        help="reach the budget in N compress-and-train rounds (default 1)",
    )  # fmt: skip
    search_options(compress)
    training = compress.add_argument_group("training options")
    training.add_argument(
        "--recover", type=float, metavar="SECONDS",
        help="seconds of label-free training after apply (default 60; 0 disables)",
    )  # fmt: skip
    training.add_argument(
        "--epochs", type=int, metavar="N",
        help="fine-tuning epochs (default 10; 0 disables fine-tuning)",
    )  # fmt: skip
    training.add_argument(
        "--learning-rate", type=float, metavar="RATE",
        help="peak learning rate of fine-tuning (default 1e-3)",
    )  # fmt: skip
    training.add_argument(
        "--freezing", choices=tuple(FREEZING),
        help="which factors fine-tuning freezes: none; fixed, the first of a pair or the outer "
        "ones around a core, throughout; sequential, one half in even epochs and the other in odd "
        "ones (default sequential)",
    )  # fmt: skip
    training.add_argument(
        "--front", action="append", metavar="MODULE:START[:END]",
        help="train nothing up to and including this module in these epochs, counted from 0; END "
        "is the first in which it trains again (repeatable; default: none)",
    )  # fmt: skip
    training.add_argument(
        "--final-epochs", type=int, metavar="N",
        help="epochs at the end of fine-tuning in which all factors train (default 1)",
    )  # fmt: skip
    compress.set_defaults(run=_compress)


def _add_report(commands: Any, common: argparse.ArgumentParser) -> None:
    report = add_command(
        commands, "report", parents=[common],
        summary="show a plan as a table, or plans and runs as an HTML page",
        description="Print a plan as a table, or write plans, compressed models and training runs "
        "to one HTML page that needs no network.",
        examples=(
            "rankopt report plan.json",
            "rankopt report run -o report.html",
            "rankopt report plan.json finetuned/record.jsonl -o report.html",
        ),
    )  # fmt: skip
    report.add_argument(
        "sources", nargs="+", metavar="PLAN|RUN",
        help="a plan (.json); with -o also compressed models (.safetensors), record.jsonl of a "
        "training, and folders of `rankopt compress --folder` or rankopt.finetune",
    )  # fmt: skip
    report.add_argument(
        "-o", "--output", metavar="REPORT.html",
        help="HTML page to write (default: the plan is printed)",
    )  # fmt: skip
    report.add_argument(
        "--plot", metavar="FILE.html",
        help="draw how the ranks of a relaxed search moved to this file (needs plotly; default: "
        "none)",
    )  # fmt: skip
    report.set_defaults(run=_report)


def _compress(arguments: argparse.Namespace) -> int:
    import rankopt
    from rankopt._commands.specs import parse_front
    from rankopt._pipeline.checks import TUNING
    from rankopt._utils.tables import show

    search = search_settings(arguments)
    tuning = {
        key: getattr(arguments, key)
        for key in ("epochs", "learning_rate", "freezing", "front", "final_epochs")
        if getattr(arguments, key) is not None
    }
    if tuning and not arguments.train and arguments.epochs != 0:
        options = ", ".join(f"--{key.replace('_', '-')}" for key in tuning)
        raise RankoptError(f"{options} is of fine-tuning, which needs --train")
    fronts = [parse_front(text) for text in tuning.pop("front", ())]
    if fronts:
        schedule = FREEZING[tuning.get("freezing", TUNING["freezing"])]()
        tuning["freezing"] = reduce(lambda made, front: made.front(*front), fronts, schedule)
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

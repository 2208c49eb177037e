"""The `rankopt` command: parses, calls the public functions, prints."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any, Final

from rankopt import __version__
from rankopt._cli_study import add_study
from rankopt.errors import BudgetInfeasible, RankoptError

__all__ = ["main"]

FAILED: Final = 1
INFEASIBLE: Final = 3
INTERRUPTED: Final = 130

_EPILOG = """\
MODEL is torchvision:NAME, FILE.py:CALLABLE or package.module:CALLABLE.
Exit codes: 0 done, 1 failed, 2 wrong usage, 3 budget cannot be met, 130 interrupted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program name; the process's own if None.

    Returns:
        The exit code.
    """
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 0
    except BudgetInfeasible as error:
        print(f"rankopt: {error}", file=sys.stderr)
        return INFEASIBLE
    except (RankoptError, ValueError) as error:
        # ValueError: a setting refused by a strategy's own class.
        if arguments.traceback:
            raise
        print(f"rankopt: {error}", file=sys.stderr)
        return FAILED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rankopt",
        description="Make a trained PyTorch model smaller and really faster, by low rank.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rankopt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON on standard output")
    common.add_argument("--traceback", action="store_true", help="show where an error came from")
    model = argparse.ArgumentParser(add_help=False, parents=[common])
    model.add_argument("model", metavar="MODEL", help="torchvision:NAME or FILE.py:CALLABLE")
    model.add_argument("--weights", metavar="FILE", help="state dict to load into the model")
    model.add_argument(
        "--input", metavar="SHAPE", help="example input, 1,3,224,224[:dtype]; torchvision has one"
    )
    model.add_argument("--channels-last", action="store_true", help="memory format of both")
    model.add_argument("--seed", type=int, default=0)

    search = commands.add_parser("search", parents=[model], help="choose ranks, write a plan")
    search.add_argument("--budget", help="such as 'macs<=50%%'; left out, the strategy decides")
    search.add_argument("--strategy", default=None, help="see `rankopt strategies`")
    search.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the strategy"
    )
    search.add_argument("--methods", help="decompositions to allow, comma-separated")
    search.add_argument("--only", action="append", default=[], metavar="GLOB")
    search.add_argument("--ignore", action="append", default=[], metavar="GLOB")
    search.add_argument("--round-to", type=int, default=1, metavar="N", help="multiples of N only")
    search.add_argument("--timeout", type=float, metavar="SECONDS")
    search.add_argument("-o", "--output", metavar="PLAN.json", help="where to write the plan")
    search.set_defaults(run=_search)

    apply = commands.add_parser("apply", parents=[model], help="carry out a plan")
    apply.add_argument("plan", metavar="PLAN.json")
    apply.add_argument("-o", "--output", metavar="OUT.safetensors", required=True)
    apply.set_defaults(run=_apply)

    compare = commands.add_parser("compare", parents=[model], help="count and time a result")
    compare.add_argument("artefact", metavar="ARTEFACT", help="from `rankopt apply`, or a plan")
    compare.add_argument("--evaluate", metavar="FILE.py:CALLABLE", help="metric of a model")
    compare.add_argument("--rounds", type=int, default=30, help="timing rounds")
    compare.add_argument("--training", action="store_true", help="time forward and backward")
    compare.set_defaults(run=_compare)

    profile = commands.add_parser("profile", parents=[model], help="time a layer against rank")
    profile.add_argument("--layer", required=True, metavar="NAME", help="full module name")
    profile.add_argument("--method", help="decomposition; the first that applies if left out")
    profile.add_argument("--ranks", metavar="R,R,...|FIRST:LAST[:STEP]", help="which to time")
    profile.add_argument("--rounds", type=int, default=None, help="interleaved rounds")
    profile.add_argument("--training", action="store_true", help="forward and backward")
    profile.add_argument("--plot", metavar="FILE.html", help="draw time against rank (plotly)")
    profile.set_defaults(run=_profile)
    compress = commands.add_parser(
        "compress", parents=[model], help="search, apply, recover, fine-tune, verify, save"
    )
    compress.add_argument("--budget", help="such as 'macs<=50%%'")
    compress.add_argument("--strategy", default=None, help="see `rankopt strategies`")
    compress.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the strategy"
    )
    compress.add_argument(
        "--train", metavar="FILE.py:CALLABLE", help="makes the labelled batches or DataLoader"
    )
    compress.add_argument(
        "--calibration", metavar="FILE.py:CALLABLE", help="makes unlabelled inputs; else --train's"
    )
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
        help="plan, checkpoint, record.jsonl, or the folder of finetune or compress",
    )
    report.add_argument("-o", "--output", metavar="REPORT.html", help="the page to write")
    report.add_argument("--plot", metavar="FILE.html", help="draw how the ranks moved (plotly)")
    report.set_defaults(run=_report)

    strategies = commands.add_parser("strategies", parents=[common], help="what is installed")
    strategies.set_defaults(run=_strategies)

    add_study(commands, common, model)

    demo = commands.add_parser("demo", parents=[common], help="compress a network on real digits")
    demo.add_argument("--output", metavar="FOLDER", help="keep plan and weights there")
    demo.set_defaults(run=_demo)
    return parser


def _search(arguments: argparse.Namespace) -> int:
    import rankopt
    from rankopt._search import DEFAULT_STRATEGY
    from rankopt.registry import strategies

    name = arguments.strategy or DEFAULT_STRATEGY
    strategy = strategies.create(name, **_settings(arguments.set))
    model, inputs = _model(arguments)
    plan = rankopt.search(
        model,
        arguments.budget,
        strategy=strategy,
        example_inputs=inputs,
        methods=arguments.methods.split(",") if arguments.methods else None,
        only=arguments.only,
        ignore=arguments.ignore,
        round_to=arguments.round_to,
        seed=arguments.seed,
        timeout=arguments.timeout,
    )
    if arguments.output:
        plan.save(arguments.output)
    _show_plan(plan, arguments)
    if arguments.output and not arguments.json:
        print(f"plan written to {arguments.output}")
    return 0


def _show_plan(plan: Any, arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(plan.to_json(), end="")
        return
    from rankopt._report.tables import plan_table, show, totals_table

    show(plan_table(plan), totals_table(plan))


def _apply(arguments: argparse.Namespace) -> int:
    import rankopt

    plan = rankopt.RankPlan.load(arguments.plan)
    model, _ = _model(arguments)
    small = rankopt.apply(model, plan)
    rankopt.save(small, arguments.output)
    result = rankopt.compare(model, small)
    if arguments.json:
        print(json.dumps({"output": arguments.output, **result.to_dict()}))
        return 0
    from rankopt._report.tables import count

    params = result.params
    print(
        f"{arguments.output}: {len(plan.changes)} sites decomposed, "
        f"{count(params.before)} to {count(params.after)} parameters ({100 * params.ratio:.1f}%)"
    )
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    import rankopt
    from rankopt._specs import load_callable

    model, inputs = _model(arguments)
    if arguments.artefact.endswith(".json"):
        small = rankopt.apply(model, rankopt.RankPlan.load(arguments.artefact))
    else:
        small = rankopt.load(model, arguments.artefact)
    evaluate = load_callable(arguments.evaluate) if arguments.evaluate else None
    result = rankopt.compare(
        model,
        small,
        example_inputs=inputs,
        evaluate=evaluate,
        rounds=arguments.rounds,
        mode="training" if arguments.training else "inference",
        seed=arguments.seed,
    )
    print(json.dumps(result.to_dict()) if arguments.json else result)
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    import rankopt
    from rankopt.profile_table import ROUNDS

    model, inputs = _model(arguments)
    if inputs is None:
        raise RankoptError("profile needs --input SHAPE, such as 1,3,224,224, to run the model")
    found = rankopt.profile(
        model,
        arguments.layer,
        example_inputs=inputs,
        method=arguments.method,
        ranks=_ranks(arguments.ranks),
        table=rankopt.ProfileTable(
            mode="training" if arguments.training else "inference",
            rounds=ROUNDS if arguments.rounds is None else arguments.rounds,
        ),
    )
    if arguments.plot:
        found.plot(arguments.plot)
    print(json.dumps(found.to_dict()) if arguments.json else found)
    if arguments.plot and not arguments.json:
        print(f"plot written to {arguments.plot}")
    return 0


def _ranks(text: str | None) -> list[int] | None:
    """``8,16,32`` or ``1:512`` or ``8:512:8``, the last rank included."""
    if text is None:
        return None
    try:
        if ":" not in text:
            return [int(part) for part in text.split(",")]
        first, last, *step = (int(part) for part in text.split(":"))
        return list(range(first, last + 1, *step))
    except (ValueError, TypeError) as error:
        raise RankoptError(f"--ranks {text!r}: expected 8,16,32 or 8:512:8") from error


def _compress(arguments: argparse.Namespace) -> int:
    import rankopt
    from rankopt._search import DEFAULT_STRATEGY
    from rankopt._specs import load_callable
    from rankopt.registry import strategies

    name = arguments.strategy or DEFAULT_STRATEGY
    search = {"strategy": strategies.create(name, **_settings(arguments.set))}
    tuning = {
        key: getattr(arguments, key)
        for key in ("epochs", "learning_rate", "freezing")
        if getattr(arguments, key) is not None
    }
    made = {
        key: load_callable(getattr(arguments, key))() if getattr(arguments, key) else None
        for key in ("train", "calibration")
    }
    model, inputs = _model(arguments)
    done = rankopt.compress(
        model,
        arguments.budget,
        example_inputs=inputs,
        train=made["train"],
        calibration=made["calibration"],
        evaluate=load_callable(arguments.evaluate) if arguments.evaluate else None,
        rounds=arguments.rounds,
        search=search,
        recover=None if arguments.recover is None else _seconds(arguments.recover),
        finetune=False if arguments.epochs == 0 else tuning or None,
        output=arguments.output,
        folder=arguments.folder,
        seed=arguments.seed,
    )
    print(json.dumps(done.to_dict()) if arguments.json else f"{done}\n{done.path} written")
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
        from rankopt._report.figures import write_ranks

        write_ranks(plan, arguments.plot)
    if not arguments.output:
        _show_plan(plan, arguments)
    elif arguments.json:
        print(json.dumps(written))
    if not arguments.json:
        for kind, path in written.items():
            print(f"{'report' if kind == 'output' else kind} written to {path}")
    return 0


def _only_plan(sources: Sequence[str]) -> str:
    """The one plan that a terminal or a plot can show."""
    if len(sources) != 1:
        raise RankoptError(
            f"{len(sources)} sources: tables and plots show one plan; -o REPORT.html takes several"
        )
    return sources[0]


def _strategies(arguments: argparse.Namespace) -> int:
    from rankopt.registry import strategies

    rows: list[dict[str, Any]] = []
    for name in strategies.names():
        row: dict[str, Any] = {"name": name, "from": strategies.origin(name)}
        try:
            cls = strategies.get(name)
        except RankoptError as error:
            row["error"] = str(error)
        else:
            row["summary"] = (cls.__doc__ or "").strip().splitlines()[0]
            row["needs"] = sorted(cls.tags.needs)
            row["settings"] = vars(cls()) if is_dataclass(cls) else {}
        rows.append(row)
    if arguments.json:
        print(json.dumps(rows, default=str))
        return 0
    from rankopt._report.tables import show, table

    made = table("strategies", "name", "what it does", "needs", "settings")
    for column in made.columns:
        column.justify = "left"
    for row in rows:
        settings = ", ".join(f"{key}={value}" for key, value in row.get("settings", {}).items())
        text = row.get("summary", row.get("error", ""))
        made.add_row(row["name"], text, ", ".join(row.get("needs", [])) or "nothing", settings)
    show(made)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from rankopt._demo import run

    result = run(arguments.output, quiet=arguments.json)
    if arguments.json:
        print(json.dumps(result))
    return 0


def _model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    from rankopt._specs import default_input, load_model, parse_input

    model = load_model(arguments.model, arguments.weights, seed=arguments.seed)
    inputs = parse_input(arguments.input) if arguments.input else default_input(arguments.model)
    if arguments.channels_last:
        import torch

        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if inputs is not None and inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
    return model, inputs


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key:
            raise RankoptError(f"--set {pair!r}: expected KEY=VALUE")
        try:
            settings[key] = json.loads(text)
        except json.JSONDecodeError:
            settings[key] = text
    return settings


if __name__ == "__main__":
    sys.exit(main())

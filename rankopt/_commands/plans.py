"""``rankopt search``, ``apply``, ``compare`` and ``profile``."""

from __future__ import annotations

import argparse
from typing import Any

from rankopt._commands.options import (
    calibration_option,
    check_output,
    device_option,
    function,
    give_plan,
    made,
    model_and_inputs,
    placed,
    refresh_option,
    table,
    timing,
    timing_options,
)
from rankopt._commands.searching import search_options, search_settings
from rankopt._utils.strict_json import strict_json
from rankopt.errors import RankoptError, warn

__all__ = ["add_plans"]


def add_plans(commands: Any, model: argparse.ArgumentParser) -> None:
    """Add the commands to a parser's subcommands.

    Args:
        commands: From `argparse.ArgumentParser.add_subparsers`.
        model: Options that name a model.
    """
    search = commands.add_parser("search", parents=[model], help="choose ranks, write a plan")
    search.add_argument("--budget", help="such as 'macs<=50%%'; left out, the strategy decides")
    search_options(search)
    search.add_argument("--timeout", type=float, metavar="SECONDS")
    search.add_argument(
        "--evaluate", metavar="FILE.py:CALLABLE", help="metric of a model, for metric_drop budgets"
    )
    calibration_option(search, "makes unlabelled inputs, for better ranks and factors")
    timing_options(search)
    refresh_option(search)
    device_option(search)
    search.add_argument("-o", "--output", metavar="PLAN.json", help="where to write the plan")
    search.set_defaults(run=_search)

    apply = commands.add_parser("apply", parents=[model], help="carry out a plan")
    apply.add_argument("plan", metavar="PLAN.json")
    apply.add_argument("-o", "--output", metavar="OUT.safetensors", required=True)
    calibration_option(apply, "makes the inputs that the plan was made with")
    apply.set_defaults(run=_apply)

    compare = commands.add_parser("compare", parents=[model], help="count and time a result")
    compare.add_argument("artefact", metavar="ARTEFACT", help="from `rankopt apply`, or a plan")
    compare.add_argument("--evaluate", metavar="FILE.py:CALLABLE", help="metric of a model")
    compare.add_argument("--rounds", type=int, default=30, help="timing rounds")
    calibration_option(compare, "makes the inputs that a plan was made with")
    timing_options(compare)
    device_option(compare)
    compare.set_defaults(run=_compare)

    profile = commands.add_parser("profile", parents=[model], help="time a layer against rank")
    profile.add_argument("--layer", required=True, metavar="NAME", help="full module name")
    profile.add_argument("--method", help="decomposition; the first that applies if left out")
    profile.add_argument("--ranks", metavar="R,R,...|FIRST:LAST[:STEP]", help="which to time")
    profile.add_argument("--rounds", type=int, default=None, help="interleaved rounds")
    timing_options(profile)
    refresh_option(profile)
    device_option(profile)
    profile.add_argument("--plot", metavar="FILE.html", help="draw time against rank (plotly)")
    profile.set_defaults(run=_profile)


def _search(arguments: argparse.Namespace) -> int:
    import rankopt

    check_output(arguments.output)
    chosen = search_settings(arguments)
    model, inputs = model_and_inputs(arguments)
    plan = rankopt.search(
        placed(model, arguments.device),
        arguments.budget,
        example_inputs=inputs,
        seed=arguments.seed,
        timeout=arguments.timeout,
        profile=table(arguments),
        calibration=made(arguments.calibration),
        evaluate=function(arguments.evaluate),
        **chosen,
    )
    return give_plan(plan, arguments)


def _apply(arguments: argparse.Namespace) -> int:
    import rankopt
    from rankopt.checkpoint import check_target

    check_target(arguments.output)
    plan = rankopt.RankPlan.load(arguments.plan)
    model, _ = model_and_inputs(arguments)
    small = rankopt.apply(model, plan, calibration=made(arguments.calibration))
    rankopt.save(small, arguments.output)
    result = rankopt.compare(model, small)
    if arguments.json:
        print(strict_json({"output": arguments.output, **result.to_dict()}))
        return 0
    from rankopt._utils.tables import count, counted

    params = result.params
    print(
        f"{arguments.output}: {counted(len(plan.changes), 'site')} decomposed, "
        f"{count(params.before)} to {count(params.after)} parameters ({100 * params.ratio:.1f}%)"
    )
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    import rankopt

    model, inputs = model_and_inputs(arguments)
    model = placed(model, arguments.device)
    if arguments.artefact.endswith(".json"):
        plan = rankopt.RankPlan.load(arguments.artefact)
        small = rankopt.apply(model, plan, calibration=made(arguments.calibration))
    else:
        small = rankopt.load(model, arguments.artefact)
        if arguments.evaluate:
            _check_weights(model, small, arguments.artefact)
    result = rankopt.compare(
        model,
        small,
        example_inputs=inputs,
        evaluate=function(arguments.evaluate),
        rounds=arguments.rounds,
        **timing(arguments),
        seed=arguments.seed,
    )
    print(strict_json(result.to_dict()) if arguments.json else result)
    return 0


def _check_weights(model: Any, small: Any, path: str) -> None:
    """Warn where a result is held against a model that it was not made from."""
    from rankopt._build.provenance import plan_of
    from rankopt._model import measure

    plan = plan_of(small)
    made_from = None if plan is None else plan.model.get("weights")
    if made_from is not None and made_from != measure.weights_digest(model):
        warn(
            f"{path} was made from other weights than MODEL has, or in several rounds; if from "
            "others, the metrics say nothing about what compression lost: give their --weights"
        )


def _profile(arguments: argparse.Namespace) -> int:
    import rankopt
    from rankopt._timing.profile_table import ROUNDS
    from rankopt._utils.plots import check_name

    if arguments.plot:
        check_name(arguments.plot)
        check_output(arguments.plot)
    model, inputs = model_and_inputs(arguments, only_times=True)
    if inputs is None:
        raise RankoptError("profile needs --input SHAPE, such as 1,3,224,224, to run the model")
    found = rankopt.profile(
        placed(model, arguments.device),
        arguments.layer,
        example_inputs=inputs,
        method=arguments.method,
        ranks=_ranks(arguments.ranks),
        table=table(arguments, rounds=ROUNDS if arguments.rounds is None else arguments.rounds),
    )
    print(strict_json(found.to_dict()) if arguments.json else found)
    if arguments.plot:
        found.plot(arguments.plot)
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
        found = list(range(first, last + 1, *step))
    except (ValueError, TypeError) as error:
        raise RankoptError(f"--ranks {text!r}: expected 8,16,32 or 8:512:8") from error
    if not found:
        raise RankoptError(f"--ranks {text!r}: no rank lies between these")
    return found

"""``rankopt search``, ``apply``, ``recover``, ``compare`` and ``profile``."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from rankopt._commands.options import (
    add_command,
    calibration_option,
    check_output,
    evaluate_option,
    function,
    give_plan,
    made,
    model_and_inputs,
    option_hint,
    placed,
    table,
    timing,
    timing_options,
)
from rankopt._commands.searching import search_options, search_settings
from rankopt._timing.profile_table import ROUNDS
from rankopt._utils.strict_json import strict_json
from rankopt.errors import RankoptError, warn

__all__ = ["add_plans"]


def add_plans(commands: Any, model: argparse.ArgumentParser) -> None:
    """Add the commands to a parser's subcommands.

    Args:
        commands: From `argparse.ArgumentParser.add_subparsers`.
        model: Options that name a model.
    """
    _add_search(commands, model)
    _add_apply(commands, model)
    _add_recover(commands, model)
    _add_compare(commands, model)
    _add_profile(commands, model)


def _add_search(commands: Any, model: argparse.ArgumentParser) -> None:
    search = add_command(
        commands, "search", parents=[model],
        summary="choose ranks under a budget and write a plan",
        description="Choose for each layer whether to decompose it, how, and at which rank, so "
        "that the whole model keeps to a budget. The plan is printed, and written with -o; the "
        "model is not changed.",
        examples=(
            "rankopt search torchvision:resnet18 --weights DEFAULT --budget 'macs<=50%' "
            "-o plan.json",
            "rankopt search nets.py:build --weights net.pt --input 1,3,32,32 --budget 'params<=40%'"
            " --calibration data.py:inputs --fisher -o plan.json",
            "rankopt search nets.py:build --weights net.pt --input 8,3,32,32 --budget "
            "'latency<=70%' -o plan.json",
        ),
    )  # fmt: skip
    search.add_argument(
        "--budget",
        help="bounds on the whole model, separated by commas, such as 'macs<=50%%', 'params<=40%%, "
        "latency<=70%%', 'latency_ms<=8' or 'metric_drop<=0.01, minimize=macs' (default: the "
        "strategy decides how much to compress)",
    )
    search.add_argument(
        "-o", "--output", metavar="PLAN.json", help="file to write the plan to (default: none)"
    )
    search.add_argument(
        "--timeout", type=float, metavar="SECONDS",
        help="give up after this many seconds (default: no limit)",
    )  # fmt: skip
    evaluate_option(search, "for budgets on metric_drop and the strategy optuna")
    calibration_option(search, "ranks and factors then follow the layers' outputs on them")
    search_options(search)
    timing_options(search, cached=True)
    search.set_defaults(run=_search)


def _add_apply(commands: Any, model: argparse.ArgumentParser) -> None:
    apply = add_command(
        commands, "apply", parents=[model],
        summary="build the compressed model of a plan and save it",
        description="Decompose the layers of MODEL as a plan says and save the compressed model "
        "with its plan.",
        examples=(
            "rankopt apply torchvision:resnet18 plan.json --weights DEFAULT -o small.safetensors",
        ),
    )  # fmt: skip
    apply.add_argument("plan", metavar="PLAN.json", help="the plan, from `rankopt search`")
    apply.add_argument(
        "-o", "--output", metavar="OUT.safetensors", required=True,
        help="file to write the compressed model to",
    )  # fmt: skip
    calibration_option(apply, "those that the plan was made with; needed if it was")
    apply.set_defaults(run=_apply)


def _add_recover(commands: Any, model: argparse.ArgumentParser) -> None:
    recover = add_command(
        commands, "recover", parents=[model],
        summary="train a compressed model towards the original's outputs, without labels",
        description="Train a compressed model within a time limit to give the outputs of MODEL on "
        "unlabelled inputs, and save it. Inputs held out measure what was gained; if that is "
        "nothing, the weights stay as they were.",
        examples=(
            "rankopt recover nets.py:build small.safetensors --weights net.pt --calibration "
            "data.py:inputs --seconds 120 -o recovered.safetensors",
        ),
    )  # fmt: skip
    recover.add_argument(
        "artefact", metavar="COMPRESSED", help="compressed model, from `rankopt apply`"
    )
    recover.add_argument(
        "-o", "--output", metavar="OUT.safetensors", required=True,
        help="file to write the recovered model to",
    )  # fmt: skip
    calibration_option(recover, "15/16 are trained on, the rest measure", required=True)
    recover.add_argument(
        "--seconds", type=float, default=60.0, metavar="SECONDS",
        help="limit on the whole of it, in seconds (default 60)",
    )  # fmt: skip
    recover.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="samples per step (default 64)"
    )
    recover.add_argument(
        "--learning-rate", type=float, metavar="RATE",
        help="Adam's at the start (default 1e-3 for models with BatchNorm, else 3e-4)",
    )  # fmt: skip
    recover.set_defaults(run=_recover)


def _add_compare(commands: Any, model: argparse.ArgumentParser) -> None:
    compare = add_command(
        commands, "compare", parents=[model],
        summary="measure a compressed model against the original",
        description="Count parameters, memory and MACs of both models, time them in turns on this "
        "machine, and compare their outputs and, with --evaluate, their metric.",
        examples=(
            "rankopt compare torchvision:resnet18 small.safetensors --weights DEFAULT",
            "rankopt compare nets.py:build plan.json --weights net.pt --input 8,3,32,32 "
            "--evaluate data.py:accuracy",
        ),
    )  # fmt: skip
    compare.add_argument(
        "artefact", metavar="ARTEFACT",
        help="compressed model (.safetensors), or a plan (.json) to build it by",
    )  # fmt: skip
    evaluate_option(compare, "called with both models")
    compare.add_argument(
        "--rounds", type=int, default=30, metavar="N",
        help="how often each model is timed (default 30)",
    )  # fmt: skip
    calibration_option(compare, "those that a plan was made with; needed if it was")
    timing_options(compare)
    compare.set_defaults(run=_compare)


def _add_profile(commands: Any, model: argparse.ArgumentParser) -> None:
    profile = add_command(
        commands, "profile", parents=[model],
        summary="measure the time of one layer at many ranks",
        description="Time a layer of MODEL as it is and decomposed at many ranks, on the input it "
        "gets in the model, to see which ranks are fast on this machine.",
        examples=(
            "rankopt profile torchvision:resnet18 --layer layer4.0.conv1",
            "rankopt profile nets.py:build --input 8,3,32,32 --layer 0 --method svd "
            "--ranks 8:128:8 --plot times.html",
        ),
    )  # fmt: skip
    profile.add_argument(
        "--layer", required=True, metavar="NAME", help="full module name, such as layer4.0.conv1"
    )
    profile.add_argument(
        "--method", metavar="NAME",
        help="decomposition, such as svd, tucker2, spatial_svd, cp or tt (default: the first that "
        "can treat the layer)",
    )  # fmt: skip
    profile.add_argument(
        "--ranks", metavar="R,R,...|FIRST:LAST[:STEP]",
        help="ranks to time (default: a grid, and both sides of each jump in time)",
    )  # fmt: skip
    profile.add_argument(
        "--rounds", type=int, default=ROUNDS, metavar="N",
        help=f"how often each rank is timed, in turns (default {ROUNDS})",
    )  # fmt: skip
    profile.add_argument(
        "--plot", metavar="FILE.html",
        help="draw time against rank to this file (needs plotly; default: none)",
    )  # fmt: skip
    timing_options(profile, cached=True)
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


def _recover(arguments: argparse.Namespace) -> int:
    import rankopt
    from rankopt.checkpoint import check_target

    check_target(arguments.output)
    model, _ = model_and_inputs(arguments)
    small = rankopt.load(model, arguments.artefact)
    _check_weights(model, small, arguments.artefact, "it is trained towards the wrong outputs")
    done = rankopt.recover(
        small,
        teacher=model,
        calibration=made(arguments.calibration),
        seconds=arguments.seconds,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
    )
    rankopt.save(small, arguments.output)
    if arguments.json:
        print(strict_json({"output": arguments.output, **asdict(done)}))
        return 0
    print(done)
    print(f"{arguments.output} written")
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
            _check_weights(
                model, small, arguments.artefact, "metrics say nothing about what compression lost"
            )
    result = rankopt.compare(
        model,
        small,
        example_inputs=inputs,
        evaluate=function(arguments.evaluate),
        rounds=arguments.rounds,
        **timing(arguments),
        seed=arguments.seed,
    )
    if arguments.json:
        print(strict_json(result.to_dict()))
        return 0
    print(result)
    if hint := option_hint(str(result)):
        print(hint)
    return 0


def _check_weights(model: Any, small: Any, path: str, consequence: str) -> None:
    """Warn where a result is held against a model that it was not made from."""
    from rankopt._build.provenance import plan_of
    from rankopt._model import measure

    plan = plan_of(small)
    made_from = None if plan is None else plan.model.get("weights")
    if made_from is not None and made_from != measure.weights_digest(model):
        warn(
            f"{path} was made from other weights than MODEL has, or in several rounds; if from "
            f"others, {consequence}: give their --weights"
        )


def _profile(arguments: argparse.Namespace) -> int:
    import rankopt
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
        table=table(arguments, rounds=arguments.rounds),
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

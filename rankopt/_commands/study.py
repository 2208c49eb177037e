"""``rankopt study …``: make a study, join it from any process, and read it."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import Any, Final, Literal

from rankopt._commands.options import (
    INTERRUPTED,
    add_command,
    calibration_option,
    check_output,
    evaluate_option,
    function,
    give_plan,
    listed,
    made,
    model_and_inputs,
    placed,
    timing,
    timing_options,
)
from rankopt._commands.searching import rank_options
from rankopt._study.reading import DEFAULT_NAME
from rankopt._study.samplers import DEFAULT_SAMPLER, SAMPLERS
from rankopt._study.space import SPACES
from rankopt._study.storage import DEFAULT_STORAGE, HEARTBEAT_SECONDS
from rankopt._utils.strict_json import strict_json
from rankopt.strategy import LATENCY

__all__ = ["add_study"]

CHOICES: Final[dict[Any, bool | Literal["search"]]] = {
    "yes": True, "no": False, "search": "search"
}  # fmt: skip


def add_study(
    commands: Any, common: argparse.ArgumentParser, model: argparse.ArgumentParser
) -> None:
    """Add the command to a parser's subcommands.

    Args:
        commands: From `argparse.ArgumentParser.add_subparsers`.
        common: Options of every command.
        model: Options that name a model.
    """
    study = commands.add_parser(
        "study", help="search plans by trials on the task's metric, resumable, in many processes",
        description="Search plans by trials on the task's metric. A study lives in a storage that\n"
        "any number of workers join; it survives their end.",
        epilog="`rankopt study ACTION --help` describes the options of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    actions = study.add_subparsers(required=True, metavar="ACTION", help="what to do:")
    where, data = _where(), _data()
    _add_create(actions, [model, where, data])
    _add_worker(actions, [model, where, data])

    status = add_command(
        actions, "status", parents=[common, where],
        summary="show how many trials there are, and the front",
        description="Show how many trials are done, running and failed, and the plans that no "
        "other beats in both size and metric.",
        examples=("rankopt study status --storage study.db",),
    )  # fmt: skip
    status.set_defaults(run=_status)

    best = add_command(
        actions, "best", parents=[common, where],
        summary="show the best plan within a budget",
        description="Show the plan of the best metric within a budget, and write it with -o.",
        examples=("rankopt study best --storage study.db --budget 'macs<=40%' -o plan.json",),
    )  # fmt: skip
    best.add_argument(
        "--budget", help="bounds on the whole model, such as 'macs<=40%%' (default: the study's)"
    )
    best.add_argument(
        "-o", "--output", metavar="PLAN.json", help="file to write the plan to (default: none)"
    )
    best.set_defaults(run=_best)

    export = add_command(
        actions, "export", parents=[common, where],
        summary="write every plan of the front",
        description="Write the plans that no other beats in both size and metric, and the status "
        "of the study, to a folder.",
        examples=("rankopt study export --storage study.db --figures -o front",),
    )  # fmt: skip
    export.add_argument(
        "-o", "--output", metavar="FOLDER", required=True, help="folder to write to"
    )
    export.add_argument(
        "--figures", action="store_true", help="write HTML figures as well (needs plotly)"
    )
    export.set_defaults(run=_export)


def _where() -> argparse.ArgumentParser:
    """Options that name a study."""
    parser = argparse.ArgumentParser(add_help=False)
    where = parser.add_argument_group("storage options")
    where.add_argument(
        "--storage", default=DEFAULT_STORAGE, metavar="URL",
        help="where the study is kept: a path (SQLite), a path that ends in .journal, "
        f"postgresql+psycopg://… or grpc://HOST:PORT (default {DEFAULT_STORAGE})",
    )  # fmt: skip
    where.add_argument(
        "--name",
        help=f"the study's name in the storage (default: {DEFAULT_NAME}, or the only study that is "
        "there to read)",
    )  # fmt: skip
    return parser


def _data() -> argparse.ArgumentParser:
    """Options of those who run trials, or prepare them."""
    data = argparse.ArgumentParser(add_help=False)
    evaluate_option(data, "measured in every trial; with --batches evaluate(model, batch)",
                    required=True)  # fmt: skip
    data.add_argument(
        "--batches", metavar="FILE.py:CALLABLE",
        help="a function that returns the batches of evaluate(model, batch), so that hopeless "
        "trials can be stopped early (default: evaluate(model) is called once)",
    )  # fmt: skip
    calibration_option(data, "ranks and factors then follow the layers' outputs on them; the same "
                       "for all workers")  # fmt: skip
    data.add_argument(
        "--sampler", choices=tuple(SAMPLERS),
        help=f"what proposes trials (default: the study's, {DEFAULT_SAMPLER} for a new one)",
    )  # fmt: skip
    data.add_argument(
        "--heartbeat", type=int, default=HEARTBEAT_SECONDS, metavar="SECONDS",
        help="seconds between liveness signals; must be equal for all workers (default "
        f"{HEARTBEAT_SECONDS})",
    )  # fmt: skip
    device = data.add_argument_group("device options")
    device.add_argument(
        "--device", default="auto",
        help="cpu, cuda:N, or auto (default): a CUDA device that no other worker on this machine "
        "uses, or the CPU if there is no CUDA",
    )  # fmt: skip
    device.add_argument(
        "--share-device", action="store_true", help="allow a device that other workers use too"
    )
    device.add_argument(
        "--threads", type=int, metavar="N",
        help="CPU threads of this process, pinned to N cores that no other worker is pinned to "
        "(default: torch's own number, not pinned)",
    )  # fmt: skip
    return data


def _add_create(actions: Any, parents: Sequence[argparse.ArgumentParser]) -> None:
    create = add_command(
        actions, "create", parents=parents,
        summary="make a study",
        description="Make a study and queue its first trials, the plans of other strategies. Run "
        "trials with `rankopt study worker`.",
        examples=(
            "rankopt study create nets.py:build --weights net.pt --input 1,3,32,32 --evaluate "
            "data.py:accuracy --storage study.db",
            "rankopt study create nets.py:build --weights net.pt --input 8,3,32,32 --evaluate "
            "data.py:accuracy --objective latency --sizes 0.8,0.6 --storage study.db",
        ),
    )  # fmt: skip
    search = create.add_argument_group("search options")
    search.add_argument(
        "--budget",
        help="bounds that every plan keeps to, such as 'macs<=50%%' (default: none, the whole "
        "front is searched)",
    )
    search.add_argument(
        "--objective", choices=("macs", "params", "memory", LATENCY),
        help="what to make small beside a good metric (default: latency under a budget on it, "
        "else macs with example inputs, else params)",
    )  # fmt: skip
    search.add_argument(
        "--direction", choices=["maximize", "minimize"],
        help="whether the metric is better when higher or lower (default maximize)",
    )  # fmt: skip
    search.add_argument(
        "--space", choices=tuple(SPACES),
        help="what a trial chooses: the size and a few multipliers over the layers' sensitivities "
        "(warp, the default), the size and a multiplier per layer (tilt), one share per stage of "
        "the network (stage), or one share per layer (layer)",
    )  # fmt: skip
    search.add_argument(
        "--sizes", metavar="SHARES", type=_shares,
        help="shares of the objective that plans are wanted at, such as 0.7,0.5,0.35 (default: "
        "trials choose the size)",
    )  # fmt: skip
    search.add_argument(
        "--fisher", choices=tuple(CHOICES),
        help="weigh the errors of layers by their effect on the model's outputs, the Fisher "
        "information; search lets each trial choose (default no; needs --calibration)",
    )  # fmt: skip
    search.add_argument(
        "--asymmetric", choices=tuple(CHOICES),
        help="fit each layer to the outputs of the compressed layers before it; search lets each "
        "trial choose (default no; needs --calibration)",
    )  # fmt: skip
    rank_options(search)
    timing_options(create, device=False)
    create.set_defaults(run=_create)


def _add_worker(actions: Any, parents: Sequence[argparse.ArgumentParser]) -> None:
    worker = add_command(
        actions, "worker", parents=parents,
        summary="run trials of a study",
        description="Run trials of a study that `rankopt study create` made, with the same model, "
        "data and metric. Start as many workers as there are devices; Ctrl-C and SIGTERM end one "
        "without loss.",
        examples=(
            "rankopt study worker nets.py:build --weights net.pt --input 1,3,32,32 --evaluate "
            "data.py:accuracy --storage study.db --n-trials 200",
        ),
    )  # fmt: skip
    worker.add_argument(
        "--n-trials", type=int, metavar="N",
        help="stop when the study has N trials, those of all workers together (default: no limit)",
    )  # fmt: skip
    worker.add_argument(
        "--timeout", type=float, metavar="SECONDS",
        help="start no trial after this many seconds (default: no limit)",
    )  # fmt: skip
    worker.add_argument(
        "--confidence", type=float, default=0.99, metavar="SHARE",
        help="stop a trial early when it is hopeless with this confidence, above 0.5 and below 1 "
        "(default 0.99; 0 never stops one)",
    )  # fmt: skip
    worker.set_defaults(run=_worker)


def _shares(text: str) -> list[float]:
    """Numbers separated by commas; argparse says what was got if they are none."""
    return [float(part) for part in text.split(",")]


def _claimed(arguments: argparse.Namespace, *, share: bool = False) -> Any:
    """The device named by a command line, held until the block ends."""
    from rankopt._study.devices import claim_device

    shared = share or arguments.share_device
    return claim_device(arguments.device, share=shared, threads=arguments.threads)


def _open(arguments: argparse.Namespace, device: Any, *, create: bool, **more: Any) -> Any:
    """The study named by a command line, with the model and data named there too."""
    import rankopt

    model, inputs = model_and_inputs(arguments)
    return rankopt.study(
        placed(model, device),
        evaluate=function(arguments.evaluate),
        batches=made(arguments.batches),
        calibration=made(arguments.calibration),
        storage=arguments.storage,
        name=arguments.name or DEFAULT_NAME,
        sampler=arguments.sampler,
        heartbeat=arguments.heartbeat,
        example_inputs=inputs,
        create=create,
        **more,
    )


def _create(arguments: argparse.Namespace) -> int:
    import rankopt

    # Only times need a device of their own.
    share = arguments.objective != "latency" and "latency" not in (arguments.budget or "")
    with (
        _claimed(arguments, share=share) as device,
        _open(
            arguments,
            device,
            create=True,
            profile=rankopt.ProfileTable(**timing(arguments)),
            budget=arguments.budget,
            objective=arguments.objective,
            direction=arguments.direction,
            space=arguments.space,
            sizes=arguments.sizes,
            fisher=CHOICES.get(arguments.fisher),
            asymmetric=CHOICES.get(arguments.asymmetric),
            methods=listed(arguments.methods),
            only=arguments.only,
            ignore=arguments.ignore,
            round_to=arguments.round_to,
            rounding=arguments.rounding,
            seed=arguments.seed,
        ) as study,
    ):
        return _show(study.status(), arguments)


def _worker(arguments: argparse.Namespace) -> int:
    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    with (
        _claimed(arguments) as device,
        _open(
            arguments, device, create=False, confidence=arguments.confidence or None, seed=None
        ) as study,
    ):
        signal.signal(signal.SIGTERM, stop)
        try:
            study.run(arguments.n_trials, timeout=arguments.timeout)
        except KeyboardInterrupt:
            print(
                "interrupted; finished trials are kept and the one at hand is queued again: run "
                "the same command to go on",
                file=sys.stderr,
            )
            return INTERRUPTED
        return _show(study.status(), arguments)


def _load(arguments: argparse.Namespace) -> Any:
    import rankopt

    return rankopt.Study.load(arguments.storage, name=arguments.name)


def _status(arguments: argparse.Namespace) -> int:
    with _load(arguments) as study:
        return _show(study.status(), arguments)


def _best(arguments: argparse.Namespace) -> int:
    check_output(arguments.output)
    with _load(arguments) as study:
        plan = study.best(arguments.budget)
    code = give_plan(plan, arguments)
    lead = plan.extensions["study"].get("lead")
    if lead and not arguments.json:
        error = lead["standard_error"]
        known = f" ± {error:.3g} (standard error)" if error is not None else ""
        print(
            f"{lead['gain']:+.3g}{known} against {lead['over']} (trial {lead['trial']}), the best "
            "plan here that the study began with"
        )
    return code


def _export(arguments: argparse.Namespace) -> int:
    from rankopt._study.views import export

    with _load(arguments) as study:
        written = export(study, arguments.output, figures=arguments.figures)
    if arguments.json:
        print(strict_json([str(path) for path in written]))
    else:
        print(f"{len(written)} files written to {arguments.output}")
    return 0


def _show(status: dict[str, Any], arguments: argparse.Namespace) -> int:
    if arguments.json:
        print(strict_json(status))
        return 0
    from rankopt._study.views import status_view
    from rankopt._utils.tables import show

    show(*status_view(status))
    return 0

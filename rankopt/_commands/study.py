"""``rankopt study …``: make a study, join it from any process, and read it."""

from __future__ import annotations

import argparse
import signal
import sys
from typing import Any, Final, Literal

from rankopt._commands.options import (
    INTERRUPTED,
    calibration_option,
    check_output,
    function,
    give_plan,
    listed,
    made,
    model_and_inputs,
    placed,
    timing,
    timing_options,
)
from rankopt._utils.strict_json import strict_json

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
    study = commands.add_parser("study", help="trials on the real metric, resumable, distributed")
    actions = study.add_subparsers(required=True, metavar="ACTION")
    where = argparse.ArgumentParser(add_help=False)
    where.add_argument(
        "--storage", default=None, metavar="URL",
        help="path (SQLite), *.journal, postgresql+psycopg://…, grpc://host:port",
    )  # fmt: skip
    where.add_argument("--name", default=None, help="the study's name in the storage")
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument(
        "--evaluate", metavar="FILE.py:CALLABLE", required=True, help="metric of a model"
    )
    data.add_argument(
        "--batches",
        metavar="FILE.py:CALLABLE",
        help="gives the batches of evaluate(model, batch)",
    )
    calibration_option(data, "makes unlabelled inputs, for better ranks and factors")
    data.add_argument(
        "--device", default="auto",
        help="auto (a CUDA device that no other worker here has, else the CPU), cpu or cuda:N",
    )  # fmt: skip
    data.add_argument(
        "--share-device", action="store_true", help="take a device although others have it"
    )
    data.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="for torch, on N cores no other worker is pinned to",
    )
    data.add_argument("--sampler", help="tpe, local, nsgaii, nsgaiii, gp, random, …")
    data.add_argument(
        "--heartbeat", type=int, metavar="SECONDS", help="between signs of life; same for all"
    )

    create = actions.add_parser("create", parents=[model, where, data], help="make a study")
    create.add_argument("--budget", help="such as 'macs<=50%%'; left out, the whole front")
    create.add_argument("--objective", help="macs, params, memory or latency")
    create.add_argument("--direction", choices=["maximize", "minimize"], help="of the metric")
    create.add_argument("--space", help="warp, tilt, stage or layer")
    create.add_argument(
        "--sizes", metavar="SHARES", type=_shares,
        help="shares of the objective that plans are wanted at, such as 0.7,0.5,0.35",
    )  # fmt: skip
    create.add_argument(
        "--fisher", choices=list(CHOICES),
        help="weigh outputs by the Fisher information; search lets trials choose",
    )  # fmt: skip
    create.add_argument(
        "--asymmetric", choices=list(CHOICES),
        help="fit layers to what those before pass on; search lets trials choose",
    )  # fmt: skip
    create.add_argument("--methods", help="decompositions to allow, comma-separated")
    create.add_argument("--only", action="append", metavar="GLOB")
    create.add_argument("--ignore", action="append", metavar="GLOB")
    create.add_argument("--round-to", type=int, metavar="N")
    timing_options(create)
    create.set_defaults(run=_create)

    worker = actions.add_parser("worker", parents=[model, where, data], help="run trials")
    worker.add_argument("--n-trials", type=int, metavar="N", help="of the study in all")
    worker.add_argument("--timeout", type=float, metavar="SECONDS")
    worker.add_argument(
        "--confidence", type=float, default=0.99, help="of stopping a trial early; 0 for never"
    )
    worker.set_defaults(run=_worker)

    status = actions.add_parser("status", parents=[common, where], help="how a study stands")
    status.set_defaults(run=_status)

    best = actions.add_parser("best", parents=[common, where], help="the best plan in a budget")
    best.add_argument("--budget", help="left out, the study's own")
    best.add_argument("-o", "--output", metavar="PLAN.json")
    best.set_defaults(run=_best)

    export = actions.add_parser("export", parents=[common, where], help="every Pareto plan")
    export.add_argument("-o", "--output", metavar="FOLDER", required=True)
    export.add_argument("--figures", action="store_true", help="HTML figures too (needs plotly)")
    export.set_defaults(run=_export)


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
    from rankopt._study.reading import DEFAULT_NAME
    from rankopt._study.storage import DEFAULT_STORAGE, HEARTBEAT_SECONDS

    model, inputs = model_and_inputs(arguments)
    return rankopt.study(
        placed(model, device),
        evaluate=function(arguments.evaluate),
        batches=made(arguments.batches),
        calibration=made(arguments.calibration),
        storage=arguments.storage or DEFAULT_STORAGE,
        name=arguments.name or DEFAULT_NAME,
        sampler=arguments.sampler,
        heartbeat=HEARTBEAT_SECONDS if arguments.heartbeat is None else arguments.heartbeat,
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
    from rankopt._study.storage import DEFAULT_STORAGE

    return rankopt.Study.load(arguments.storage or DEFAULT_STORAGE, name=arguments.name)


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

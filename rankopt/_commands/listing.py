"""``rankopt strategies`` and ``demo``."""

from __future__ import annotations

import argparse
from dataclasses import is_dataclass
from typing import Any

from rankopt._commands.options import add_command
from rankopt._utils.strict_json import strict_json
from rankopt.errors import RankoptError

__all__ = ["add_listing"]


def add_listing(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the commands to a parser's subcommands.

    Args:
        commands: From `argparse.ArgumentParser.add_subparsers`.
        common: Options of every command.
    """
    strategies = add_command(
        commands, "strategies", parents=[common],
        summary="list the strategies and their settings",
        description="List the installed strategies of `rankopt search`: what each does and needs, "
        "and its settings with their defaults, for --set.",
        examples=("rankopt strategies", "rankopt strategies --json"),
    )  # fmt: skip
    strategies.set_defaults(run=_strategies)

    demo = add_command(
        commands, "demo", parents=[common],
        summary="train a small network on handwritten digits and compress it",
        description="Train a small residual network on scikit-learn's handwritten digits, halve "
        "its MACs by every strategy, and compare accuracy, size and time. Takes about a minute "
        "on a CPU; nothing is downloaded.",
        examples=("rankopt demo", "rankopt demo --output digits"),
    )  # fmt: skip
    demo.add_argument(
        "--output", metavar="FOLDER",
        help="folder to keep the best plan and its weights in (default: none are kept)",
    )  # fmt: skip
    demo.set_defaults(run=_demo)


def _strategies(arguments: argparse.Namespace) -> int:
    from rankopt.registry import strategies

    rows: list[dict[str, Any]] = []
    for name in strategies.names():
        row: dict[str, Any] = {"name": name, "from": strategies.origin(name)}
        try:
            cls = strategies.get(name)
            row["settings"] = vars(cls()) if is_dataclass(cls) else {}
        except RankoptError as error:
            row["error"] = str(error)
        except Exception as error:  # a plug-in's own
            row["error"] = f"cannot be made without settings: {type(error).__name__}: {error}"
        else:
            row["summary"] = (cls.__doc__ or "").strip().partition("\n")[0]
            row["needs"] = sorted(cls.tags.needs)
        rows.append(row)
    if arguments.json:
        print(strict_json(rows, default=str))
        return 0
    from rankopt._utils.tables import show, table

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
    from rankopt._commands.demo import run

    result = run(arguments.output, quiet=arguments.json)
    if arguments.json:
        print(strict_json(result))
    return 0

"""``rankopt strategies`` and ``demo``."""

from __future__ import annotations

import argparse
from dataclasses import is_dataclass
from typing import Any

from rankopt._utils.strict_json import strict_json
from rankopt.errors import RankoptError

__all__ = ["add_listing"]


def add_listing(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the commands to a parser's subcommands.

    Args:
        commands: From `argparse.ArgumentParser.add_subparsers`.
        common: Options of every command.
    """
    strategies = commands.add_parser("strategies", parents=[common], help="what is installed")
    strategies.set_defaults(run=_strategies)

    demo = commands.add_parser("demo", parents=[common], help="compress a network on real digits")
    demo.add_argument("--output", metavar="FOLDER", help="keep plan and weights there")
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

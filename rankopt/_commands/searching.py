"""The options of a search, for every command that runs one."""

from __future__ import annotations

import argparse
from typing import Any

from rankopt._commands.options import listed, settings

__all__ = ["search_options", "search_settings"]


def search_options(command: argparse.ArgumentParser) -> None:
    """Options of `rankopt.search` but for the budget and the data."""
    command.add_argument("--strategy", default=None, help="see `rankopt strategies`")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the strategy"
    )
    command.add_argument("--methods", help="decompositions to allow, comma-separated")
    command.add_argument("--only", action="append", default=[], metavar="GLOB")
    command.add_argument("--ignore", action="append", default=[], metavar="GLOB")
    command.add_argument("--round-to", type=int, default=1, metavar="N", help="multiples of N only")
    command.add_argument(
        "--fisher", action="store_true", help="weigh outputs by the Fisher information"
    )
    command.add_argument(
        "--asymmetric", action="store_true", help="fit layers to what those before pass on"
    )
    command.add_argument(
        "--search-factors", action="store_true",
        help="build the model without and with both of these, and take the nearest outputs",
    )  # fmt: skip


def search_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `search_options` say, for `rankopt.search`."""
    from rankopt._search.factor_choice import SEARCH
    from rankopt._search.search import DEFAULT_STRATEGY
    from rankopt.registry import strategies

    name = arguments.strategy or DEFAULT_STRATEGY
    return {
        "strategy": strategies.create(name, **settings(arguments.set)),
        "methods": listed(arguments.methods),
        "only": arguments.only,
        "ignore": arguments.ignore,
        "round_to": arguments.round_to,
        "fisher": SEARCH if arguments.search_factors else arguments.fisher,
        "asymmetric": SEARCH if arguments.search_factors else arguments.asymmetric,
    }

"""The options of a search, for every command that runs one."""

from __future__ import annotations

import argparse
from typing import Any

from rankopt._commands.options import listed, settings
from rankopt._search.search import DEFAULT_STRATEGY
from rankopt.strategy.rank_choices import ROUNDINGS

__all__ = ["rank_options", "search_options", "search_settings"]


def search_options(command: argparse.ArgumentParser) -> None:
    """Options of `rankopt.search` but for the budget and the data."""
    search = command.add_argument_group("search options")
    search.add_argument(
        "--strategy", default=DEFAULT_STRATEGY, metavar="NAME",
        help=f"how ranks are chosen (default {DEFAULT_STRATEGY}); `rankopt strategies` lists them",
    )  # fmt: skip
    search.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="a setting of the strategy, VALUE in JSON or plain text (repeatable; `rankopt "
        "strategies` lists settings and their defaults)",
    )  # fmt: skip
    rank_options(search)
    search.add_argument(
        "--fisher", action="store_true",
        help="weigh the errors of layers by their effect on the model's outputs, the Fisher "
        "information (needs calibration inputs)",
    )  # fmt: skip
    search.add_argument(
        "--asymmetric", action="store_true",
        help="fit each layer to the outputs of the compressed layers before it (needs "
        "calibration inputs)",
    )  # fmt: skip
    search.add_argument(
        "--search-factors", action="store_true",
        help="try all four combinations of --fisher and --asymmetric and keep the plan whose "
        "outputs are closest to the original's (needs calibration inputs)",
    )  # fmt: skip


def rank_options(command: Any) -> None:
    """Which layers, decompositions and ranks are allowed; what is not said is left at None.

    Args:
        command: A parser or a group of its options.
    """
    command.add_argument(
        "--methods", metavar="NAMES",
        help="decompositions to choose from, separated by commas, such as svd,tucker2,cp "
        "(default: those of the strategy, svd,tucker2,spatial_svd for most)",
    )  # fmt: skip
    command.add_argument(
        "--only", action="append", metavar="GLOB",
        help="decompose only modules whose name matches GLOB (repeatable; default: all)",
    )  # fmt: skip
    command.add_argument(
        "--ignore", action="append", metavar="GLOB",
        help="never decompose modules whose name matches GLOB (repeatable; default: none)",
    )  # fmt: skip
    command.add_argument(
        "--round-to", type=int, metavar="N",
        help="use only ranks that are multiples of N, such as 8 for tensor cores (default 1)",
    )  # fmt: skip
    command.add_argument(
        "--rounding", choices=ROUNDINGS,
        help="which multiple of N a computed rank becomes (default down)",
    )  # fmt: skip


def search_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `search_options` say, for `rankopt.search`."""
    from rankopt._search.factor_choice import SEARCH
    from rankopt.registry import strategies

    ranks = {name: getattr(arguments, name) for name in ("only", "ignore", "round_to", "rounding")}
    return {
        "strategy": strategies.create(arguments.strategy, **settings(arguments.set)),
        "methods": listed(arguments.methods),
        **{name: value for name, value in ranks.items() if value is not None},
        "fisher": SEARCH if arguments.search_factors else arguments.fisher,
        "asymmetric": SEARCH if arguments.search_factors else arguments.asymmetric,
    }

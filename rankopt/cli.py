"""The `rankopt` command: parses, hands over to a command, gives its exit code."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from rankopt import __version__
from rankopt._commands.listing import add_listing
from rankopt._commands.options import INTERRUPTED, common_options, model_options, option_hint
from rankopt._commands.pipeline import add_pipeline
from rankopt._commands.plans import add_plans
from rankopt._commands.study import add_study
from rankopt.errors import BudgetInfeasible, RankoptError, RankoptWarning

__all__ = ["main"]

FAILED: Final = 1
INFEASIBLE: Final = 3

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
        with _plain_warnings():
            code: int = arguments.run(arguments)
    except KeyboardInterrupt:
        print(
            "interrupted; no output was written (a --folder keeps finished stages)", file=sys.stderr
        )
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
        if hint := option_hint(str(error)):
            print(f"rankopt: {hint}", file=sys.stderr)
        return FAILED
    return code


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print warnings of ours as sentences: which line of a program they name means nothing here."""
    usual = warnings.formatwarning

    def plain(message: Any, category: type[Warning], *where: Any, **line: Any) -> str:
        if issubclass(category, RankoptWarning):
            return f"rankopt: warning: {message}\n"
        return usual(message, category, *where, **line)

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rankopt",
        description="Low-rank compression of trained PyTorch models under budgets.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rankopt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = common_options()
    model = model_options(common)
    add_plans(commands, model)
    add_pipeline(commands, common, model)
    add_study(commands, common, model)
    add_listing(commands, common)
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""Help texts: all options have one, and the examples are command lines that parse."""

from __future__ import annotations

import argparse
import shlex

import pytest

from rankopt import cli


def commands(parser, name=""):
    """Every (name, parser) that runs something."""
    inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not inner:
        yield name, parser
    for action in inner:
        for word, command in action.choices.items():
            yield from commands(command, f"{name} {word}".strip())


COMMANDS = dict(commands(cli._parser()))


def test_which_commands_there_are():
    assert sorted(COMMANDS) == [
        "apply", "compare", "compress", "demo", "profile", "recover", "report", "search",
        "strategies", "study best", "study create", "study export", "study status",
        "study worker",
    ]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help_text(name):
    parser = COMMANDS[name]
    bare = [action.dest for action in parser._actions if not action.help]
    assert bare == []
    optional = [
        action
        for action in parser._actions
        if action.option_strings and not action.required and action.nargs != 0
    ]
    without = [a.dest for a in optional if "default" not in a.help and a.dest != "evaluate"]
    assert set(without) <= {"train", "calibration"}  # what is left out without them
    assert parser.description
    parser.format_help()  # percent signs are escaped


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_parse(name):
    title, *lines = COMMANDS[name].epilog.splitlines()
    assert title == "Examples:"
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "rankopt"
        assert " ".join(words[1:]).startswith(name)
        cli._parser().parse_args(words[1:])


@pytest.mark.parametrize(
    "words",
    [
        ("search", "m.py:m", "--rounding", "sideways"),
        ("compress", "m.py:m", "-o", "o.safetensors", "--freezing", "all"),
        ("study", "create", "m.py:m", "--evaluate", "m.py:e", "--space", "outer"),
        ("study", "create", "m.py:m", "--evaluate", "m.py:e", "--objective", "speed"),
        ("study", "worker", "m.py:m", "--evaluate", "m.py:e", "--sampler", "best"),
    ],
)
def test_choices_are_named(words, capsys):
    with pytest.raises(SystemExit):
        cli.main(words)
    assert f"invalid choice: '{words[-1]}' (choose from" in capsys.readouterr().err

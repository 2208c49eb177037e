from __future__ import annotations

import os
import sys

from rankopt._utils.streams import stdout_to_stderr


def test_c_output_goes_to_standard_error(capfd):
    with stdout_to_stderr(without="Highs"):
        os.write(1, b"debug")
    os.write(1, b"answer")
    out, err = capfd.readouterr()
    assert (out, err) == ("answer", "debug")


def test_lines_of_the_solver_are_dropped(capfd):
    with stdout_to_stderr(without="Highs"):
        os.write(1, b"HighsMipSolverData::run();\nwarning: Highs\n")
    assert capfd.readouterr() == ("", "warning: Highs\n")


def test_without_standard_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as under `>&-`, and in daemons
    with stdout_to_stderr(without="Highs"):
        pass


def test_without_a_folder_for_temporary_files(monkeypatch, capfd):
    def refuse():
        raise FileNotFoundError

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with stdout_to_stderr(without="Highs"):
        os.write(1, b"said")
    assert capfd.readouterr() == ("said", "")

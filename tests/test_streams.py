from __future__ import annotations

import os

from rankopt._streams import stdout_to_stderr


def test_c_output_goes_to_standard_error(capfd):
    with stdout_to_stderr():
        os.write(1, b"debug")
    os.write(1, b"answer")
    out, err = capfd.readouterr()
    assert (out, err) == ("answer", "debug")

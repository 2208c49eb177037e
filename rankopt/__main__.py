"""``python -m rankopt``: the `rankopt` command."""

import sys

from rankopt.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m linearize` is the command `linearize`."""

from __future__ import annotations

import sys


def command() -> int:
    """The command, with Ctrl-C while it starts told as later on; returns its exit code."""
    try:
        from linearize.cli.main import main
    except KeyboardInterrupt:
        print("linearize: interrupted", file=sys.stderr)
        return 130
    return main()


if __name__ == "__main__":
    sys.exit(command())

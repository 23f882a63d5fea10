"""`python -m linearize` is the command `linearize`."""

from __future__ import annotations

import sys


def command() -> int:
    """Run the command and return its exit code; Ctrl-C prints one line also while the imports run."""
    try:
        from linearize.cli.main import main
    except KeyboardInterrupt:
        print("linearize: interrupted", file=sys.stderr)
        return 130
    return main()


if __name__ == "__main__":
    sys.exit(command())

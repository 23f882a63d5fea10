"""What the server says on stderr: one line each, and nothing of what prompts or answers say."""

from __future__ import annotations

import sys


def notice(line: str) -> None:
    """Print a line."""
    print(f"linearize: {line}", file=sys.stderr, flush=True)

"""The command as one of the processes that torchrun started: one of them speaks, all of them end alike."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from linearize.errors import InputError


def is_one_of_many() -> bool:
    """Whether torchrun started this process beside others; seen without importing torch."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def join(arguments: Sequence[str]) -> None:
    """Join the other processes that torchrun started; all but the first are silent from here on.

    Raises:
        InputError: a verb for one process.
    """
    if not is_one_of_many():
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no stack traces where another process has ended
    from linearize.training.distributed import start

    if not start().leads:
        logging.disable()
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    verb = next((argument for argument in arguments if not argument.startswith("-")), "")
    if verb != "convert":
        raise InputError(f"torchrun is for `convert`, {verb or 'this'} runs in one process: start it without torchrun")


def agreed(error: Exception, code: int) -> tuple[bool, int]:
    """Whether this process tells of its error, and the exit code of all that work together."""
    if not is_one_of_many():
        return True, code
    from linearize.training.distributed import outcome

    return outcome(error, code)

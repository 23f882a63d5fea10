"""The command `linearize`: the table of verbs, exit codes, and errors as one line.

One file per verb, named after it (`generate` holds `chat`, `evaluate` holds `eval` and `bench`, `export` holds
`verify`). These files import typer alone: what a verb needs is imported when it is called, so that `--help` and bad
usage cost nothing.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import version
from typing import Annotated

import typer
from typer.main import get_command

from linearize.cli.convert import convert
from linearize.cli.demo import demo
from linearize.cli.evaluate import bench, evaluate
from linearize.cli.export import export, verify
from linearize.cli.generate import chat, generate
from linearize.cli.inspect import inspect
from linearize.cli.options import each_with_its_option
from linearize.cli.plan import plan
from linearize.cli.recipes import recipes
from linearize.cli.serve import serve
from linearize.errors import InputError
from linearize.phases import shown
from linearize.storage.disk import DiskFullError, is_disk_full

DONE, FAILED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130
_PATH_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)

app = typer.Typer(
    name="linearize",
    help="Turn a pretrained Transformer into a subquadratic or hybrid model. Add --debug to any verb for a traceback.",
    add_completion=False,
    rich_markup_mode=None,
)
app.command()(demo)
app.command()(convert)
app.command()(plan)
app.command()(generate)
app.command()(chat)
app.command("eval")(evaluate)
app.command()(bench)
app.command()(inspect)
app.command()(export)
app.command()(verify)
app.command()(serve)
app.command()(recipes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 1 the work failed, 2 bad usage or input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    stderr = sys.stderr
    try:
        _join_processes(arguments)
        _flush_subnormals()
        if not debug:
            _quiet_libraries()
        arguments = each_with_its_option(arguments, "--compare")
        leads = os.environ.get("RANK", "0") == "0"
        with get_command(app).make_context("linearize", arguments) as context, shown() if leads else nullcontext():
            context.command.invoke(context)
        sys.stdout.flush()
        return DONE
    except typer.Exit as leave:
        return leave.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("linearize: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stdout = None  # the reader has gone; nothing is left to flush
        return FAILED
    except Exception as error:
        code, message = code_and_message(error)
        prints, code = _joint_outcome(error, code)
        if prints:
            if debug:
                traceback.print_exc(file=stderr)
            hint = " (add --debug for a traceback)" if code == FAILED and not debug else ""
            print(f"linearize: {message}{hint}", file=stderr)
        return code


def code_and_message(error: BaseException) -> tuple[int, str]:
    """The exit code and the one line for an error that ends a command."""
    message = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, InputError):
        return BAD_USAGE, message
    if isinstance(error, typer.TyperException):
        command = getattr(getattr(error, "ctx", None), "command_path", "linearize")
        return error.exit_code, f"{' '.join(error.format_message().split())} (see {command} --help)"
    if isinstance(error, DiskFullError):
        return FAILED, message
    if is_disk_full(error):
        return FAILED, f"no space left on the device; free some or choose another folder ({message})"
    if isinstance(error, _PATH_ERRORS) and error.filename is not None:
        return BAD_USAGE, f"{error.filename}: {error.strerror}; check the path"
    return FAILED, f"failed: {type(error).__name__}: {message}"


def _started_by_torchrun() -> bool:
    """Whether this is one of several processes of torchrun; read without importing torch."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def _join_processes(arguments: Sequence[str]) -> None:
    """Join the other processes that torchrun started; all but the first print nothing from here on.

    Raises:
        InputError: a verb that runs in one process.
    """
    if not _started_by_torchrun():
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no stack traces where another process has ended
    from linearize.training.distributed import start

    if not start().leads:
        logging.disable()
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    verb = next((argument for argument in arguments if not argument.startswith("-")), "")
    if verb != "convert":
        raise InputError(f"torchrun is for `convert`, {verb or 'this'} runs in one process: start it without torchrun")


def _joint_outcome(error: Exception, code: int) -> tuple[bool, int]:
    """Whether this process prints its error, and the exit code of all processes together."""
    if not _started_by_torchrun():
        return True, code
    from linearize.training.distributed import outcome

    return outcome(error, code)


def _flush_subnormals() -> None:
    """Round subnormal floats to 0 in every verb: CPUs compute with them tens of times slower, and decaying states are
    full of them. Only the command does this; importing the library changes no setting of torch."""
    import torch

    torch.set_flush_denormal(True)


def _quiet_libraries() -> None:
    """Silence the notices and progress bars of transformers: an error is one line on stderr."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _print_version(asked: bool) -> None:
    if asked:
        print(f"linearize {version('linearize')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the verb."""

"""The command `linearize`: the table of verbs, exit codes, and errors as one line.

One file per verb, named after it (`generate` holds `chat`, `evaluate` holds `eval` and `bench`, `export` holds
`verify`). These files import typer alone: what a verb needs is imported when it is called (`verb.start`), so that
`--help`, bad usage and the completion of a word cost a few tenths of a second.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Annotated

import typer
from typer.core import TyperCommand
from typer.main import get_command

from linearize.cli.convert import convert
from linearize.cli.demo import demo
from linearize.cli.doctor import doctor
from linearize.cli.evaluate import bench, evaluate
from linearize.cli.export import export, verify
from linearize.cli.generate import chat, generate
from linearize.cli.inspect import inspect
from linearize.cli.options import each_with_its_option
from linearize.cli.plan import plan
from linearize.cli.recipes import recipes
from linearize.cli.serve import serve
from linearize.cli.verb import DEBUG, LightVerb, Verb, Verbs
from linearize.errors import InputError, unknown
from linearize.phases import shown
from linearize.storage.disk import DiskFullError, is_disk_full
from linearize.version import __version__

DONE, FAILED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130
COMPLETION = "_LINEARIZE_COMPLETE"
"""The environment variable by which a shell asks for the completions of a word."""
PANELS = {
    "Make a student": ("demo", "convert", "plan", "recipes"),
    "Use it": ("generate", "chat", "serve", "export", "verify"),
    "Measure it": ("eval", "bench", "inspect"),
    "Help": ("doctor", "help"),
}
"""The groups of verbs in `linearize --help`; a verb in none of them is under Commands."""
_PATH_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)

app = typer.Typer(
    name="linearize",
    help="Turn a pretrained Transformer into a subquadratic or hybrid model. Add --debug to any verb for a traceback.",
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"]},
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
app.command(cls=LightVerb)(doctor)


@app.command("help", cls=LightVerb)
def help_on(
    context: typer.Context,
    verb: Annotated[str | None, typer.Argument(metavar="COMMAND", help="The command to explain.")] = None,
) -> None:
    """Show this list, or the options of a command."""
    group = context.find_root()
    if verb is None:
        print(group.get_help())
        return
    known = group.command.commands  # type: ignore[attr-defined]
    if verb not in known:
        raise unknown("command", verb, known)
    known[verb].make_context(verb, ["--help"], parent=group)  # prints and exits


for _verb in app.registered_commands:
    _name = _verb.name or (_verb.callback.__name__ if _verb.callback else "")
    _verb.rich_help_panel = next((panel for panel, names in PANELS.items() if _name in names), "Commands")
    if _verb.cls is TyperCommand:
        _verb.cls = Verb
app.registered_commands.sort(key=lambda verb: [*PANELS, "Commands"].index(str(verb.rich_help_panel)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 1 the work failed, 2 bad usage or input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    stderr = sys.stderr
    try:
        if COMPLETION in os.environ:
            get_command(app).main(prog_name="linearize")  # answers the shell and exits
        _join_processes(arguments)
        arguments = each_with_its_option(arguments, "--compare")
        leads = os.environ.get("RANK", "0") == "0"
        with get_command(app).make_context("linearize", arguments) as context, shown() if leads else nullcontext():
            context.meta[DEBUG] = debug
            context.command.invoke(context)
        sys.stdout.flush()
        return DONE
    except typer.Exit as leave:
        return leave.exit_code
    except SystemExit as leave:  # of typer, after a completion
        return int(leave.code or 0)
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


def _print_version(asked: bool) -> None:
    if asked:
        print(f"linearize {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the verb."""

"""What all verbs share: the start of the libraries behind one, and help in plain text with options in groups."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from typer.core import TyperCommand, TyperGroup

from linearize.cli.options import GROUPS

DEBUG = "linearize.debug"
"""Key of the context's `meta`: whether `--debug` was set."""


class LightVerb(TyperCommand):
    """A verb that needs no library until it imports one itself; its options are in the groups of `options.GROUPS`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options, those of a group under its title."""
        _write_groups(ctx, formatter, self.get_params(ctx))


class Verb(LightVerb):
    """A verb that works with models."""

    def invoke(self, ctx: Any) -> Any:
        """Start the libraries, once the command line is known to be right, and run the verb."""
        start(debug=bool(ctx.meta.get(DEBUG)))
        return super().invoke(ctx)


class Verbs(TyperGroup):
    """The command itself: its options, and the verbs by their `rich_help_panel`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options and the verbs."""
        _write_groups(ctx, formatter, self.get_params(ctx))
        verbs = {name: verb for name in self.list_commands(ctx) if (verb := self.get_command(ctx, name))}
        shown = {name: verb for name, verb in verbs.items() if not verb.hidden}
        width = max(map(len, shown))
        limit = formatter.width - 6 - width
        rows = [
            (_panel(verb, "Commands"), (name.ljust(width), verb.get_short_help_str(limit)))
            for name, verb in shown.items()
        ]
        _write_sections(formatter, rows)


def start(*, debug: bool) -> None:
    """Register students with transformers, as `import linearize` does in other programs, and set what the command sets:
    subnormal floats are 0, and libraries are silent without `--debug`."""
    import linearize.modeling  # noqa: F401 (registers)
    from linearize.version import report_untried_versions

    report_untried_versions()
    _flush_subnormals()
    if not debug:
        _quiet_libraries()


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


def _write_groups(ctx: Any, formatter: Any, parameters: Iterable[Any]) -> None:
    """Arguments first, then the options that must be set, the groups of options, and last the options in none."""
    rows = []
    for parameter in parameters:
        if (record := parameter.get_help_record(ctx)) is not None:
            rows.append((_group(parameter), record))
    order = ["Arguments", "Required", *GROUPS]
    _write_sections(formatter, sorted(rows, key=lambda row: order.index(row[0]) if row[0] in order else len(order)))


def _group(parameter: Any) -> str:
    """The title under which an argument or option is listed."""
    if parameter.param_type_name == "argument":
        return "Arguments"
    if parameter.required:
        return "Required"
    names = {name.lstrip("-") for name in parameter.opts}
    return _panel(parameter, next((title for title, options in GROUPS.items() if names & set(options)), "Options"))


def _panel(entry: Any, otherwise: str) -> str:
    """The group that an entry names itself."""
    panel = entry.rich_help_panel
    return panel if isinstance(panel, str) else otherwise


def _write_sections(formatter: Any, rows: Iterable[tuple[str, tuple[str, str]]]) -> None:
    """Rows of name and text, under the title of each section; sections in the order in which they first appear."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for title, record in rows:
        sections.setdefault(title, []).append(record)
    for title, records in sections.items():
        with formatter.section(title):
            formatter.write_dl(records)

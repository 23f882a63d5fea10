"""The verb `plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linearize.cli import completion
from linearize.cli.options import Base, DType, Json, Recipe, Revision, Settings, Token, count, size, specified
from linearize.cli.output import json_only, show


def plan(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="A folder with config.json, or a Hub name.")],
    recipe: Recipe = None,
    settings: Settings = None,
    tokens: Annotated[
        int | None,
        typer.Option(metavar="N", parser=count, help="Tokens of the text; default: what the stages train on."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            autocompletion=completion.planned_devices,
            help="A100-40, A100-80, H100-80, H200, B200; default: this CPU.",
        ),
    ] = None,
    devices: Annotated[
        int | None, typer.Option(metavar="N", parser=count, help="Number of devices; default: 1.")
    ] = None,
    block: Annotated[
        str | None, typer.Option(metavar="K|auto", help="Train K layers at a time in the stages that can.")
    ] = None,
    disk: Annotated[
        int | None, typer.Option(metavar="SIZE", parser=size, help="Disk that saved hidden states may use, like 2TB.")
    ] = None,
    base: Base = None,
    devices_file: Annotated[
        Path | None, typer.Option("--table", metavar="FILE", help="A YAML file of further devices.")
    ] = None,
    revision: Revision = None,
    token: Token = None,
    dtype: DType = None,
    as_json: Json = False,
) -> None:
    """Estimate memory, time and disk of a conversion.

    The teacher's config is enough; no weights are read.
    """
    from linearize.planning import plan_conversion
    from linearize.planning.report import print_plan
    from linearize.recipes.overrides import parse_settings
    from linearize.tables import stdout_console

    chosen = specified(recipe=recipe, tokens=tokens, device=device, devices=devices, table=devices_file, disk=disk)
    chosen |= specified(revision=revision, token=token, dtype=dtype)
    if block is not None:
        chosen["block"] = block if block == "auto" else count(block)
    with json_only(as_json):
        estimate = plan_conversion(
            teacher, overrides=parse_settings(settings or []) | specified(base_weights=base), **chosen
        )
    if as_json:
        show(estimate, as_json=True)
        return
    print_plan(estimate, stdout_console())

"""The verb `plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linearize.cli.options import Base, Json, count, given, size
from linearize.cli.output import json_only, show


def plan(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="A folder with config.json, or a Hub name.")],
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="A recipe's name or a .yaml file; default: window-linear.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: stages.0.micro_batch=2. May be repeated."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(metavar="N", parser=count, help="Tokens of the text; default: what stages train on.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="KIND", help="A100-40, A100-80, H100-80, H200, B200; default: this CPU.")
    ] = None,
    devices: Annotated[int | None, typer.Option(metavar="N", parser=count, help="How many; default: 1.")] = None,
    block: Annotated[
        str | None, typer.Option(metavar="K|auto", help="Train stages that can by blocks of K layers.")
    ] = None,
    disk: Annotated[
        int | None, typer.Option(metavar="SIZE", parser=size, help="Room for hidden states, like 2TB.")
    ] = None,
    base: Base = None,
    devices_file: Annotated[
        Path | None, typer.Option("--table", metavar="FILE", help="A YAML file of further devices.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Memory, time and disk of a conversion, stage by stage, from the config alone; nothing is read or trained."""
    from linearize.planning import plan_conversion
    from linearize.planning.show import plan_lines
    from linearize.recipes.overrides import parse_settings

    chosen = given(recipe=recipe, tokens=tokens, device=device, devices=devices, table=devices_file, disk=disk)
    if block is not None:
        chosen["block"] = block if block == "auto" else count(block)
    with json_only(as_json):
        found = plan_conversion(teacher, overrides=parse_settings(settings or []) | given(base_weights=base), **chosen)
    if as_json:
        show(found, as_json=True)
        return
    for line in plan_lines(found):
        print(line)

"""The verb `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from linearize.cli.options import Data, Device, Json, Model, Recipe, RemoteCode, Revision, Token, count, specified
from linearize.cli.output import json_only, show
from linearize.errors import InputError


def inspect(
    model: Model,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Measure what replacing each layer alone costs; needs --data.")
    ] = False,
    heads: Annotated[
        bool, typer.Option("--heads", help="Measure which heads of a teacher look things up, by ablation.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --heads: write a map of the scores, heads.svg and .png.")
    ] = None,
    data: Data = None,
    recipe: Recipe = None,
    tokens: Annotated[
        int | None, typer.Option(metavar="N", parser=count, help="Training tokens to measure on; default: 16384.")
    ] = None,
    backends: Annotated[
        bool, typer.Option("--backends", help="Print which backend of each operation runs here, and why.")
    ] = False,
    revision: Revision = None,
    token: Token = None,
    device: Device = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Print mixer, parameters and state bytes of each layer.

    Or how sensitive each layer is, which heads look things up, or which backends run here.
    """
    chosen = specified(data=data, recipe=recipe, tokens=tokens)
    origin = specified(revision=revision, token=token)
    if sum((sensitivity, heads, backends)) > 1:
        raise InputError("inspect takes one of --sensitivity, --heads and --backends at a time")
    if plot is not None and not heads:
        raise InputError("inspect --plot draws the scores of heads: add --heads, or leave it out")
    if heads:
        if chosen:
            raise InputError("inspect --heads writes its own text: leave --data, --recipe and --tokens out")
        from linearize.conversion.inspections import inspect_heads

        with json_only(as_json):
            result = inspect_heads(
                model, trust_remote_code=trust_remote_code, plot=plot, **origin, **specified(device=device)
            )
        show(result if as_json else {**result, "heads": _with_bars(result["heads"], "fall")}, as_json=as_json)
        return
    if backends:
        if chosen or trust_remote_code:
            raise InputError("inspect --backends takes none of --data, --recipe, --tokens and --trust-remote-code")
        from linearize.modeling.inspect import inspect_backends

        with json_only(as_json):
            result = inspect_backends(model, device=device, **origin)
        show(result, as_json=as_json)
        return
    chosen |= specified(device=device)
    if not sensitivity:
        if chosen or trust_remote_code:
            raise InputError(
                "inspect takes --data, --recipe, --tokens, --device and --trust-remote-code only with --sensitivity: "
                "add it, or leave them out"
            )
        from linearize.modeling.inspect import inspect_model

        with json_only(as_json):
            report = inspect_model(model, **origin)
        show(report, as_json=as_json)
        return
    from linearize.conversion.inspections import inspect_sensitivity

    if data is None:
        raise InputError("inspect --sensitivity measures on text: give it with --data")
    with json_only(as_json):
        result = inspect_sensitivity(model, trust_remote_code=trust_remote_code, **origin, **chosen)
    show(result if as_json else {**result, "layers": _with_bars(result["layers"], "kl")}, as_json=as_json)


def _with_bars(rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The rows, each with a bar whose length is proportional to this number."""
    largest = max((row[key] for row in rows), default=0.0)
    return [{**row, "": "#" * round(30 * row[key] / largest) if largest > 0 else ""} for row in rows]

"""The verb `inspect`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from linearize.cli.options import Data, Device, Json, Model, RemoteCode, count, given
from linearize.cli.output import json_only, show
from linearize.errors import InputError


def inspect(
    model: Model,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="What replacing each layer alone costs; needs --data.")
    ] = False,
    data: Data = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="The recipe whose mixer is tried; default: window-linear.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(metavar="N", parser=count, help="Training tokens to measure on; default: 16384.")
    ] = None,
    backends: Annotated[
        bool, typer.Option("--backends", help="Which form of each operation runs here, and why; takes --device.")
    ] = False,
    device: Device = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
) -> None:
    """Per layer: mixer, parameters and bytes of state; totals. Or: how much a teacher needs each layer."""
    if backends:
        if sensitivity or given(data=data, recipe=recipe, tokens=tokens) or trust_remote_code:
            raise InputError("inspect --backends takes --device and --json alone")
        from linearize.modeling.inspect import inspect_backends

        show(inspect_backends(model, device=device), as_json=as_json)
        return
    chosen = given(data=data, recipe=recipe, tokens=tokens, device=device)
    if not sensitivity:
        if chosen or trust_remote_code:
            raise InputError("inspect takes --data, --recipe, --tokens, --device and code only with --sensitivity")
        from linearize.modeling.inspect import inspect_model

        with json_only(as_json):
            report = inspect_model(model)
        show(report, as_json=as_json)
        return
    from linearize.conversion.prepare import inspect_sensitivity

    if data is None:
        raise InputError("inspect --sensitivity measures on text: give it with --data")
    with json_only(as_json):
        found = inspect_sensitivity(model, trust_remote_code=trust_remote_code, **chosen)
    show(found if as_json else {**found, "layers": _with_bars(found["layers"])}, as_json=as_json)


def _with_bars(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of layers with a bar as long as their KL is large."""
    most = max((row["kl"] for row in layers), default=0.0)
    return [{**row, "": "#" * round(30 * row["kl"] / most) if most > 0 else ""} for row in layers]

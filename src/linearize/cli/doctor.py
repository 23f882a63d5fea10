"""The verb `doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from linearize.cli.options import Json
from linearize.cli.output import json_only, show, show_rows
from linearize.numbers import size_text

if TYPE_CHECKING:
    from linearize.cli.environment import Diagnosis


def doctor(as_json: Json = False) -> None:
    """Check this installation.

    Versions, devices, the backend of each operation, and what each missing extra needs. Exit code 1 where something
    keeps linearize from working.
    """
    from linearize.cli.environment import diagnose
    from linearize.phases import phase

    with json_only(as_json), phase("importing torch and transformers"):
        diagnosis = diagnose()
    if as_json:
        show(diagnosis, as_json=True)
    else:
        _print(diagnosis)
    if diagnosis.problems:
        raise typer.Exit(1)


def _print(diagnosis: Diagnosis) -> None:
    """The diagnosis as tables, the problems last."""
    print(f"linearize {diagnosis.linearize} in {diagnosis.folder}")
    print(f"python {diagnosis.python}, {diagnosis.platform}")
    _table("libraries", [vars(library) for library in diagnosis.libraries])
    devices = [vars(device) for device in diagnosis.devices]
    sizes = [{key: size_text(row[key]) for key in ("memory", "free")} for row in devices]
    _table("devices", [row | size for row, size in zip(devices, sizes, strict=True)])
    _table("backends", _by_operation(diagnosis.backends))
    extras = [
        {"extra": extra.name, "brings": extra.brings, "to install it": extra.install or "installed"}
        for extra in diagnosis.extras
    ]
    _table("extras", extras)
    lines = [f"problem: {line}" for line in diagnosis.problems] + [f"note: {line}" for line in diagnosis.notes]
    print("\n" + "\n".join(lines or ["no problem"]))


def _table(title: str, rows: Sequence[dict[str, str]]) -> None:
    if rows:
        print(f"\n{title}")
        show_rows([{key: value or None for key, value in row.items()} for row in rows])


def _by_operation(backends: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """One row per operation and its backend in each kind of call, with the mixers that share it."""
    calls = list(dict.fromkeys(row["call"] for row in backends))
    chosen: dict[tuple[str, str], dict[str, str]] = {}
    for row in backends:
        chosen.setdefault((row["operation"], row["mixer"]), {})[row["call"]] = row["backend"]
    rows: dict[tuple[str, ...], list[str]] = {}
    for (operation, mixer), by_call in chosen.items():
        rows.setdefault((operation, *(by_call.get(call, "") for call in calls)), []).append(mixer)
    return [
        {"operation": key[0], **dict(zip(calls, key[1:], strict=True)), "mixers": ", ".join(mixers)}
        for key, mixers in rows.items()
    ]

"""The options that verbs share, and what their values mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from linearize.errors import InputError
from linearize.numbers import parse_count, parse_number, parse_size


def count(value: str) -> int:
    try:
        return parse_count(value)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error


def size(value: str) -> int:
    try:
        return parse_size(value)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error


def number(value: str) -> float:
    try:
        return float(parse_number(value))
    except InputError as error:
        raise typer.BadParameter(str(error)) from error


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A student's folder, or any causal LM (path or Hub name).")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="SPEC",
        help="A file (.txt, .jsonl, .json, .csv, .parquet; also .gz, .zst), or a Hub data set. May be repeated.",
    ),
]
Teacher = Annotated[str | None, typer.Option(metavar="TEACHER", help="Compare with this model.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: the GPU if there is one.")]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="8bit|4bit", help="Hold the frozen weights in 8 or 4 bits (transfer and LoRA; torchao or bitsandbytes)."
    ),
]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Seed = Annotated[int | None, typer.Option(metavar="N", parser=count, help="Seed of the sampling.")]
MaxNewTokens = Annotated[int | None, typer.Option(metavar="N", parser=count, help="Longest continuation.")]
Temperature = Annotated[
    float | None, typer.Option(metavar="X", parser=number, help="Sampling temperature; 0 is greedy.")
]


def each_with_its_option(arguments: Sequence[str], option: str) -> list[str]:
    """`--compare A B` as `--compare A --compare B`: all values up to the next option belong to it.

    Raises InputError for the option without a value.
    """
    spread: list[str] = []
    values: int | None = None  # how many the open option has had; None: it is not open
    for argument in (*arguments, "-"):
        if values is not None and argument.startswith("-"):
            if values == 0:
                raise InputError(f"{option} without a value: give one or more after it")
            values = None
        if argument == option:
            values = 0
        elif values is None:
            spread.append(argument)
        else:
            spread += [option, argument]
            values += 1
    return spread[:-1]


def names(value: str | None) -> list[str] | None:
    """`a,b` as a list."""
    return None if value is None else [name.strip() for name in value.split(",") if name.strip()]


def counts(value: str | None) -> tuple[int, ...] | None:
    """`1k,4096` as numbers."""
    return None if value is None else tuple(count(name) for name in names(value) or ())


def given(**options: Any) -> dict[str, Any]:
    """The options that were given; for the others the function that does the work has the default."""
    return {name: value for name, value in options.items() if value is not None}

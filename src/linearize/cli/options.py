"""The options that several verbs share, and the parsers of their values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from linearize.cli import completion
from linearize.errors import InputError
from linearize.numbers import parse_count, parse_number, parse_size

GROUPS = {
    "Recipe": ("recipe", "set"),
    "Text and items": (
        "data", "suite", "tasks", "include-path", "data-root", "limit", "tokens", "length", "allow-code-execution",
        "judge-url", "judge-model",
    ),
    "Model": ("teacher", "adapter", "store", "revision", "token", "trust-remote-code"),
    "Sampling": ("max-new-tokens", "temperature", "seed"),
    "Speculative decoding": ("draft", "draft-tokens", "prompt-lookup", "stats"),
    "Memory and devices": (
        "device", "device-map", "dtype", "devices", "table", "batch", "base", "stream", "memory", "disk", "block",
        "blocks", "compile",
    ),
    "Output": ("out", "overwrite", "adapter-only", "self-contained", "push-to", "private", "track", "plot", "json"),
}  # fmt: skip
"""The groups of options in `--help`; an option may name another one (`rich_help_panel`), and one in none is last."""


def count(value: str) -> int:
    """A number of things, like `4096`, `1e6` or `2M`."""
    return int(_parsed(parse_count, value))


def size(value: str) -> int:
    """A size in bytes, like `24GB`."""
    return int(_parsed(parse_size, value))


def number(value: str) -> float:
    """A number, like `0.7`."""
    return float(_parsed(parse_number, value))


def _parsed(parse: Callable[[str], int | float], value: str) -> int | float:
    try:
        return parse(value)
    except InputError as error:
        raise typer.BadParameter(str(error)) from error


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A student's folder, or any causal language model (folder or Hub name).")
]
Adapter = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="A student in adapter form (convert --adapter-only); MODEL is its teacher."),
]
Store = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        parser=count,
        help="Pairs that each head of window + linear mixers keeps exact; default: as trained.",
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="SPEC",
        help="A file (.txt, .jsonl, .json, .csv, .parquet; also .gz, .zst), or a Hub data set. May be repeated.",
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        autocompletion=completion.recipe_names,
        help="A recipe's name or a .yaml file; default: window-linear.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        autocompletion=completion.settings,
        help="Change a setting of the recipe, like plan.mixer.window=16. May be repeated.",
    ),
]
Teacher = Annotated[str | None, typer.Option(metavar="TEACHER", help="The model to compare with.")]
Device = Annotated[
    str | None, typer.Option(autocompletion=completion.devices, help="cpu or cuda; default: the GPU if there is one.")
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="8bit|4bit",
        autocompletion=completion.bases,
        help="Quantize the frozen weights to 8 or 4 bits (attention transfer and LoRA; torchao or bitsandbytes).",
    ),
]
Revision = Annotated[
    str | None, typer.Option(metavar="REVISION", help="A branch, tag or commit, where the model is a Hub name.")
]
Token = Annotated[
    str | None, typer.Option(metavar="TOKEN", help="To read from and write to the Hub; better set HF_TOKEN.")
]
DType = Annotated[
    str | None, typer.Option(metavar="NAME", help="Load in float32, bfloat16 or float16; default: as it is stored.")
]
DeviceMap = Annotated[
    str | None, typer.Option(metavar="auto|DEVICE", help="As transformers takes it; in the place of --device.")
]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Allow code that comes with the model.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Seed = Annotated[int | None, typer.Option(metavar="N", parser=count, help="Seed of the sampling.")]
MaxNewTokens = Annotated[int | None, typer.Option(metavar="N", parser=count, help="Generate at most N tokens.")]
Temperature = Annotated[
    float | None, typer.Option(metavar="X", parser=number, help="Sampling temperature; 0 is greedy.")
]


def each_with_its_option(arguments: Sequence[str], option: str) -> list[str]:
    """Spell `--compare A B` as `--compare A --compare B`: all values up to the next option belong to it.

    Raises:
        InputError: the option without a value.
    """
    spread: list[str] = []
    values: int | None = None  # of the option that is being read; None: of no such option
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
    """Split `a,b` into a list."""
    return None if value is None else [name.strip() for name in value.split(",") if name.strip()]


def counts(value: str | None) -> tuple[int, ...] | None:
    """Split `1k,4096` into numbers."""
    return None if value is None else tuple(count(name) for name in names(value) or ())


def specified(**options: Any) -> dict[str, Any]:
    """The options that the user set; the function that does the work has the defaults of the others."""
    return {name: value for name, value in options.items() if value is not None}

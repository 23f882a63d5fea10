"""The verbs `export` and `verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linearize.cli import completion
from linearize.cli.options import Json, Overwrite, RemoteCode, Revision, Token, specified
from linearize.cli.output import json_only, show
from linearize.errors import InputError, unknown

if TYPE_CHECKING:
    from linearize.modeling.export.verify import Verification

Python = Annotated[
    Path | None, typer.Option(metavar="PATH", help="A Python that has the engine; default: the one that runs this.")
]


def export(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="A student's folder, or its Hub name.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="TARGET",
            autocompletion=completion.targets,
            help="granite-hybrid or qwen3.5 (native), hf (with its own code), or mlx (for mlx-lm).",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the exported model.")],
    overwrite: Overwrite = False,
    verify: Annotated[
        str | None,
        typer.Option(
            metavar="ENGINE",
            autocompletion=completion.engines,
            help="Then compare with this engine: transformers, mlx, vllm or llama.cpp (see `verify`).",
        ),
    ] = None,
    python: Python = None,
    trust_remote_code: RemoteCode = False,
    revision: Revision = None,
    token: Token = None,
) -> None:
    """Write a student for programs that do not have linearize."""
    from linearize.modeling.export import export_student
    from linearize.modeling.export.verify import ENGINES
    from linearize.modeling.export.verify import verify as compare

    if verify is None and (python is not None or trust_remote_code):
        raise InputError("export takes --python and --trust-remote-code only with --verify: add it, or leave them out")
    if verify is not None and verify not in ENGINES:
        raise unknown("engine", verify, ENGINES)
    origin = specified(revision=revision, token=token)
    print(f"exported to {export_student(student, to, out, overwrite=overwrite, **origin)}")
    if verify is not None:
        _show_verification(compare(out, student, verify, python=python, trust_remote_code=trust_remote_code, **origin))


def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What `export` wrote, or (vllm) a student.")],
    student: Annotated[
        str | None, typer.Option(metavar="STUDENT", help="The student that it was written from; default: FOLDER.")
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            "--with", metavar="ENGINE", autocompletion=completion.engines, help="transformers, mlx, vllm or llama.cpp."
        ),
    ] = "transformers",
    python: Python = None,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Prompts in the place of ours: .jsonl rows with `turns`, `prompt` or `text`, a folder of such files, "
            "or texts between blank lines; the answers must then be those of generate. May be repeated.",
        ),
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="At most so many of --prompts, in turn from its files.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to write after each prompt; default: 30.")] = None,
    trust_remote_code: RemoteCode = False,
    revision: Revision = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Compare a folder in an engine with its student.

    Greedy tokens and their log-probabilities, after five prompts; exit code 1 where they differ.
    """
    from linearize.modeling.export.prompts import read_prompts
    from linearize.modeling.export.verify import NEW
    from linearize.modeling.export.verify import verify as compare

    if num_prompts is not None and not prompts:
        raise InputError("--num-prompts says how many of --prompts are read: add it, or leave both out")
    texts = read_prompts(prompts, num_prompts) if prompts else None
    origin = specified(revision=revision, token=token)
    with json_only(as_json):
        result = compare(
            folder, student or str(folder), engine, python=python, new=tokens or NEW, prompts=texts,
            trust_remote_code=trust_remote_code, **origin,
        )  # fmt: skip
    _show_verification(result, as_json=as_json)


def _show_verification(result: Verification, *, as_json: bool = False) -> None:
    """Show what was compared; exit code 1 where it differs."""
    show(result.model_dump() | {"passed": result.passed}, as_json=as_json)
    if not result.passed:
        raise typer.Exit(1)

"""The verb `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linearize.cli.options import Overwrite


def export(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="A student's folder, or its Hub name.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="TARGET", help="granite-hybrid or qwen3.5 (native), hf (with its own code), or mlx (for mlx-lm)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the exported model.")],
    overwrite: Overwrite = False,
) -> None:
    """Write a student for programs that do not have linearize."""
    from linearize.modeling.export import export_student

    print(f"exported to {export_student(student, to, out, overwrite=overwrite)}")

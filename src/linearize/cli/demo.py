"""The verb `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linearize.cli.options import specified


def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the student, a text and plots; default: linearize-demo. An earlier demo there is replaced."
        ),
    ] = None,
) -> None:
    """Convert the packaged teacher and show the result.

    Takes under 3 minutes on 2 cores.
    """
    from linearize.demo.run import run_demo

    run_demo(**specified(out=out))

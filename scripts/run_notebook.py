"""Run the cells of a notebook in order, and write what they print into it: `python scripts/run_notebook.py FILE`."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def run_cells(notebook: dict[str, Any]) -> dict[str, Any]:
    """Run the code cells in one namespace and put their standard output into them; returns the namespace.

    Raises whatever a cell raises, with the cell's number in the name of its file.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
        text = printed.getvalue()
        stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(True)}
        cell |= {"execution_count": number, "outputs": [stream] if text else []}
    return namespace


def main(path: Path) -> None:
    """Run a notebook and replace its outputs."""
    notebook = json.loads(path.read_text("utf-8"))
    run_cells(notebook)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

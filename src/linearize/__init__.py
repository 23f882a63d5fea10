"""linearize: pretrained Transformers with linear-time attention.

    student = linearize.convert("path/or/hub-id", recipe="window-linear", data=["stories.txt"], out="student")
    model = linearize.load("student")

Importing this package registers students with transformers, so that `AutoModelForCausalLM.from_pretrained` loads them.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from linearize.version import __version__, report_untried_versions


def _is_the_command() -> bool:
    """Whether this process is `linearize ...` or `python -m linearize ...`, whose verbs import what they need when they
    run, so that `--help` and the completion of a word need not wait for torch and transformers."""
    program = os.path.basename(sys.argv[0]) if sys.argv else ""
    if program == "-m":  # the package is on its way to being run
        return [*sys.orig_argv, "-m", ""][[*sys.orig_argv, "-m"].index("-m") + 1] == "linearize"
    return program in ("linearize", "linearize.exe")


if not _is_the_command():
    report_untried_versions()
    from linearize.modeling import LinearizeConfig, LinearizedForCausalLM, load

if TYPE_CHECKING:
    from linearize.conversion.api import convert
    from linearize.recipes.schema import load_recipe

__all__ = ["LinearizeConfig", "LinearizedForCausalLM", "__version__", "convert", "load", "load_recipe"]


def __getattr__(name: str) -> Any:
    if name in ("LinearizeConfig", "LinearizedForCausalLM", "load"):
        from linearize import modeling

        return getattr(modeling, name)
    if name == "convert":
        from linearize.conversion.api import convert

        return convert
    if name == "load_recipe":
        from linearize.recipes.schema import load_recipe

        return load_recipe
    raise AttributeError(f"module 'linearize' has no attribute {name!r}")

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

report_untried_versions()
try:
    from linearize.modeling import LinearizeConfig, LinearizedForCausalLM, load
except KeyboardInterrupt:  # these imports are most of the time that the command takes to start
    if os.path.basename(sys.argv[0]) not in ("-m", "linearize"):
        raise
    sys.stderr.write("linearize: interrupted\n")
    os._exit(130)

if TYPE_CHECKING:
    from linearize.conversion.api import convert
    from linearize.recipes.schema import load_recipe

__all__ = ["LinearizeConfig", "LinearizedForCausalLM", "__version__", "convert", "load", "load_recipe"]


def __getattr__(name: str) -> Any:
    if name == "convert":
        from linearize.conversion.api import convert

        return convert
    if name == "load_recipe":
        from linearize.recipes.schema import load_recipe

        return load_recipe
    raise AttributeError(f"module 'linearize' has no attribute {name!r}")

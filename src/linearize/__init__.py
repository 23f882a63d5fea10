"""linearize: pretrained Transformers with linear-time attention.

    student = linearize.convert("path/or/hub-id", recipe="window-linear", data=["stories.txt"], out="student")
    model = linearize.load("student")

Importing this package registers students with transformers, so that `AutoModelForCausalLM.from_pretrained` loads them.
All public names are here (docs/api.md); what they need is imported when they are first used.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
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
    from linearize.conversion.in_memory import convert_model
    from linearize.decoding.api import generate
    from linearize.decoding.speculative.loop import speculate
    from linearize.errors import InputError
    from linearize.evaluation.run import EvaluationOptions, evaluate
    from linearize.mixers import register_mixer
    from linearize.mixers.gated_delta_net import GatedDeltaNetConfig
    from linearize.mixers.gla import GlaConfig
    from linearize.mixers.lolcats import LolcatsConfig
    from linearize.mixers.mamba import MambaConfig
    from linearize.mixers.mamba2 import Mamba2Config
    from linearize.mixers.retention import RetentionConfig
    from linearize.mixers.retrieval_heads import RetrievalHeadsConfig
    from linearize.mixers.sliding_window import SlidingWindowConfig
    from linearize.modeling.export import export_student as export
    from linearize.modeling.export import register_export
    from linearize.planning.estimate import plan_conversion as plan
    from linearize.recipes.plan import PlanConfig as Plan
    from linearize.recipes.schema import Recipe, load_recipe, recipes
    from linearize.training.stages import register_stage

# Public name: where it is, and what it is called there.
_LAZY = {
    "EvaluationOptions": ("evaluation.run", "EvaluationOptions"),
    "GatedDeltaNetConfig": ("mixers.gated_delta_net", "GatedDeltaNetConfig"),
    "GlaConfig": ("mixers.gla", "GlaConfig"),
    "InputError": ("errors", "InputError"),
    "LolcatsConfig": ("mixers.lolcats", "LolcatsConfig"),
    "Mamba2Config": ("mixers.mamba2", "Mamba2Config"),
    "MambaConfig": ("mixers.mamba", "MambaConfig"),
    "Plan": ("recipes.plan", "PlanConfig"),
    "Recipe": ("recipes.schema", "Recipe"),
    "RetentionConfig": ("mixers.retention", "RetentionConfig"),
    "RetrievalHeadsConfig": ("mixers.retrieval_heads", "RetrievalHeadsConfig"),
    "SlidingWindowConfig": ("mixers.sliding_window", "SlidingWindowConfig"),
    "convert": ("conversion.api", "convert"),
    "convert_model": ("conversion.in_memory", "convert_model"),
    "evaluate": ("evaluation.run", "evaluate"),
    "export": ("modeling.export", "export_student"),
    "generate": ("decoding.api", "generate"),
    "load_recipe": ("recipes.schema", "load_recipe"),
    "plan": ("planning.estimate", "plan_conversion"),
    "register_export": ("modeling.export", "register_export"),
    "register_mixer": ("mixers", "register_mixer"),
    "register_stage": ("training.stages", "register_stage"),
    "speculate": ("decoding.speculative.loop", "speculate"),
}

__all__ = [
    "EvaluationOptions", "GatedDeltaNetConfig", "GlaConfig", "InputError", "LinearizeConfig", "LinearizedForCausalLM",
    "LolcatsConfig", "Mamba2Config", "MambaConfig", "Plan", "Recipe", "RetentionConfig", "RetrievalHeadsConfig",
    "SlidingWindowConfig", "__version__", "convert", "convert_model", "evaluate", "export", "generate", "load",
    "load_recipe", "plan", "recipes", "register_export", "register_mixer", "register_stage", "speculate",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "recipes":  # a package that can be called, too
        return import_module("linearize.recipes")
    if name in _LAZY:
        module, inside = _LAZY[name]
        value = globals()[name] = getattr(import_module(f"linearize.{module}"), inside)
        return value
    raise AttributeError(f"module 'linearize' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

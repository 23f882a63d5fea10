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
    "LinearizeConfig": ("modeling", "LinearizeConfig"),
    "LinearizedForCausalLM": ("modeling", "LinearizedForCausalLM"),
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
    "load": ("modeling", "load"),
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

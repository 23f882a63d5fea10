"""Whether a recipe can run over a teacher whose weights are quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linearize.errors import InputError
from linearize.mixers.layer_mixer import LayerMixerConfig
from linearize.modeling.io.quantized import BaseWeights
from linearize.training.config import BlockwiseConfig
from linearize.training.stages.lowrank import LowRankConfig

if TYPE_CHECKING:
    from linearize.recipes.recipe import Recipe

FROZEN_BASE = ("attention_transfer", "lowrank")  # stages that leave all weights of the teacher as they are


def checked_base(recipe: Recipe, devices: int = 1) -> BaseWeights:
    """`base_weights` of a recipe that so many devices work on together.

    Raises:
        InputError: something would train, or read, weights that are quantized.
    """
    if recipe.base_weights == "full":
        return "full"
    told = f"base_weights {recipe.base_weights}: "
    if devices > 1:
        raise InputError(f"{told}one process holds them whole, {devices} cannot share them; set it to full")
    mixers = [mixer for mixer in (recipe.plan.mixer, *recipe.plan.overrides.values()) if mixer is not None]
    if recipe.plan.depth is not None or any(isinstance(mixer, LayerMixerConfig) for mixer in mixers):
        raise InputError(f"{told}for students with mixers between the projections (lolcats, gla); set it to full")
    for number, stage in enumerate(recipe.stages):
        if stage.tokens == 0:
            continue
        if stage.name not in FROZEN_BASE or (isinstance(stage, BlockwiseConfig) and stage.block is not None):
            raise InputError(
                f"{told}stages.{number} ({stage.name}) cannot run over it, {' and '.join(FROZEN_BASE)} can, without "
                "blocks; set base_weights to full or the stage's tokens to 0"
            )
        if isinstance(stage, LowRankConfig) and not stage.merge:
            raise InputError(f"{told}adapters are merged into whole weights; set merge of stages.{number} to true")
    return recipe.base_weights

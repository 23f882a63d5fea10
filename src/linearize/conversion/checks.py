"""Checks of a recipe against teacher, tokenizer, text and base weights, made before any work."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from linearize.errors import InputError
from linearize.mixers import AttentionShape
from linearize.mixers.layer_mixer import LayerMixer, LayerMixerConfig
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.io.quantized import BaseWeights
from linearize.recipes.plan import PlanConfig
from linearize.recipes.schema import Recipe
from linearize.training.config import BlockwiseConfig
from linearize.training.data.train_dataset import TrainDataset
from linearize.training.dataset_stage import DatasetStageConfig
from linearize.training.stages.attention_transfer import AttentionTransferConfig
from linearize.training.stages.earlier_adapter import check_plan
from linearize.training.stages.lowrank import LowRankConfig

FROZEN_BASE = ("attention_transfer", "lowrank")  # stages that leave all weights of the teacher as they are


def checked_base(recipe: Recipe, devices: int = 1) -> BaseWeights:
    """`base_weights` of a recipe, for so many devices that share a model.

    Raises:
        InputError: a stage or mixer would train, or read, quantized weights.
    """
    if recipe.base_weights == "full":
        return "full"
    prefix = f"base_weights {recipe.base_weights}: "
    if devices > 1:
        raise InputError(f"{prefix}they are for one device, {devices} cannot share them; set it to full")
    mixers = [mixer for mixer in (recipe.plan.mixer, *recipe.plan.overrides.values()) if mixer is not None]
    if recipe.plan.depth is not None or any(isinstance(mixer, LayerMixerConfig) for mixer in mixers):
        raise InputError(f"{prefix}for students with mixers between the projections (lolcats, gla); set it to full")
    for number, stage in enumerate(recipe.stages):
        if stage.tokens == 0:
            continue
        if stage.name not in FROZEN_BASE or (isinstance(stage, BlockwiseConfig) and stage.block is not None):
            raise InputError(
                f"{prefix}stages.{number} ({stage.name}) cannot run over it, {' and '.join(FROZEN_BASE)} can, without "
                "blocks; set base_weights to full or the stage's tokens to 0"
            )
        if isinstance(stage, LowRankConfig) and not stage.merge:
            raise InputError(f"{prefix}adapters are merged into whole weights; set merge of stages.{number} to true")
    return recipe.base_weights


def check_starts(plan: PlanConfig) -> None:
    """Refuse `initialise: calibrate` of mixers that have nothing to calibrate, before the teacher is loaded.

    Raises:
        InputError: such a mixer.
    """
    size = AttentionShape(num_heads=1, num_kv_heads=1, head_dim=2, value_dim=2, model_dim=2)
    for mixer in filter(None, (plan.mixer, *plan.overrides.values())):
        if isinstance(mixer, LayerMixerConfig) and mixer.initialise == "calibrate":
            with torch.random.fork_rng():
                built = mixer.build(size)
            if isinstance(built, LayerMixer) and type(built).calibrate is LayerMixer.calibrate:
                built.calibrate(())  # raises with the reason and what to do


def check_stages(
    recipe: Recipe, student: LinearizedForCausalLM, teacher: Any, tokenizer: Any, *, converted: bool = True
) -> None:
    """Refuse stages that could not run later on.

    `student` has every layer of the plan converted; where `converted` is off it is a draft with its target's mixers.

    Raises:
        InputError: a stage that does not fit mixers, teacher, tokenizer or data.
    """
    mixers = student.mixers().values()
    others = sorted({str(mixer.config.name) for mixer in mixers if isinstance(mixer, LayerMixer)})  # type: ignore[attr-defined]
    for number, stage in enumerate(recipe.stages):
        if stage.tokens == 0:
            continue
        with _naming_stage(number):
            if isinstance(stage, DatasetStageConfig):
                stage.check_data(tokenizer, context_length(teacher))
                continue
            if stage.by_layer and not converted:
                raise InputError(
                    f"{stage.name} compares layers with the attention that they replaced, which a draft of a student "
                    "does not have: use distill"
                )
            if isinstance(stage, AttentionTransferConfig) and others:
                raise InputError(
                    f"attention_transfer compares attention outputs, which {', '.join(others)} does not have (it "
                    "replaces the whole attention module): use hidden_alignment"
                )
            stage.check(student, teacher)
            if isinstance(stage, LowRankConfig) and stage.start is not None:
                _check_start(stage, stage.start, number, recipe, student)


def _check_start(stage: LowRankConfig, start: str, number: int, recipe: Recipe, student: LinearizedForCausalLM) -> None:
    """Refuse a start that would replace what was trained before it, or does not fit the plan."""
    earlier = [i for i, other in enumerate(recipe.stages[:number]) if other.tokens != 0]
    if earlier:
        keys = ", ".join(f"stages.{i}.tokens=0" for i in earlier)
        raise InputError(f"start {start} replaces what earlier stages train: set {keys}, or leave start out")
    if recipe.plan.schedule is not None and stage.at == "each":
        raise InputError(f"start {start} would come back after each step of plan.schedule: set at=last, or no schedule")
    heads = recipe.plan.heads
    check_plan(start, student, heads_follow=heads is not None and heads.needs_scores)


def check_rows(recipe: Recipe, text: TrainDataset, steps: int) -> None:
    """Refuse text that is too short for a stage's rows. Raises InputError."""
    for number, stage in enumerate(recipe.stages):
        if stage.tokens != 0 and not isinstance(stage, DatasetStageConfig):
            with _naming_stage(number):
                text.rows(stage.length or recipe.data.length, parts=steps if stage.at == "each" else 1)


def fit_length(recipe: Recipe, limit: int | None, overridden: Container[str]) -> tuple[Recipe, list[str]]:
    """The recipe with rows that fit into the teacher's context of `limit` tokens, and the warnings to print.

    Raises:
        InputError: a length that the caller set (its key is in `overridden`) does not fit.
    """
    lengths = {"data.length": recipe.data.length}
    lengths |= {
        f"stages.{i}.length": stage.length
        for i, stage in enumerate(recipe.stages)
        if stage.length is not None and stage.tokens != 0
    }
    notices = []
    too_long = {key: length for key, length in lengths.items() if limit is not None and length > limit}
    for key, length in too_long.items():
        if key in overridden or key.rpartition(".")[0] in overridden:
            raise InputError(f"{key} {length} is beyond the teacher's context {limit}: set {key} to at most {limit}")
        notices.append(f"{key} is {limit}: the recipe's {length} is beyond the teacher's context")
    return recipe.override(dict.fromkeys(too_long, limit)), notices


def context_length(teacher: Any) -> int | None:
    """The teacher's longest context in tokens; None: no limit is known."""
    length: int | None = getattr(teacher.config.get_text_config(), "max_position_embeddings", None)
    return length


@contextmanager
def _naming_stage(number: int) -> Iterator[None]:
    """Add the stage to the message of an error inside."""
    try:
        yield
    except InputError as error:
        raise InputError(f"stages.{number}: {error}") from error

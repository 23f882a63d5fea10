"""What a streamed conversion works on, checked before any work: a teacher of names and shapes, plan, stage, text."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from linearize.conversion.options import is_blockwise
from linearize.conversion.prepare import check_rows, check_stages, context, fit_length, planned, read_text
from linearize.decoding.loading import pick_device
from linearize.errors import InputError
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.document_probe import keeps_apart
from linearize.modeling.io.assemble import student_on_meta
from linearize.modeling.io.streamed_teacher import StreamedBlocks, StreamedTeacher
from linearize.modeling.io.student_folder import check_saving, valid_generation_config
from linearize.modeling.student import student_config
from linearize.recipes.recipe import Recipe
from linearize.training.config import Batch, BlockwiseConfig
from linearize.training.data.loading import PSEUDO
from linearize.training.data.train_dataset import TrainingText
from linearize.training.step import computed_on

LOG = logging.getLogger("linearize")


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamPrepared:
    """Everything checked. `student`: on meta. `stage`: the recipe's block-wise stage, its number `number`."""

    name: str
    recipe: Recipe
    teacher: StreamedTeacher
    student: LinearizedForCausalLM
    stage: BlockwiseConfig
    number: int
    text: TrainingText
    heldout: Sequence[Batch]


def prepare_stream(
    name: str,
    recipe: Recipe,
    specs: Sequence[str],
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
    asked: Container[str] = (),
) -> StreamPrepared:
    """Check everything; nothing has been written or trained when this returns, and no weights but the embedding's and
    the first layer's were read.

    Raises:
        InputError: anything given that cannot be used, or that needs the whole model in memory.
    """
    number = block_stage(recipe)
    _check_plan(recipe)
    if written := [spec for spec in specs if spec == "self" or spec.startswith(PSEUDO)]:
        raise InputError(
            f"data {written[0]!r} is written by the teacher, which is not in memory while its blocks are read from the "
            "disk: give a file"
        )
    torch.set_flush_denormal(True)
    where = pick_device(device)
    teacher = StreamedTeacher(name, device=where, trust_remote_code=trust_remote_code)
    recipe, told = fit_length(recipe, context(teacher), asked)
    applied, _, untouched = planned(recipe.plan, teacher.sites, teacher.skeleton, [])
    config = student_config(teacher.skeleton, teacher.sites, applied, name)
    config.dtype = teacher.stored
    student = student_on_meta(config)
    student.generation_config = valid_generation_config(_generation(name, teacher))
    check_stages(recipe, student, teacher.skeleton, teacher.tokenizer)
    check_saving(student, teacher.tokenizer)
    if not student.mixer_parameters():
        raise InputError("no mixer of this plan has parameters to train, so there is nothing to do block by block")
    packs = partial(_keeps_documents_apart, StreamedBlocks(teacher, config, seed=recipe.seed))
    text, heldout = read_text(teacher.skeleton, teacher.tokenizer, recipe.data, specs, where, packs=packs)
    check_rows(recipe, text, 1)
    for notice in told + untouched:
        LOG.warning(notice)
    stage: Any = recipe.stages[number]
    return StreamPrepared(
        name=name, recipe=recipe, teacher=teacher, student=student, stage=computed_on(stage, where), number=number,
        text=text, heldout=heldout,
    )  # fmt: skip


def block_stage(recipe: Recipe) -> int:
    """The number of the block-wise stage, the first of those that run and the only one by blocks.

    Raises:
        InputError: another stage comes first or is block-wise too; says which setting changes that.
    """
    running = [(number, stage) for number, stage in enumerate(recipe.stages) if stage.tokens != 0]
    if not running:
        raise InputError("blocks read from the disk need a block-wise stage, and this recipe runs none: set tokens")
    first, stage = running[0]
    if not is_blockwise(stage):
        way = f"set stages.{first}.tokens=0"
        if isinstance(stage, BlockwiseConfig):
            way = f"set stages.{first}.block=auto, or a number of layers"
        raise InputError(f"stages.{first} ({stage.name}) needs the whole model in memory, without --stream: {way}")
    for number, other in running[1:]:
        if is_blockwise(other):
            raise InputError(
                f"one stage can be block-wise where blocks are read from the disk, and stages.{number} ({other.name}) "
                f"is a second: set stages.{number}.block=null, or its tokens to 0"
            )
    return first


def _keeps_documents_apart(blocks: StreamedBlocks) -> bool:
    """`document_probe.keeps_documents_apart` of a teacher on disk, by its embedding and its first layer."""
    first, enter = blocks.teacher(range(1)), blocks.enter()

    def run(batch: Mapping[str, Tensor]) -> Tensor:
        placed = {name: tokens.to(blocks.device) for name, tokens in batch.items()}
        return first.outputs(placed, enter(placed))

    return keeps_apart(run, blocks.given.config.get_text_config().vocab_size)


def _check_plan(recipe: Recipe) -> None:
    plan = recipe.plan
    wrong = {
        "plan.depth (a draft)": plan.depth is not None,
        "plan.schedule": plan.schedule is not None,
        "layers chosen by sensitivity": plan.needs_scores,
    }
    if found := [what for what, given in wrong.items() if given]:
        raise InputError(
            f"{found[0]} needs the whole model in memory: leave it out, or convert in one process without --stream"
        )


def _generation(name: str, teacher: StreamedTeacher) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(name)
    except OSError:
        return GenerationConfig.from_model_config(teacher.config)

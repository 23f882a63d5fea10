"""Check what a streamed conversion works on, before any work: a teacher of names and shapes, plan, stage, text."""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from linearize.conversion.checks import check_rows, check_stages, context_length, fit_length
from linearize.conversion.prepare import resolve_plan
from linearize.conversion.request import is_blockwise
from linearize.conversion.source import TeacherSource
from linearize.conversion.text import read_text, with_measured_tokens
from linearize.decoding.loading import pick_device
from linearize.errors import InputError
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.io.assemble import student_on_meta
from linearize.modeling.io.streamed_teacher import StreamedBlocks, StreamedTeacher
from linearize.modeling.io.student_folder import check_saving, valid_generation_config
from linearize.modeling.probe import keeps_apart
from linearize.modeling.student import student_config
from linearize.recipes.schema import Recipe
from linearize.training.config import Batch, BlockwiseConfig
from linearize.training.data.loading import PSEUDO
from linearize.training.data.train_dataset import TrainDataset
from linearize.training.step import computed_on

LOG = logging.getLogger("linearize")


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamedPrepared:
    """Everything that a streamed conversion works on, checked.

    `student` is on the meta device. `stage` is the recipe's block-wise stage, and `number` its number.
    """

    name: str
    source: TeacherSource
    recipe: Recipe
    teacher: StreamedTeacher
    student: LinearizedForCausalLM
    stage: BlockwiseConfig
    number: int
    text: TrainDataset
    heldout: Sequence[Batch]


def prepare_streamed(
    source: TeacherSource,
    recipe: Recipe,
    specs: Sequence[str],
    *,
    device: str | None = None,
    overridden: Container[str] = (),
) -> StreamedPrepared:
    """Check everything; writes and trains nothing, and reads the weights of the embedding and the first layer alone.

    Raises:
        InputError: an argument that cannot be used, or one that needs the whole model in memory.
    """
    number = block_stage(recipe)
    _check_plan(recipe)
    if written := [spec for spec in specs if spec == "self" or spec.startswith(PSEUDO)]:
        raise InputError(
            f"data {written[0]!r} is written by the teacher, which is not in memory while its blocks are read from the "
            "disk: give a file"
        )
    torch.set_flush_denormal(True)
    target = pick_device(device)
    name = source.name
    teacher = StreamedTeacher(source.path, device=target, trust_remote_code=source.trust_remote_code)
    recipe, notices = fit_length(recipe, context_length(teacher), overridden)
    recipe = with_measured_tokens(recipe, teacher.skeleton, target)
    applied, _, untouched = resolve_plan(recipe.plan, teacher.sites, teacher.skeleton, [])
    config = student_config(teacher.skeleton, teacher.sites, applied, name)
    config.dtype = teacher.stored
    student = student_on_meta(config)
    student.generation_config = valid_generation_config(_generation(source.path, teacher))
    check_stages(recipe, student, teacher.skeleton, teacher.tokenizer)
    check_saving(student, teacher.tokenizer)
    if not student.mixer_parameters():
        raise InputError("the mixers of this plan have no parameters, so no block can be trained: leave --stream out")
    packs = partial(_keeps_documents_apart, StreamedBlocks(teacher, config, seed=recipe.seed))
    text, heldout = read_text(teacher.skeleton, teacher.tokenizer, recipe.data, specs, target, packs=packs)
    check_rows(recipe, text, 1)
    for notice in notices + untouched:
        LOG.warning(notice)
    stage: Any = recipe.stages[number]
    return StreamedPrepared(
        name=name, source=source, recipe=recipe,
        teacher=teacher, student=student, stage=computed_on(stage, target), number=number,
        text=text, heldout=heldout,
    )  # fmt: skip


def block_stage(recipe: Recipe) -> int:
    """The number of the block-wise stage: the first that runs, and the only one by blocks.

    Raises:
        InputError: another stage comes first or is block-wise too.
    """
    running = [(number, stage) for number, stage in enumerate(recipe.stages) if stage.tokens != 0]
    if not running:
        raise InputError("blocks read from the disk need a block-wise stage, and this recipe runs none: set its tokens")
    first, stage = running[0]
    if not is_blockwise(stage):
        remedy = f"set stages.{first}.tokens=0"
        if isinstance(stage, BlockwiseConfig):
            remedy = f"set stages.{first}.block=auto, or a number of layers"
        raise InputError(f"stages.{first} ({stage.name}) needs the whole model in memory, without --stream: {remedy}")
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

    return keeps_apart(run, blocks.streamed.config.get_text_config().vocab_size)


def _check_plan(recipe: Recipe) -> None:
    plan = recipe.plan
    unsupported = {
        "plan.depth (a draft)": plan.depth is not None,
        "plan.schedule": plan.schedule is not None,
        "layers chosen by sensitivity": plan.needs_scores,
        "heads chosen by their scores (plan.heads.keep as a number; name them as [[layer, group], ...])": (
            plan.heads is not None and plan.heads.needs_scores
        ),
    }
    if present := [name for name, is_set in unsupported.items() if is_set]:
        raise InputError(
            f"{present[0]} needs the whole model in memory: leave it out, or convert in one process without --stream"
        )


def _generation(name: str, teacher: StreamedTeacher) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(name)
    except OSError:
        return GenerationConfig.from_model_config(teacher.config)

"""Blocks of models that are in memory, and the whole student from what they gave."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from linearize.conversion.options import BlockOptions, parse_blocks
from linearize.conversion.sizes import chosen_block
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.blocks import LoadedBlocks
from linearize.training.blockwise.block_result import BlockResult, merge_results
from linearize.training.blockwise.hidden_rows import StageRows
from linearize.training.blockwise.run import BlockJob, BlockwiseStage
from linearize.training.config import BlockwiseConfig
from linearize.training.loop import StageResult


def loaded_blocks(student: LinearizedForCausalLM, teacher: Any) -> LoadedBlocks:
    """Blocks over models in memory; hidden states are stored in the checkpoint's dtype, also where a CPU computes in
    fp32."""
    asked = getattr(teacher.config.get_text_config(), "dtype", None)
    stored = asked if asked in (torch.bfloat16, torch.float16) else teacher.dtype
    return LoadedBlocks(teacher, student, dtype=stored)


def run_loaded(
    stage: BlockwiseConfig,
    student: LinearizedForCausalLM,
    teacher: Any,
    rows: StageRows,
    folder: Path,
    options: BlockOptions,
    *,
    check_only: bool = False,
    **job: Any,
) -> list[BlockResult]:
    """Train the blocks of a stage (those of `options.only`); `check_only`: say whether it fits, and nothing else.

    `job`: what else `BlockJob` takes.

    Raises:
        InputError: memory, disk or blocks that do not fit.
    """
    source = loaded_blocks(student, teacher)
    block = chosen_block(stage, student, source, rows, options, folder=folder, resident=student)
    only = None if options.only is None else parse_blocks(options.only, -(-source.layers // block))
    if check_only:
        return []
    return BlockwiseStage(
        BlockJob(stage=stage, block=block, source=source, rows=rows, folder=folder, only=only, **job)
    ).run()


@torch.no_grad()
def take_parts(student: LinearizedForCausalLM, parts: Sequence[BlockResult], name: str) -> StageResult:
    """The trained tensors into the whole student; returns the stage's result. `parts` are those of all blocks."""
    trained = [layer for part in parts for layer in part.layers]
    assert trained == list(range(len(student.config.plan))), f"parts of layers {trained} alone make no student"
    tensors = student.state_dict()
    for part in parts:
        for key, value in part.final.items():
            tensors[key].copy_(value)
    student.requires_grad_(False)
    return merge_results(parts, name)

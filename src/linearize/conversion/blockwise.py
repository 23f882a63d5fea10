"""Block-wise stages in a conversion: train the blocks of models in memory, calibrate a block, load what was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.conversion.request import BlockOptions, parse_blocks
from linearize.conversion.sizes import chosen_block
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.attention_capture import attention_samples
from linearize.modeling.blocks import Block, LoadedBlocks
from linearize.training.blockwise.block_result import BlockResult, merge_results
from linearize.training.blockwise.hidden_rows import HIDDEN, StageRows
from linearize.training.blockwise.run import BlockJob, BlockwiseStage, whole_name
from linearize.training.config import Batch, BlockwiseConfig
from linearize.training.loop import StageResult


def loaded_blocks(student: LinearizedForCausalLM, teacher: Any) -> LoadedBlocks:
    """Blocks of models in memory; hidden states are stored in the checkpoint's dtype, also where a CPU computes in
    fp32."""
    configured = getattr(teacher.config.get_text_config(), "dtype", None)
    stored = configured if configured in (torch.bfloat16, torch.float16) else teacher.dtype
    return LoadedBlocks(teacher, student, dtype=stored)


def train_loaded_blocks(
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
    """Train the blocks of a stage, or those of `options.only`; with `check_only` check that they fit and stop there.

    `job`: further fields of `BlockJob`.

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
def load_trained_blocks(student: LinearizedForCausalLM, parts: Sequence[BlockResult], name: str) -> StageResult:
    """Copy the trained tensors of all blocks into the student; returns the result of the stage."""
    trained = [layer for part in parts for layer in part.layers]
    assert trained == list(range(len(student.config.plan))), f"only layers {trained} were trained"
    tensors = student.state_dict()
    for part in parts:
        for key, value in part.final.items():
            tensors[key].copy_(value)
    student.requires_grad_(False)
    return merge_results(parts, name)


def calibrate_block(block: Block, batches: Sequence[Batch]) -> None:
    """Calibrate the mixers of a block whose config asks for it, on batches with hidden states."""
    student = block.student
    assert student is not None
    for layer, mixer in student.mixers().items():
        if getattr(mixer.config, "initialise", None) != "calibrate":
            continue
        samples = []
        for batch in batches:
            placed = {name: value.to(block.device) for name, value in batch.items() if name != HIDDEN}
            with block.hidden_input.holding(block.placed(batch[HIDDEN])):
                sites = {layer: student.config.attention[layer]}
                samples += attention_samples(block.teacher, [placed], [layer], sites)[layer]
        with torch.no_grad():
            mixer.calibrate(samples)  # type: ignore[operator]


def block_tensors(block: Block, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the whole student, renamed as in a block."""
    assert block.student is not None
    names = {whole_name(block, name): name for name in block.student.state_dict()}
    return {names[name]: value for name, value in tensors.items()}

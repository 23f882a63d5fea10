"""A small block-wise stage, and the same stage trained jointly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import SLIDING, VOCABULARY, mixer, tiny

from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.blocks import LoadedBlocks
from linearize.training.blockwise.hidden_rows import StageRows
from linearize.training.blockwise.run import BlockJob
from linearize.training.config import Batch
from linearize.training.data.documents import Document
from linearize.training.data.packing import PackedRows, batches, pack
from linearize.training.loop import StageResult, run_stage
from linearize.training.stages.attention_transfer import AttentionTransferConfig

LENGTH, LAYERS = 23, 5


def stage(**changes: Any) -> AttentionTransferConfig:
    """Eight steps of three rows, evaluated often, over more than one epoch of `rows()`."""
    defaults = {"tokens": 8 * 3 * LENGTH, "lr": 1e-2, "batch": 3, "micro_batch": 2, "evaluate_every": 3, "warmup": 2}
    return AttentionTransferConfig(**{**defaults, **changes})


def rows(documents: int = 11, seed: int = 3, length: int = LENGTH) -> PackedRows:
    """Packed documents of odd lengths; some rows hold several."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(9, 41, (documents,), generator=generator).tolist()
    tokens = [torch.randint(3, VOCABULARY, (size,), generator=generator).tolist() for size in sizes]
    return pack([Document(t, [1] * len(t)) for t in tokens], length)


def heldout() -> list[Batch]:
    """Rows of another length than those of training, in batches of unequal size."""
    return list(rows(5, seed=4, length=19).in_order(2))


def student(teacher: Any, **settings: Any) -> LinearizedForCausalLM:
    """Layer 1 keeps its attention, the others do not start at zero."""
    torch.manual_seed(0)
    plan = [None if layer == 1 else mixer(**settings) for layer in range(LAYERS)]
    return LinearizedForCausalLM.from_teacher(teacher, plan)


def teacher(family: str = "llama") -> Any:
    changes = {"layer_types": (SLIDING * 2)[:LAYERS]} if family == "gemma2" else {}
    return tiny(family, num_hidden_layers=LAYERS, **changes).requires_grad_(False)


def joint(model: LinearizedForCausalLM, its_teacher: Any, config: Any) -> StageResult:
    text = rows()
    run = config.build(model, its_teacher)
    run.calibrate(next(batches(text, config.batch, config.seed)))

    def stream(start: int) -> Any:
        return batches(text, config.batch, config.seed, start_step=start)

    return run_stage(run, config, stream, heldout(), length=LENGTH)


def job(model: LinearizedForCausalLM, its_teacher: Any, config: Any, block: int, folder: Path, **more: Any) -> BlockJob:
    return BlockJob(
        stage=config, block=block, source=LoadedBlocks(its_teacher, model), rows=StageRows(config, rows(), heldout()),
        folder=folder, identity={"data": "test"}, name="transfer", **more,
    )  # fmt: skip


def mixers_of(model: LinearizedForCausalLM) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.mixer_parameters().items()}

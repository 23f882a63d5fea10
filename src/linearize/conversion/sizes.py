"""Memory and disk of block-wise training, from shapes alone, and the number of layers per block that fits."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linearize.conversion.request import BlockOptions
from linearize.errors import InputError
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.blocks import Blocks
from linearize.modeling.truncate import block_name
from linearize.numbers import size_text
from linearize.training.blockwise.budget import BlockSizes, check_block, choose_block
from linearize.training.blockwise.hidden_rows import StageRows
from linearize.training.config import BlockwiseConfig

PROCESS_BYTES = 500_000_000  # Python, torch, transformers and this package, as measured
SHARE = 0.8  # of the free memory, if no bound is set


def chosen_block(
    stage: BlockwiseConfig,
    student: LinearizedForCausalLM,
    source: Blocks,
    rows: StageRows,
    options: BlockOptions,
    *,
    folder: Path,
    resident: nn.Module | None = None,
) -> int:
    """Layers per block: `stage.block`, or for `auto` the cheapest number that fits into `options` (else what is free).

    `student`: its shapes are read, its tensors may be on the meta device. `folder`: where hidden states are stored.
    `resident`: a model that is in memory as a whole.

    Raises:
        InputError: it does not fit; the message names what does.
    """
    sizes = block_sizes(stage, student, source, rows, resident=resident)
    free = free_disk(folder)
    disk = free if options.disk is None else min(free, options.disk)
    if stage.block == "auto":
        memory = options.memory if options.memory is not None else PROCESS_BYTES + int(free_memory() * SHARE)
        return choose_block(sizes, memory_bytes=memory, disk_bytes=disk)
    assert isinstance(stage.block, int)
    block = min(stage.block, source.layers)
    check_block(sizes, block, memory_bytes=options.memory, disk_bytes=disk)
    return block


def block_sizes(
    stage: BlockwiseConfig,
    student: LinearizedForCausalLM,
    source: Blocks,
    rows: StageRows,
    *,
    resident: nn.Module | None = None,
) -> BlockSizes:
    """Sizes for the budget. What a layer saves for its backward pass is estimated from the attention's shape: queries,
    keys, values, features and outputs in fp32, each a few times."""
    item = 2 if source.device.type != "cpu" and source.dtype.itemsize == 2 else 4
    blocks = [student.lm.get_submodule(block_name(site)) for site in student.config.attention]
    trained = [sum(p.numel() for name, p in b.named_parameters() if "mixer." in name) for b in blocks]
    weights = [_bytes(block.parameters(), item) - own * item for block, own in zip(blocks, trained, strict=True)]
    tokens = min(stage.micro_batch or stage.batch, stage.batch) * rows.rows.length
    shape = student.config.attention_shapes()[0]
    heads = shape.num_heads * (shape.head_dim + shape.value_dim)
    scores = shape.num_heads * rows.rows.length * tokens * 4  # one row of weights per query and head
    inner = max((p.shape[0] for b in blocks for p in b.parameters() if p.dim() == 2), default=0)
    outside: Any = student.lm.get_input_embeddings()
    resident_bytes = 0 if resident is None else _bytes(resident.parameters(), None)
    return BlockSizes(
        layers=source.layers,
        model_dim=source.model_dim,
        tokens=rows.tokens,
        itemsize=source.dtype.itemsize,
        layer_bytes=max(weights) if resident is None else 0,
        trained=max(trained),
        kept_bytes=12 * tokens * heads * 4,
        passing_bytes=2 * scores + tokens * (8 * source.model_dim + 4 * inner) * 4,
        outside_bytes=_bytes(outside.parameters(), item) * 2 if resident is None else 0,
        process_bytes=PROCESS_BYTES + resident_bytes,
    )


def check_whole(
    student: LinearizedForCausalLM, device: torch.device, stages: Sequence[str], memory: int | None, processes: int
) -> None:
    """Refuse stages on the whole model whose weights alone take more than `memory` bytes of a process (None: no bound).

    Raises:
        InputError: they do; the message names what is needed and what to do.
    """
    if memory is None:
        return
    item = 2 if device.type != "cpu" and student.dtype.itemsize == 2 else 4
    need = PROCESS_BYTES + _bytes(student.parameters(), item) // processes
    if need <= memory:
        return
    holder = "one process" if processes == 1 else f"each of {processes} processes"
    raise InputError(
        f"{', '.join(stages) or 'what is loaded at the end'} needs the whole model, of which {holder} takes at least "
        f"{size_text(need)} of memory, but --memory is {size_text(memory)}: use more processes (torchrun), raise it, "
        "or set the tokens of the later stages to 0"
    )


def free_disk(folder: Path) -> int:
    """Bytes that hidden states in a folder may use: what is free, and what they use already."""
    used = sum(path.stat().st_size for path in folder.glob("hidden/*/*.bin"))
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    return shutil.disk_usage(existing).free + used


def free_memory() -> int:
    """Bytes of memory that are available: of the machine, or of the control group where that has a lower bound."""
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
        pages = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        pass
    bounds = [pages]
    for limit in ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory.max"):
        try:
            bounds.append(int(Path(limit).read_text("utf-8")))
        except (OSError, ValueError):
            continue
    return min(bounds)


def _bytes(parameters: Iterable[nn.Parameter], item: int | None) -> int:
    """Bytes of parameters, each counted once, with `item` bytes per number where it is set."""
    seen = {id(parameter): parameter for parameter in parameters}
    return sum(p.numel() * (item if item and p.is_floating_point() else p.element_size()) for p in seen.values())

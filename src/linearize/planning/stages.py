"""One stage of a plan: its memory, time and disk on a device, the blocks that fit, and what to do where it does not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from linearize.conversion.text import EVALUATION_BATCH, measured_tokens
from linearize.errors import InputError
from linearize.numbers import size_text
from linearize.ops.blocking import planned_for
from linearize.planning.costs import stage_costs, text
from linearize.planning.devices import CPU, Device, fits
from linearize.planning.report import BlockPlan, Memory, StagePlan
from linearize.planning.samples import Measured, Numbers, Whole, measured
from linearize.recipes.schema import Recipe
from linearize.training.blockwise import BlockSizes, block_peak_bytes, boundary_bytes, check_block, choose_block
from linearize.training.blockwise.budget import fitting_blocks
from linearize.training.config import Batch, BlockwiseConfig, StageConfig, as_steps, count_steps
from linearize.training.dataset_stage import DEFAULT_LENGTH, DatasetStageConfig
from linearize.training.stages.distill import DistillConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanRequest:
    """The checked arguments of a plan. `tokens`: of the training text (None: as many as the stages train on). `block`:
    layers per block, where the caller set it. `quantized`: what weights in 8 or 4 bits save (see `quantized_bytes`)."""

    whole: Whole
    quantized: Numbers
    recipe: Recipe
    device: Device
    devices: int
    tokens: int | None
    block: int | Literal["auto"] | None
    disk: int | None


def plan_stage(number: int, request: PlanRequest) -> StagePlan:
    stage = _alone(request.recipe.stages[number])
    whole, device = request.whole, request.device
    share = math.ceil(stage.batch / request.devices)
    rows = min(stage.micro_batch or share, share)
    length = stage.length or (DEFAULT_LENGTH if isinstance(stage, DatasetStageConfig) else request.recipe.data.length)
    heldout = heldout_text(request)
    with planned_for("cpu" if device.kind == CPU else "cuda"):
        costs = measured(whole, lambda sample: stage_costs(stage, sample, rows, length, heldout, device))
    tokens = stage.tokens if stage.tokens is not None else request.tokens
    if tokens is None:
        raise InputError(f"stages.{number} ({stage.name}) trains on its own data: give its size with --tokens")
    steps = count_steps(stage.model_copy(update={"tokens": tokens}), length)
    memory = _memory(stage, request, costs.total)
    blocks = _blocks(number, stage, request, rows, costs)
    runs = blocks[1] if blocks else None
    peak = runs.peak_bytes if runs else memory.peak
    checkpointed = _checkpointed(stage, request, costs, memory, rows * length)
    missing = fits(device, peak)
    evaluations = (
        0 if isinstance(stage, DatasetStageConfig) else 1 + steps // max(1, as_steps(stage.evaluate_every, steps))
    )
    batches = _measured_tokens(request) / heldout["input_ids"].numel()
    heldout_seconds = evaluations * batches * costs.total["heldout_seconds"] / request.devices
    micro_batches = math.ceil(share / rows)
    sending = 0.0 if runs else steps * _sending_seconds(stage, request, costs, micro_batches)
    working = costs.total["seconds"] * steps * micro_batches
    return StagePlan(
        stage=stage.name,
        tokens=steps * stage.batch * length,
        steps=steps,
        length=length,
        batch=stage.batch,
        micro_batch=rows,
        trained_parameters=round(costs.total["trained"]),
        flops=costs.total["flops"] * steps * stage.batch / rows,
        seconds=max(working, sending) + heldout_seconds,
        sending_seconds=sending,
        memory=memory,
        peak_bytes=peak,
        checkpointed_bytes=checkpointed,
        checkpoint_bytes=round(2 * costs.total["gradients"] + costs.total["optimizer"]),
        cheapest=blocks[0] if blocks else None,
        runs_by_block=runs,
        fits=missing is None,
        advice=None
        if missing is None
        else _advice(
            number,
            stage,
            missing,
            memory,
            device.memory,
            rows,
            checkpointed,
            blocks[0] if blocks else None,
            request.devices,
        ),
    )


def heldout_text(request: PlanRequest) -> Batch:
    """A batch of the text that a conversion measures: rows of the recipe's length."""
    length = request.recipe.data.length
    rows = max(1, min(EVALUATION_BATCH, math.ceil(_measured_tokens(request) / length)))
    return text(rows, length, vocabulary(request.whole))


def _measured_tokens(request: PlanRequest) -> int:
    return measured_tokens(request.recipe, request.whole.parameters, "cpu" if request.device.kind == CPU else "cuda")


def _sending_seconds(stage: StageConfig, request: PlanRequest, costs: Measured, micro_batches: int) -> float:
    """Of one step on sharded weights: each pass over the layers gathers them (forward, backward, and a teacher's), and
    the gradients of what trains are added up once, in fp32."""
    whole, device, devices = request.whole, request.device, request.devices
    if stage.by_layer:
        passes = 1
    else:
        passes = 3 if stage.gradient_checkpointing else 2
        passes += isinstance(stage, DistillConfig) or getattr(stage, "loss", "ce") != "ce" or stage.name == "dpo"
    layers = sum(len(kind) for kind in whole.kinds) * whole.layer_bytes
    gathers = passes * micro_batches * device.gather_seconds(layers, devices)
    return gathers + device.gather_seconds(4 * costs.total["trained"], devices)


def _memory(stage: StageConfig, request: PlanRequest, total: Mapping[str, float]) -> Memory:
    """All layers at once, sharded over the devices: what is divided, and two whole layers."""
    shards, gradients = request.devices, total["gradients"]
    beside = 2 * request.whole.layer_bytes if shards > 1 else 0
    activations = max(total["step"] - gradients, total["calibrate"] - gradients, total["heldout"] - gradients, 0)
    activations += request.quantized["product"]
    keeps_best = stage.keep_best and not isinstance(stage, DatasetStageConfig)
    return Memory(
        weights=math.ceil((total["weights"] - request.quantized["saved"]) / shards) + beside,
        gradients=math.ceil(gradients / shards),
        optimizer=math.ceil(total["optimizer"] / shards),
        best=math.ceil(gradients / shards) if keeps_best else 0,
        activations=round(activations),
        allocator=request.device.beside + round(request.device.heap * activations),
        reserve=request.device.reserve,
    )


def _checkpointed(stage: StageConfig, request: PlanRequest, costs: Measured, memory: Memory, tokens: int) -> int | None:
    """The peak if each block were recomputed: one layer's activations, and the hidden states of all."""
    if stage.gradient_checkpointing or stage.by_layer:
        return None
    sampled = len(request.whole.kinds)
    one = costs.base["step"] - costs.base["gradients"] - (sampled - 1) * costs.largest_layer("step")
    kept = request.whole.layers * tokens * request.whole.model_dim * request.whole.dtype.itemsize
    activations = max(round(one + kept), round(costs.total["heldout"] - costs.total["gradients"]), 0)
    saved = memory.activations - min(activations, memory.activations)
    return memory.peak - saved - round(saved * request.device.heap)


def _blocks(
    number: int, stage: StageConfig, request: PlanRequest, rows: int, costs: Measured
) -> tuple[BlockPlan | None, BlockPlan | None] | None:
    """The cheapest block that fits and the one that the stage is run with; None where it cannot be run by blocks."""
    if not isinstance(stage, BlockwiseConfig) or request.whole.draft is not None:
        return None
    if request.recipe.base_weights != "full":
        return None
    sizes = block_sizes(stage, request, rows, costs)
    bounds = {"memory_bytes": request.device.memory, "disk_bytes": request.disk}
    cheapest = choose_block(sizes, **bounds) if fitting_blocks(sizes, **bounds) else None
    chosen = request.block or stage.block
    if chosen is not None:
        chosen = choose_block(sizes, **bounds) if chosen == "auto" else chosen
        try:
            check_block(sizes, chosen, **bounds)
        except InputError as error:
            raise InputError(f"stages.{number}: {error}") from error
    return tuple(None if block is None else _block(sizes, block) for block in (cheapest, chosen))  # type: ignore[return-value]


def _block(sizes: BlockSizes, block: int) -> BlockPlan:
    return BlockPlan(
        block=block,
        blocks=-(-sizes.layers // block),
        peak_bytes=block_peak_bytes(sizes, block),
        disk_bytes=boundary_bytes(sizes.tokens, sizes.model_dim, sizes.layers, block, sizes.itemsize),
    )


def block_sizes(stage: StageConfig, request: PlanRequest, rows: int, costs: Measured) -> BlockSizes:
    """The sizes that determine memory and disk of a block of layers, from the stage's costs."""
    whole = request.whole
    weights = whole.weight_bytes - sum(len(kind) for kind in whole.kinds) * whole.layer_bytes
    head = rows * (stage.length or request.recipe.data.length) * whole.model_dim * 4
    kept = costs.largest_layer("step") - costs.largest_layer("gradients")
    return BlockSizes(
        layers=whole.layers,
        model_dim=whole.model_dim,
        tokens=min(request.tokens or stage.tokens, stage.tokens),
        itemsize=whole.dtype.itemsize,
        layer_bytes=whole.layer_bytes,
        trained=costs.largest_layer("trained"),
        kept_bytes=max(0, kept),
        passing_bytes=max(0, round(costs.base["step"] - costs.base["gradients"]) - kept),
        outside_bytes=max(0, weights) + head,
        process_bytes=request.device.reserve,
    )


def _advice(
    number: int,
    stage: StageConfig,
    missing: str,
    memory: Memory,
    available: int,
    rows: int,
    checkpointed: int | None,
    cheapest: BlockPlan | None,
    devices: int,
) -> str:
    """One sentence with what is missing and each remedy."""
    remedies = []
    fixed = memory.peak - memory.activations
    fewer = rows * max(0, available - fixed) // max(1, memory.activations)
    if 1 <= fewer < rows:
        remedies.append(f"--set stages.{number}.micro_batch={fewer}")
    if checkpointed is not None:
        least = checkpointed - memory.activations + memory.activations // rows
        if checkpointed <= available:
            remedies.append(f"--set stages.{number}.gradient_checkpointing=true ({size_text(checkpointed)})")
        elif least <= available and not remedies:
            remedies.append(f"gradient_checkpointing=true and micro_batch=1 for stages.{number}")
    if cheapest is not None:
        remedies.append(f"--set stages.{number}.block={cheapest.block} ({size_text(cheapest.peak_bytes)} of memory, "
                    f"{size_text(cheapest.disk_bytes)} of disk)")  # fmt: skip
    divided = memory.weights + memory.gradients + memory.optimizer + memory.best
    for more in (2**power for power in range(1, 11)):
        shared = memory.reserve + memory.allocator + divided // more + memory.activations // rows * -(-rows // more)
        if shared <= available:
            remedies.append(f"--devices {devices * more} or more")
            break
    remedies.append("a device with more memory")
    return f"stages.{number} ({stage.name}) {missing}: {', or '.join(remedies)}"


def _alone(stage: StageConfig) -> StageConfig:
    """A stage without another model as its teacher, whose weights and work are not counted."""
    return stage.model_copy(update={"teacher": None}) if isinstance(stage, DistillConfig) else stage


def vocabulary(whole: Whole) -> int:
    return int(whole.config.get_text_config().vocab_size)

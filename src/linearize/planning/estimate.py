"""`linearize plan`: what a conversion will need, from the teacher's config and the recipe alone."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from linearize.conversion.base_weights import checked_base
from linearize.errors import InputError
from linearize.planning.advice import advice
from linearize.planning.costs import error_costs, score_costs, stage_costs, text
from linearize.planning.devices import CPU, Device, fits, load_device, room
from linearize.planning.report import BlockPlan, ConversionPlan, Memory, StagePlan
from linearize.planning.rounded import rounding
from linearize.planning.samples import Measured, Numbers, Whole, look_at, measured, on_sample, read_config
from linearize.recipes.recipe import DEFAULT_RECIPE, Recipe, load_recipe
from linearize.training.blockwise import BlockSizes, block_peak_bytes, boundary_bytes, check_block, choose_block
from linearize.training.blockwise.budget import fitting_blocks
from linearize.training.config import BlockwiseConfig, StageConfig
from linearize.training.dataset_stage import DEFAULT_LENGTH, DatasetStageConfig
from linearize.training.schedule import as_steps, count_steps
from linearize.training.stages.distill import DistillConfig
from linearize.training.step import bf16_pays

HELDOUT_ROWS = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """What is to be planned, checked. `tokens`: of the training text (None: as the stages train). `block`: as asked.
    `rounded`: what weights in 8 or 4 bits save (see `rounding`)."""

    whole: Whole
    rounded: Numbers
    recipe: Recipe
    device: Device
    devices: int
    tokens: int | None
    block: int | Literal["auto"] | None
    disk: int | None


def plan_conversion(
    teacher: str | os.PathLike[str],
    *,
    recipe: str | Recipe = DEFAULT_RECIPE,
    overrides: Mapping[str, Any] | None = None,
    tokens: int | None = None,
    device: str = CPU,
    devices: int = 1,
    table: str | Path | None = None,
    block: int | Literal["auto"] | None = None,
    disk: int | None = None,
) -> ConversionPlan:
    """What a conversion needs: memory, time and disk by stage. No weights are read.

    Args:
        teacher: folder with config.json, or a Hub name. recipe, overrides: as `convert` takes them.
        tokens: of the training text, whose hidden states training by blocks writes; default: as many as the stage
            trains on. device: a name of the table, `cpu`: this machine. devices: that share the work (FSDP).
        table: a YAML file of further devices. block: layers of a block in stages that train layer by layer.
        disk: bytes that hidden states may take.

    Raises:
        InputError: anything given that cannot be used; a block that does not fit says which ones do.
    """
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    kind = load_device(device, table)
    if devices < 1:
        raise InputError(f"devices {devices}: give 1 or more")
    config = read_config(teacher)
    chosen, notices = _fitted(chosen.override(dict(overrides or {})), config, kind)
    base = checked_base(chosen, devices)
    whole = look_at(config, chosen, _dtype(config, kind))
    request = Request(
        whole=whole, rounded=rounding(whole, base, chosen.stages), recipe=chosen, device=kind, devices=devices,
        tokens=tokens, block=block, disk=disk,
    )  # fmt: skip
    return _plan(request, str(teacher), device, notices)


def block_sizes(stage: StageConfig, request: Request, rows: int, costs: Measured) -> BlockSizes:
    """What the memory and the disk of a block of layers depend on, from the stage's costs."""
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


def _plan(request: Request, teacher: str, device: str, notices: list[str]) -> ConversionPlan:
    whole, kind = request.whole, request.device
    stages = tuple(_stage(number, request) for number, stage in enumerate(request.recipe.stages) if stage.tokens != 0)
    heldout = text(HELDOUT_ROWS, request.recipe.data.length, _vocabulary(whole))
    errors = measured(whole, lambda sample: error_costs(sample, heldout, by_layer=whole.draft is None)).total
    scores = on_sample(whole, [kind[0] for kind in whole.kinds], lambda sample: score_costs(sample, heldout))["scores"]
    blockwise = bool(stages) and all(stage.runs_by_block for stage in stages)
    rounded = request.rounded
    weights = errors["weights"] - rounded["saved"] + rounded["adapted"]  # as they are after the last stage
    most = max(errors["errors"], scores) + rounded["product"]
    measuring = round(weights / request.devices + (1 + kind.heap) * most)
    measuring += kind.beside + kind.reserve
    student = whole.weight_bytes + max((s.trained_parameters for s in stages), default=0) * 4
    hidden = max((s.runs_by_block.disk_bytes for s in stages if s.runs_by_block), default=0)
    peak = max([s.peak_bytes for s in stages] + ([] if blockwise else [measuring]), default=measuring)
    copies = 1 if request.devices == 1 else 0  # a rank of several keeps its share; on a CPU the file itself is mapped
    loading = round(weights / request.devices) + student * copies + kind.beside + kind.reserve
    peak = max(peak, 0 if blockwise else loading)
    missing = None if blockwise else fits(kind, measuring)
    if request.devices > 1 and kind.link is None:
        notices = [*notices, f"{device} has no link in the table: what devices send each other takes no time here"]
    told = [f"the measurements between the stages {missing}: convert by blocks (--stream)"] if missing else []
    return ConversionPlan(
        teacher=teacher,
        recipe=request.recipe.name,
        device=device,
        devices=request.devices,
        device_bytes=room(kind),
        parameters=whole.parameters,
        student_parameters=round(student / whole.dtype.itemsize),
        stages=stages,
        measuring_bytes=measuring,
        loading_bytes=loading,
        reserve_bytes=kind.reserve,
        student_bytes=student,
        hidden_bytes=hidden,
        disk_bytes=student + hidden + max((s.checkpoint_bytes for s in stages), default=0),
        peak_bytes=peak,
        flops=sum(s.flops for s in stages),
        seconds=sum(s.seconds for s in stages),
        fits=all(s.fits for s in stages) and not told,
        notices=(*notices, *told),
    )


def _stage(number: int, request: Request) -> StagePlan:
    stage = _alone(request.recipe.stages[number])
    whole, device = request.whole, request.device
    share = math.ceil(stage.batch / request.devices)
    rows = min(stage.micro_batch or share, share)
    length = stage.length or (DEFAULT_LENGTH if isinstance(stage, DatasetStageConfig) else request.recipe.data.length)
    heldout = text(HELDOUT_ROWS, request.recipe.data.length, _vocabulary(whole))
    costs = measured(whole, lambda sample: stage_costs(stage, sample, rows, length, heldout, device))
    tokens = stage.tokens if stage.tokens is not None else request.tokens
    if tokens is None:
        raise InputError(f"stages.{number} ({stage.name}) trains on its own data: say with --tokens how much that is")
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
    batches = request.recipe.data.max_heldout_tokens / (HELDOUT_ROWS * request.recipe.data.length)
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
        else advice(
            number,
            stage,
            missing,
            memory,
            room(device),
            rows,
            checkpointed,
            blocks[0] if blocks else None,
            request.devices,
        ),
    )


def _sending_seconds(stage: StageConfig, request: Request, costs: Measured, micro_batches: int) -> float:
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


def _memory(stage: StageConfig, request: Request, total: Mapping[str, float]) -> Memory:
    """All layers at once, sharded over the devices: what is divided, and two layers whole beside it."""
    shards, gradients = request.devices, total["gradients"]
    beside = 2 * request.whole.layer_bytes if shards > 1 else 0
    activations = max(total["step"] - gradients, total["calibrate"] - gradients, total["heldout"] - gradients, 0)
    activations += request.rounded["product"]
    keeps_best = stage.keep_best and not isinstance(stage, DatasetStageConfig)
    return Memory(
        weights=math.ceil((total["weights"] - request.rounded["saved"]) / shards) + beside,
        gradients=math.ceil(gradients / shards),
        optimizer=math.ceil(total["optimizer"] / shards),
        best=math.ceil(gradients / shards) if keeps_best else 0,
        activations=round(activations),
        allocator=request.device.beside + round(request.device.heap * activations),
        reserve=request.device.reserve,
    )


def _checkpointed(stage: StageConfig, request: Request, costs: Measured, memory: Memory, tokens: int) -> int | None:
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
    number: int, stage: StageConfig, request: Request, rows: int, costs: Measured
) -> tuple[BlockPlan | None, BlockPlan | None] | None:
    """The cheapest block that fits and the one that the stage is run with; None where it cannot be run by blocks."""
    if not isinstance(stage, BlockwiseConfig) or request.whole.draft is not None:
        return None
    if request.recipe.base_weights != "full":
        return None
    sizes = block_sizes(stage, request, rows, costs)
    bounds = {"memory_bytes": room(request.device), "disk_bytes": request.disk}
    cheapest = choose_block(sizes, **bounds) if fitting_blocks(sizes, **bounds) else None
    asked = request.block or stage.block
    if asked is not None:
        asked = choose_block(sizes, **bounds) if asked == "auto" else asked
        try:
            check_block(sizes, asked, **bounds)
        except InputError as error:
            raise InputError(f"stages.{number}: {error}") from error
    return tuple(None if block is None else _block(sizes, block) for block in (cheapest, asked))  # type: ignore[return-value]


def _block(sizes: BlockSizes, block: int) -> BlockPlan:
    return BlockPlan(
        block=block,
        blocks=-(-sizes.layers // block),
        peak_bytes=block_peak_bytes(sizes, block),
        disk_bytes=boundary_bytes(sizes.tokens, sizes.model_dim, sizes.layers, block, sizes.itemsize),
    )


def _fitted(recipe: Recipe, config: Any, device: Device) -> tuple[Recipe, list[str]]:
    """The recipe as it would run: rows within the teacher's context, fp32 where bf16 does not pay."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    changes: dict[str, Any] = {}
    if limit is not None and recipe.data.length > limit:
        changes["data.length"] = limit
    for number, stage in enumerate(recipe.stages):
        if limit is not None and stage.length is not None and stage.length > limit:
            changes[f"stages.{number}.length"] = limit
        if stage.precision == "bf16" and device.kind == CPU and not bf16_pays(torch.device(CPU)):
            changes[f"stages.{number}.precision"] = "fp32"
    return recipe.override(changes), [f"{key} is {value} here" for key, value in changes.items()]


def _alone(stage: StageConfig) -> StageConfig:
    """A stage without another model as its teacher, whose weights and work are not counted."""
    return stage.model_copy(update={"teacher": None}) if isinstance(stage, DistillConfig) else stage


def _dtype(config: Any, device: Device) -> torch.dtype:
    dtype = getattr(config, "dtype", None) or torch.float32
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return torch.float32 if device.kind == CPU else dtype


def _vocabulary(whole: Whole) -> int:
    return int(whole.config.get_text_config().vocab_size)

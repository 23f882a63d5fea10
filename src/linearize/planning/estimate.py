"""`linearize plan`: the memory, time and disk of a conversion, from the teacher's config and the recipe alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from linearize.conversion.checks import checked_base
from linearize.errors import InputError
from linearize.modeling.io.model_source import parse_dtype
from linearize.phases import phase
from linearize.planning.costs import error_costs, quantized_bytes, score_costs
from linearize.planning.devices import CPU, Device, fits, load_device
from linearize.planning.report import ConversionPlan
from linearize.planning.samples import look_at, measured, on_sample, read_config
from linearize.planning.stages import PlanRequest, heldout_text, plan_stage
from linearize.recipes.schema import DEFAULT_RECIPE, Recipe, load_recipe
from linearize.training.step import bf16_pays


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
    revision: str | None = None,
    token: str | None = None,
    dtype: torch.dtype | str | None = None,
) -> ConversionPlan:
    """Estimate memory, time and disk of a conversion, stage by stage. No weights are read.

    Args:
        teacher: folder with config.json, or a Hub name.
        recipe, overrides: as `convert` takes them.
        tokens: of the training text, whose hidden states block-wise training writes; default: as many as the stage
            trains on.
        device: a name of the table; `cpu` is this machine.
        devices: their number; they share the work (FSDP).
        table: a YAML file of further devices.
        block: layers per block in stages that can train block by block.
        disk: bytes that hidden states may use.
        revision, token: of a Hub name, a branch, tag or commit, and what to read with (None: HF_TOKEN).
        dtype: that the teacher is loaded in (None: that of its checkpoint; a CPU computes in fp32).

    Raises:
        InputError: an argument that cannot be used, or a block that does not fit.
    """
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    kind = load_device(device, table)
    if devices < 1:
        raise InputError(f"devices {devices}: give 1 or more")
    config = read_config(teacher, revision=revision, token=token)
    if dtype is not None:
        config.dtype = parse_dtype(dtype)
    chosen, notices = _fitted(chosen.override(dict(overrides or {})), config, kind)
    base = checked_base(chosen, devices)
    whole = look_at(config, chosen, _dtype(config, kind))
    request = PlanRequest(
        whole=whole, quantized=quantized_bytes(whole, base, chosen.stages), recipe=chosen, device=kind, devices=devices,
        tokens=tokens, block=block, disk=disk,
    )  # fmt: skip
    return _plan(request, str(teacher), device, notices)


def _plan(request: PlanRequest, teacher: str, device: str, notices: list[str]) -> ConversionPlan:
    whole, kind = request.whole, request.device
    numbers = [number for number, stage in enumerate(request.recipe.stages) if stage.tokens != 0]
    planned = []
    with phase("simulating a step of each stage", len(numbers), "stages") as advance:
        for number in numbers:
            planned.append(plan_stage(number, request))
            advance(1)
    stages = tuple(planned)
    heldout = heldout_text(request)
    errors = measured(whole, lambda sample: error_costs(sample, heldout, by_layer=whole.draft is None)).total
    scores = on_sample(whole, [kind[0] for kind in whole.kinds], lambda sample: score_costs(sample, heldout))["scores"]
    blockwise = bool(stages) and all(stage.runs_by_block for stage in stages)
    quantized = request.quantized
    weights = errors["weights"] - quantized["saved"] + quantized["adapted"]  # as they are after the last stage
    most = max(errors["errors"], scores) + quantized["product"]
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
    unfit = [f"the measurements between the stages {missing}: convert by blocks (--stream)"] if missing else []
    return ConversionPlan(
        teacher=teacher,
        recipe=request.recipe.name,
        device=device,
        devices=request.devices,
        device_bytes=kind.memory,
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
        fits=all(s.fits for s in stages) and not unfit,
        notices=(*notices, *unfit),
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


def _dtype(config: Any, device: Device) -> torch.dtype:
    dtype = getattr(config, "dtype", None) or torch.float32
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return torch.float32 if device.kind == CPU else dtype

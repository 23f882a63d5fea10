"""Memory and work of one step of a stage: the stage's own code, run without contents on a sample of the model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from linearize.metrics.layer_error import layer_errors
from linearize.metrics.token_scores import LOGITS_BYTES, View, score_rows
from linearize.mixers import LayerMixer
from linearize.modeling.io.quantized import BaseWeights
from linearize.planning.devices import Device
from linearize.planning.samples import Measured, Numbers, Sample, Whole, measured
from linearize.training.config import Batch, StageConfig
from linearize.training.dataset_stage import DatasetStageConfig
from linearize.training.memory_simulation import tensor_bytes, weight_bytes
from linearize.training.stages.dpo import Dpo
from linearize.training.stages.lowrank import LowRankConfig, find_projections
from linearize.training.step import Stepper

GROUP, SCALES = 64, 256  # nf4: numbers that share a scale, and scales (8 bits each) that share one of their own


def stage_costs(stage: StageConfig, sample: Sample, rows: int, length: int, heldout: Batch, device: Device) -> Numbers:
    """Of one micro-batch of `rows` rows and one held-out batch, in bytes, operations and seconds.

    `weights`: teacher and student with what the stage copies. `step`, `calibrate`, `heldout`: the most above that (and
    AdamW's moments, `optimizer`) while a step runs, while the loss is scaled, while held-out text is measured.
    """
    meter, student = sample.meter, sample.student
    run, models = stage.build(student, sample.teacher), [sample.teacher, student]
    batch = text(rows, length, student.config.get_text_config().vocab_size)
    if isinstance(run, Dpo):
        batch = {name: torch.stack([tensor, tensor], 1) for name, tensor in batch.items()}
        models.append(run.reference.model)
    calibrate = _peak(sample, lambda: run.calibrate(batch))
    if stage.gradient_checkpointing and run.checkpoints_gradients:
        run.enable_gradient_checkpointing()
    stepper = Stepper(run, stage.model_copy(update={"batch": rows, "micro_batch": None}))
    weights = weight_bytes(*models)
    _make_moments(stepper)
    step = _peak(sample, lambda: stepper.step(batch, number=0, lr=stage.lr))
    done = list(meter.operations)
    peak = 0 if isinstance(stage, DatasetStageConfig) else _peak(sample, lambda: stepper.heldout_loss([heldout]))
    parameters = stepper.parameters.values()
    return {
        "weights": weights,
        "trained": sum(p.numel() for p in parameters),
        "gradients": tensor_bytes(parameters),
        "optimizer": sum(tensor_bytes(state.values()) for state in stepper.optimizer.state.values()),
        "step": step,
        "calibrate": calibrate,
        "heldout": peak,
        "flops": sum(one.flops for one in done),
        "seconds": device.seconds(done),
        "heldout_seconds": device.seconds(meter.operations) if peak else 0.0,
    }


def error_costs(sample: Sample, heldout: Batch, *, by_layer: bool) -> Numbers:
    """Of the layers' errors, which keep the outputs of all layers: `weights`, and `errors`, the most above them."""
    numbers = {"weights": float(weight_bytes(sample.teacher, sample.student)), "errors": 0.0}
    if by_layer and sample.student.mixer_parameters():
        numbers["errors"] = _peak(sample, lambda: layer_errors(sample.student, sample.teacher, heldout))
    return numbers


def score_costs(sample: Sample, heldout: Batch) -> Numbers:
    """Of the losses and the agreement of teacher, student and its branches, on the few rows that are measured at once:
    `scores`, the most above the weights; hardly any of it grows with the layers."""
    student = sample.student
    views = {"teacher": View(model=sample.teacher), "student": View(model=student)}
    if not any(isinstance(mixer, LayerMixer) for mixer in student.mixers().values()):
        views |= {branch: View(model=student, branch=branch) for branch in ("window", "linear")}
    row_bytes = 4 * heldout["input_ids"].shape[1] * len(views) * next(iter(views.values())).vocabulary
    rows = {name: tensor[: max(1, LOGITS_BYTES // row_bytes)] for name, tensor in heldout.items()}
    with torch.no_grad():
        return {"scores": _peak(sample, lambda: score_rows(rows, views, "teacher"))}


def text(rows: int, length: int, vocabulary: int) -> Batch:
    """Packed rows of two documents each; the tokens mean nothing."""
    position_BT = (torch.arange(length) % max(2, 5 * length // 8)).repeat(rows, 1)
    ids_BT = (torch.arange(rows * length).view(rows, length) * 7) % vocabulary
    return {"input_ids": ids_BT, "position_ids": position_BT, "labels": ids_BT.clone()}


def _peak(sample: Sample, work: Any) -> int:
    before = sample.meter.restart()
    work()
    return sample.meter.peak - before


def _make_moments(stepper: Stepper) -> None:
    """AdamW's moments, as they are from the second step on."""
    for parameter in stepper.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    stepper.optimizer.step()
    stepper.optimizer.zero_grad(set_to_none=True)


def quantized_bytes(whole: Whole, base: BaseWeights, stages: tuple[StageConfig, ...]) -> Numbers:
    """Bytes that depend on the base weights. `saved`: by quantizing the linear layers. `adapted`: of these, what the
    layers that LoRA adapts take again when its stage ends. `product`: the largest weight, dequantized for a product."""
    if base == "full":
        return {"saved": 0.0, "adapted": 0.0, "product": 0.0}
    targets = {target for stage in stages if isinstance(stage, LowRankConfig) for target in stage.targets}
    bytes_of: Measured = measured(whole, lambda sample: _quantized_sample(sample, base, sorted(targets)))
    return {**bytes_of.total, "product": bytes_of.base["product"]}


def quantized_weight_bytes(outputs: int, inputs: int, itemsize: int, base: BaseWeights) -> int:
    """Bytes of a weight `[outputs, inputs]`: int8 with a scale per output, or nf4 with 8-bit scales."""
    count = outputs * inputs
    if base == "8bit":
        return count + outputs * itemsize
    scales = math.ceil(count / GROUP)
    return math.ceil(count / 2) + scales + 4 * math.ceil(scales / SCALES)


def _quantized_sample(sample: Sample, base: BaseWeights, targets: list[str]) -> Numbers:
    output = sample.teacher.get_output_embeddings()
    less = {}
    for name, layer in sample.teacher.named_modules():
        if isinstance(layer, nn.Linear) and layer is not output:
            weight = layer.weight
            less[name] = weight.nbytes - quantized_weight_bytes(weight.shape[0], weight.shape[1], weight.itemsize, base)
    adapted = find_projections(sample.student, targets) if targets else []
    largest = max((sample.teacher.get_submodule(name).weight.nbytes for name in less), default=0)
    return {
        "saved": float(sum(less.values())),
        "adapted": float(sum(less[name] for name in map(_in_teacher, adapted) if name in less)),
        "product": float(largest),
    }


def _in_teacher(name: str) -> str:
    """A student's module by its name in the teacher."""
    return name.removeprefix("lm.")

"""What a teacher whose linear layers lie in memory in 8 or 4 bits takes less than a whole one."""

from __future__ import annotations

import math

from torch import nn

from linearize.modeling.io.quantized import BaseWeights
from linearize.planning.samples import Measured, Numbers, Sample, Whole, measured
from linearize.training.config import StageConfig
from linearize.training.stages.lowrank import LowRankConfig, find_projections

GROUP, SCALES = 64, 256  # nf4: numbers that share a scale, and scales (8 bits each) that share one of their own


def rounding(whole: Whole, base: BaseWeights, stages: tuple[StageConfig, ...]) -> Numbers:
    """Bytes of the whole model. `saved`: by rounding its linear layers. `adapted`: of these, what the layers that LoRA
    adapts take again when its stage ends. `product`: the largest layer's weight, whole for a product with it."""
    if base == "full":
        return {"saved": 0.0, "adapted": 0.0, "product": 0.0}
    targets = {target for stage in stages if isinstance(stage, LowRankConfig) for target in stage.targets}
    found: Measured = measured(whole, lambda sample: _of_sample(sample, base, sorted(targets)))
    return {**found.total, "product": found.base["product"]}


def rounded_bytes(outputs: int, inputs: int, itemsize: int, base: BaseWeights) -> int:
    """Of a weight `[outputs, inputs]`: int8 with a scale for each output, or nf4 with 8-bit scales."""
    count = outputs * inputs
    if base == "8bit":
        return count + outputs * itemsize
    scales = math.ceil(count / GROUP)
    return math.ceil(count / 2) + scales + 4 * math.ceil(scales / SCALES)


def _of_sample(sample: Sample, base: BaseWeights, targets: list[str]) -> Numbers:
    output = sample.teacher.get_output_embeddings()
    less = {}
    for name, layer in sample.teacher.named_modules():
        if isinstance(layer, nn.Linear) and layer is not output:
            weight = layer.weight
            less[name] = weight.nbytes - rounded_bytes(weight.shape[0], weight.shape[1], weight.itemsize, base)
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

"""A student's folder from its teacher's files and its trained mixers, tensor by tensor: never the whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from linearize.modeling.config import LinearizeConfig
from linearize.modeling.sharded_writer import SHARD_BYTES, Entry, ShardedWriter
from linearize.modeling.streaming import StreamedTeacher
from linearize.modeling.student import LinearizedForCausalLM


def student_on_meta(config: LinearizeConfig) -> LinearizedForCausalLM:
    """A student without weights: names and shapes."""
    with torch.device("meta"):
        return LinearizedForCausalLM(config).eval()


def write_student_weights(
    teacher: StreamedTeacher,
    student: LinearizedForCausalLM,
    mixers: Callable[[int], Mapping[str, Tensor]],
    folder: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Weights (safetensors) and config; everything but the mixers is the teacher's to the bit, in its own dtype.

    Args:
        student: on meta. mixers: a layer's mixer tensors by their names in the student.
    Raises:
        OSError: the disk is full.
    """
    entries = student_entries(teacher, student)
    writer = ShardedWriter(folder, entries, shard_bytes)
    trained: Mapping[str, Tensor] = {}
    layer = -1
    tree: dict[str, Tensor] = {}
    for name in entries:
        if (now := _layer(name, teacher)) != layer:
            layer, tree = now, {}
            trained = mixers(layer) if layer >= 0 else {}
        source = name.removeprefix("lm.")
        if name in trained:
            writer.write(name, trained[name])
        elif source in teacher.plain:
            writer.write(name, teacher.files.read(teacher.plain[source]))
        else:
            tree = tree or teacher.tree(range(max(layer, 0), layer + 1)).state_dict()
            writer.write(name, tree[source])
    writer.close()
    student.config.architectures = [type(student).__name__]
    student.config.save_pretrained(folder)
    student.generation_config.save_pretrained(folder)  # type: ignore[union-attr]


def student_entries(teacher: StreamedTeacher, student: LinearizedForCausalLM) -> dict[str, Entry]:
    """Dtype and shape of every tensor of the student's folder, tied ones once."""
    fp32 = set(student._keep_in_fp32_modules_strict or ())
    tensors: dict[str, Tensor] = dict(student.named_parameters())
    saved = student.state_dict()
    tensors |= {name: value for name, value in student.named_buffers() if name in saved}
    found: dict[str, Entry] = {}
    for name, tensor in tensors.items():
        source = teacher.plain.get(name.removeprefix("lm."))
        if source is not None:
            dtype = teacher.files.places[source].dtype
        elif name.startswith(tuple(f"lm.{kept}" for kept in fp32)):
            dtype = torch.float32
        else:
            dtype = teacher.stored if tensor.is_floating_point() else tensor.dtype
        found[name] = (dtype, tuple(tensor.shape))
    return found


def _layer(name: str, teacher: StreamedTeacher) -> int:
    """The layer that a tensor of the student belongs to; -1: none."""
    prefix = f"lm.{teacher.layers}."
    return int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else -1

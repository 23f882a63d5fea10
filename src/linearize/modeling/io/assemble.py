"""A student from its teacher's files and its trained mixers: written tensor by tensor, or whole in memory where the
teacher was trained on in fewer bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize.modeling.config import LinearizeConfig
from linearize.modeling.io.streamed_teacher import StreamedTeacher
from linearize.modeling.io.student_folder import save_config
from linearize.modeling.io.teacher import load_teacher
from linearize.modeling.io.weight_files import SHARD_BYTES, Entry, ShardedWriter
from linearize.modeling.library_internals import fp32_names
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
    entries, sources = _planned(teacher, student)
    writer = ShardedWriter(folder, entries, shard_bytes)
    trained: Mapping[str, Tensor] = {}
    layer = -1
    for name in entries:
        if (now := _layer(name, teacher)) != layer:
            layer, trained = now, mixers(now) if now >= 0 else {}
        writer.write(name, teacher.files.read(sources[name]) if name in sources else trained[name])
    writer.close()
    save_config(student, folder)


def _planned(teacher: StreamedTeacher, student: LinearizedForCausalLM) -> tuple[dict[str, Entry], dict[str, str]]:
    """Dtype and shape of every tensor of the student's folder, tied ones once; and which of the checkpoint's tensors
    those are that are not new. What transformers renames or joins on loading keeps the checkpoint's name, as it has
    when transformers saves it."""
    fp32 = tuple(f"lm.{kept}" for kept in fp32_names(student))
    saved = student.state_dict()
    tensors: dict[str, Tensor] = dict(student.named_parameters())
    tensors |= {name: value for name, value in student.named_buffers() if name in saved}
    groups = {f"lm.{name}": keys for name, keys in teacher.converted.items()}
    entries: dict[str, Entry] = {}
    sources: dict[str, str] = {}
    for name, tensor in tensors.items():
        keys = groups.get(name) or [teacher.plain[own] for own in [name.removeprefix("lm.")] if own in teacher.plain]
        if not keys and ".mixer." not in name:
            continue  # a further parameter that its group's tensors make
        if not keys:
            kept = name.startswith(fp32) or not tensor.is_floating_point()
            entries[name] = (tensor.dtype if kept else teacher.stored, tuple(tensor.shape))
        for key in keys:
            place = teacher.files.places[key]
            renamed = name in groups or not name.endswith(key)
            own = f"lm.{key}" if renamed else name
            entries[own], sources[own] = (place.dtype, place.shape), key
    return entries, sources


def _layer(name: str, teacher: StreamedTeacher) -> int:
    """The layer that a tensor of the student belongs to; -1: none."""
    prefix = f"lm.{teacher.layers}."
    return int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else -1


@torch.no_grad()
def whole_student(student: LinearizedForCausalLM, teacher_path: str | None = None) -> LinearizedForCausalLM:
    """Return a student over its teacher's own weights, read again on the CPU, with its mixers and adapters' changes.

    `teacher_path`: where they are (None: where the teacher's name says).

    Raises:
        InputError: the teacher cannot be read any more.
    """
    teacher, _ = load_teacher(teacher_path or str(student.config.teacher_name))
    whole = LinearizedForCausalLM.from_teacher(
        teacher, student.config.mixers(), teacher_name=student.config.teacher_name
    )
    trained = student.mixer_parameters()
    for name, parameter in whole.mixer_parameters().items():
        parameter.data = trained[name].detach().cpu()
    for name, changes in student.adapter_state.changes.items():
        layer: Any = whole.get_submodule(name)
        turned = type(layer).__name__ == "Conv1D"  # GPT-2's weights are [I, O]
        weight_OI = layer.weight.data.T if turned else layer.weight.data
        for change in changes:
            weight_OI = change.added_to(weight_OI.float())
        weight_OI = weight_OI.to(layer.weight.dtype)
        layer.weight = nn.Parameter((weight_OI.T if turned else weight_OI).contiguous(), requires_grad=False)
    whole.generation_config = student.generation_config
    return whole

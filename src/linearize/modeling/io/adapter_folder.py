"""A student as an adapter of its teacher: config, mixers and LoRA without the teacher's weights, pinned to these.

A folder holds `config.json`, `mixers.safetensors`, LoRA in peft's format under `adapter/` if there is any, and
`linearize_adapter.json` with the teacher's name and the fingerprint of its files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from linearize.errors import InputError, one_line
from linearize.modeling.io.adapters import apply_adapters, kept_adapters, save_adapters
from linearize.modeling.io.hub import local_copy
from linearize.modeling.io.model_source import ModelSource, find_model
from linearize.modeling.io.student_folder import save_config
from linearize.modeling.io.teacher import load_teacher
from linearize.modeling.io.weight_files import WeightFiles
from linearize.modeling.library_internals import fp32_names
from linearize.modeling.student import LinearizedForCausalLM
from linearize.storage.disk import writing
from linearize.storage.files import expand_home, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIN = "linearize_adapter.json"
MIXERS = "mixers.safetensors"
GGUF_SAMPLES, GGUF_SAMPLE_BYTES = 256, 2**16  # places in a GGUF file, and bytes at each, for its fingerprint


class Pin(BaseModel):
    """The teacher that an adapter belongs to: its name when the adapter was made, the fingerprint of its files, and the
    commit of a Hub model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: str
    fingerprint: str
    commit: str | None = None
    format: int = 1


def is_adapter_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a student as an adapter of its teacher."""
    return (Path(expand_home(path)) / PIN).is_file()


def teacher_of(folder: str | os.PathLike[str]) -> Pin:
    """The teacher of an adapter. Raises InputError for a folder that is not an adapter, or a damaged one."""
    path = Path(expand_home(folder)) / PIN
    if not path.is_file():
        raise InputError(
            f"{folder} is not an adapter of linearize: it has no {PIN} (convert --adapter-only writes one)"
        )
    try:
        return Pin.model_validate(read_json(path))
    except ValidationError as error:
        raise InputError(f"{path} is damaged: {one_line(error)}; copy the folder again") from error


def weights_fingerprint(source: ModelSource) -> str:
    """What tells a model's weights from others (see `WeightFiles.fingerprint`; of a GGUF file its size and samples).

    Raises InputError for files that cannot be read.
    """
    if source.gguf_file is None:
        return WeightFiles(source.name).fingerprint()
    path, digest = Path(str(source)), hashlib.blake2b(digest_size=16)
    size = path.stat().st_size
    with path.open("rb") as file:
        for number in range(GGUF_SAMPLES):
            file.seek(number * max(size - GGUF_SAMPLE_BYTES, 0) // (GGUF_SAMPLES - 1))
            digest.update(file.read(GGUF_SAMPLE_BYTES))
    return f"{size}-{digest.hexdigest()}"


def save_adapter_folder(
    student: LinearizedForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    teacher: str | None = None,
    commit: str | None = None,
) -> None:
    """Write the config, mixers and LoRA of a student and the pin of its teacher into an empty folder.

    `teacher`: where its files are (None: where its name says); `commit`: of a Hub model.

    Tensors are written in the dtype of the teacher's files, but for those that a mixer keeps in fp32.
    """
    source = find_model(teacher or str(student.config.teacher_name))
    stored = _stored_dtype(source, student.dtype)
    fp32 = tuple(fp32_names(student))
    mixers = {
        name: tensor.detach().cpu().to(tensor.dtype if name.startswith(fp32) else stored).contiguous()
        for name, tensor in mixer_tensors(student).items()
    }
    with writing("the adapter", folder, sum(tensor.nbytes for tensor in mixers.values())):
        save_config(student, folder, stored)
        tokenizer.save_pretrained(folder)
        save_file(mixers, folder / MIXERS, {"format": "pt"})
        if (kept := kept_adapters(student)) is not None:
            save_adapters(replace(kept, state={name: x.to(stored) for name, x in kept.state.items()}), folder)
        pin = Pin(teacher=str(student.config.teacher_name), fingerprint=weights_fingerprint(source), commit=commit)
        (folder / PIN).write_text(pin.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load_adapter(
    folder: str | os.PathLike[str],
    teacher: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    device_map: str | dict[str, Any] | None = None,
) -> LinearizedForCausalLM:
    """A student from its adapter and its teacher, in eval mode; LoRA is added to the weights.

    Args:
        teacher: folder, GGUF file or Hub name; None: the name that the adapter was made with.
        dtype: default is that of the teacher's files. attn_implementation: of the kept softmax layers.

    Raises:
        InputError: not an adapter, a teacher that is not there or another one, or tensors that do not fit the plan.
    """
    path, pin = Path(expand_home(folder)), teacher_of(folder)
    name = str(teacher) if teacher is not None else local_copy(pin.teacher, revision=pin.commit).path
    source = find_model(name)
    if (fingerprint := weights_fingerprint(source)) != pin.fingerprint:
        raise InputError(
            f"{folder} is an adapter of {pin.teacher} with other weights than {name} has (fingerprint "
            f"{pin.fingerprint}, here {fingerprint}): give the teacher that it was made from"
        )
    model, _ = load_teacher(name, dtype=dtype, attn_implementation=attn_implementation, device_map=device_map)
    config = LinearizedForCausalLM.config_class.from_pretrained(path)
    student = LinearizedForCausalLM.from_teacher(
        model, config.mixers(), teacher_name=pin.teacher if teacher is None else name
    )
    set_mixers(student, path / MIXERS)
    apply_adapters(student, path)
    if (path / "generation_config.json").is_file():
        student.generation_config = type(student.generation_config).from_pretrained(path)
    placed: Any = student.to(device or "cpu") if device_map is None else student  # type: ignore[arg-type]
    return placed.eval()


def set_mixers(student: LinearizedForCausalLM, path: Path) -> None:
    """Put the saved tensors into the student's mixers. Raises InputError where they do not fit."""
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({one_line(error)}); copy the folder again") from error
    copy_tensors(saved, mixer_tensors(student), f"{path} does not fit its plan")


def copy_tensors(source: Mapping[str, Tensor], target: Mapping[str, Tensor], problem: str) -> None:
    """Write tensors into those of the same names. Raises InputError, which begins with `problem`, where names or shapes
    differ."""
    shapes, expected = ({name: tuple(x.shape) for name, x in part.items()} for part in (source, target))
    if wrong := sorted(name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name)):
        raise InputError(
            f"{problem}: {wrong[0]} has shape {shapes.get(wrong[0])}, {expected.get(wrong[0])} is needed; copy the "
            "folder again"
        )
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


def mixer_tensors(student: LinearizedForCausalLM) -> dict[str, Tensor]:
    """Parameters and saved buffers of the mixers by their names in the student."""
    return {name: tensor for name, tensor in student.state_dict(keep_vars=True).items() if ".mixer." in name}


def _stored_dtype(source: ModelSource, default: torch.dtype) -> torch.dtype:
    """The dtype of most numbers in a model's files; of a GGUF file the default."""
    if source.gguf_file is not None:
        return default
    counts: dict[torch.dtype, int] = {}
    for place in WeightFiles(source.name).places.values():
        if place.dtype.is_floating_point:
            counts[place.dtype] = counts.get(place.dtype, 0) + torch.Size(place.shape).numel()
    return max(counts, key=lambda dtype: counts[dtype], default=default)

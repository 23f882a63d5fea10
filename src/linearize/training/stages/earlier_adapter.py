"""The adapter of an earlier conversion as the start of `lowrank`: its mixers, and its LoRA, go on training.

The plan may differ from the earlier one in what needs no training: exact stores, and heads or whole layers that keep
their softmax attention.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from linearize.errors import InputError
from linearize.mixers.base import MixerConfig
from linearize.mixers.retrieval_heads import RetrievalHeadsConfig
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.exact_memory import keep_heads
from linearize.modeling.io.adapter_folder import (
    MIXERS,
    copy_tensors,
    mixer_tensors,
    set_mixers,
    teacher_of,
    weights_fingerprint,
)
from linearize.modeling.io.adapters import FOLDER, WEIGHTS
from linearize.modeling.io.integrity import tensors_of
from linearize.modeling.io.model_source import find_model
from linearize.modeling.sharding import shards_of
from linearize.storage.files import expand_home, read_json


def check_start(
    folder: str, student: LinearizedForCausalLM, *, rank: int, alpha: int, projections: Sequence[str]
) -> None:
    """Refuse an adapter that `lowrank` with this LoRA cannot go on from; reads no weights of it. Its plan is for
    `check_plan`.

    Raises:
        InputError: no adapter, one of another teacher, of another LoRA, or several processes.
    """
    pin = teacher_of(folder)
    if shards_of(student) is not None:
        raise InputError("start is for one process: convert without torchrun, or leave start out")
    name = student.config.teacher_name
    if name is not None and pin.fingerprint != weights_fingerprint(find_model(str(name))):
        raise InputError(f"start {folder} is an adapter of {pin.teacher}, whose weights are not those of {name}")
    path = Path(expand_home(folder)) / FOLDER
    if path.is_dir():
        there = read_json(path / "adapter_config.json")
        asked = {"rank": rank, "alpha": alpha}
        earlier = {"rank": there.get("r"), "alpha": there.get("lora_alpha")}
        if earlier != asked:
            raise InputError(f"start {folder} has LoRA of {earlier}, this stage of {asked}: set these alike")
        stems = {_own_name(name).partition(".lora_")[0] for name in tensors_of(path / WEIGHTS)}
        if stems != set(projections):
            raise InputError(f"start {folder} has LoRA on other layers than this stage: set targets to those it had")


def check_plan(folder: str, student: LinearizedForCausalLM, *, heads_follow: bool = False) -> None:
    """Refuse an adapter of another plan, after `check_start`. `heads_follow`: the student gets its retrieval heads when
    they are scored. Raises InputError."""
    _groups(folder, _plan_of(folder, student), student, heads_follow=heads_follow)


def start_from(
    folder: str, student: LinearizedForCausalLM, teacher: PreTrainedModel, parameters: Mapping[str, nn.Parameter]
) -> None:
    """Write an earlier adapter's mixers into the student and its LoRA, if it has any, into `parameters` (by name)."""
    path = Path(expand_home(folder))
    plan = _plan_of(folder, student)
    earlier = LinearizedForCausalLM.from_teacher(teacher, plan, teacher_name=student.config.teacher_name)
    set_mixers(earlier, path / MIXERS)
    keep_heads(earlier, _groups(folder, plan, student))
    lora = load_file(path / FOLDER / WEIGHTS) if (path / FOLDER).is_dir() else {}
    target = mixer_tensors(student)
    source = {name: tensor for name, tensor in mixer_tensors(earlier).items() if name in target}
    problem = f"start {folder} does not fit the student"
    copy_tensors(source, target, problem)
    if lora:
        copy_tensors({_own_name(name): tensor for name, tensor in lora.items()}, parameters, problem)


def start_identity(folder: str) -> str:
    """A digest of an adapter's tensors."""
    path, digest = Path(expand_home(folder)), hashlib.blake2b(digest_size=16)
    for file in (path / MIXERS, path / FOLDER / WEIGHTS):
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _plan_of(folder: str, student: LinearizedForCausalLM) -> list[MixerConfig | None]:
    """The mixers of the earlier student."""
    plan: list[MixerConfig | None] = type(student.config).from_pretrained(Path(expand_home(folder))).mixers()
    return plan


def _groups(
    folder: str, earlier: Sequence[MixerConfig | None], student: LinearizedForCausalLM, *, heads_follow: bool = False
) -> dict[int, tuple[int, ...]]:
    """The key/value groups that keep softmax in layers of this student where fewer, or none, did in the earlier one.
    `heads_follow`: the student may get its retrieval heads later on, when they are scored.

    Raises:
        InputError: the plans differ in more than that, stores, and layers that keep softmax now.
    """
    groups: dict[int, tuple[int, ...]] = {}
    for layer, (old, new) in enumerate(zip(earlier, student.config.mixers(), strict=False)):
        before = old.groups if isinstance(old, RetrievalHeadsConfig) else ()
        if old is not None and isinstance(new, RetrievalHeadsConfig) and set(before) < set(new.groups):
            groups[layer], old, new = new.groups, old.inner, new.inner
        if heads_follow and isinstance(old, RetrievalHeadsConfig) and not isinstance(new, RetrievalHeadsConfig):
            old = old.mixer
        if new is not None and _trained_part(old) != _trained_part(new):
            raise InputError(
                f"start {folder} has {_short(old)} in layer {layer}, this plan {_short(new)}: only the store, "
                "and heads and layers that keep softmax, may differ"
            )
    if len(earlier) != len(student.config.mixers()):
        raise InputError(f"start {folder} has {len(earlier)} layers, the student {len(student.config.mixers())}")
    return groups


def _trained_part(mixer: MixerConfig | None) -> dict[str, Any] | None:
    """The settings of a mixer but its store, with the heads that it leaves to softmax."""
    if mixer is None:
        return None
    inner = {key: value for key, value in mixer.inner.model_dump().items() if key != "store"}
    return inner | {"groups": getattr(mixer, "groups", None)}


def _short(mixer: MixerConfig | None) -> str:
    return "softmax" if mixer is None else ", ".join(f"{key}={value}" for key, value in mixer.model_dump().items())


def _own_name(name: str) -> str:
    """A LoRA tensor's name in a student with the adapters injected, from its name in peft's file."""
    stem, _, leaf = name.removeprefix("base_model.model.").rpartition(".")
    return f"{stem}.default.{leaf}"

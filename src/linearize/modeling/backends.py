"""`linearize inspect --backends`: which form of each operation runs here, and why, from the config alone."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch

from linearize.errors import InputError
from linearize.mixers import AttentionShape, MixerConfig
from linearize.modeling.config import LinearizeConfig
from linearize.modeling.inspect import read_config
from linearize.ops.dispatch import Asked


class Situation(NamedTuple):
    """Calls of one kind: their tokens, whether there is a past, whether gradients are asked for."""

    name: str
    tokens: int
    past: bool
    gradients: bool


SITUATIONS = (
    Situation("decode", 1, True, False),
    Situation("verify 8 draft tokens", 9, True, False),
    Situation("prefill", 4096, False, False),
    Situation("training", 1024, False, True),
)


def inspect_backends(path: str | os.PathLike[str], *, device: str | None = None) -> dict[str, Any]:
    """For each mixer of a student and each kind of call the form of its operations, and why. JSON-able.

    `device`: `cuda` or `cpu` (None: a GPU where there is one). Nothing is built: a form that fails at its first use
    gives way to the next with a warning then.

    Raises:
        InputError: no student at `path`, or another device.
    """
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if where.partition(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"device {where!r}: forms are chosen for cpu or cuda")
    config = read_config(path)
    if not isinstance(config, LinearizeConfig):
        raise InputError(f"{path} is no student: --backends tells the forms of a student's mixers")
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    first: dict[str, tuple[MixerConfig, AttentionShape]] = {}
    for mixer, shape in zip(config.mixers(), config.attention_shapes(), strict=True):
        if mixer is not None:
            first.setdefault(mixer.model_dump_json(), (mixer, shape))
    rows = [row for mixer, shape in first.values() for row in _forms(mixer, shape, where.partition(":")[0], dtype)]
    return {"model": str(path), "device": where, "dtype": str(dtype).removeprefix("torch."), "backends": rows}


def _forms(config: MixerConfig, shape: AttentionShape, device: str, dtype: torch.dtype) -> list[dict[str, str]]:
    """One row per kind of call and operation of a mixer."""
    with torch.device("meta"):
        mixer = config.build(shape)
    rows = []
    for name, tokens, past, gradients in SITUATIONS:
        asked = Asked(device=device, dtype=dtype, tokens=tokens, past=past, gradients=gradients)
        for dispatcher, call in mixer.operations(asked):
            form, why = dispatcher.choice(call)
            row = {"mixer": str(config.name), "call": name, "operation": dispatcher.operation}  # type: ignore[attr-defined]
            rows.append(row | {"form": form, "why": why})
            if dispatcher.operation == "layer" and form != "operations":
                break  # the kernel does what the operations would
    return rows

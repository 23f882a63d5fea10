"""`linearize inspect`: the mixer of each layer, what it costs and which form of each operation runs, from the config.

No weights are read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from linearize.errors import InputError, one_line
from linearize.mixers import MIXERS, AttentionShape, MixerConfig
from linearize.mixers.base import AttentionMixer
from linearize.modeling.config import LinearizeConfig
from linearize.modeling.io.hub import local_copy
from linearize.modeling.io.model_source import find_config, find_model
from linearize.modeling.io.model_source import read_config as read_source_config
from linearize.modeling.probe import AttentionSite, body_sizes, probe
from linearize.modeling.student import LinearizedForCausalLM
from linearize.ops.dispatch import Query

CONTEXTS = (1024, 16384, 65536)
SOFTMAX = "softmax"


def inspect_model(
    path: str | os.PathLike[str],
    *,
    contexts: Sequence[int] = CONTEXTS,
    revision: str | None = None,
    token: str | None = None,
) -> dict[str, Any]:
    """Per layer: mixer, parameters, bytes of state; totals, and bytes of cache against context. JSON-able.

    For one sequence, in bytes, with keys and values in the checkpoint's dtype. `parameters` of a layer are those of its
    block, `mixer_parameters` those that the plan added. `state_bytes` is what a mixer holds whatever the context;
    `bytes_per_token` what a softmax layer adds per token (up to `window` tokens where the teacher limits it).

    Raises:
        InputError: no model at `path`, or a family whose cache cannot be told from its config.
    """
    config = read_config(path, revision=revision, token=token)
    element_size = _element_size(config)
    model = _on_meta(config, path)
    student = isinstance(model, LinearizedForCausalLM)
    lm: Any = model.lm if isinstance(model, LinearizedForCausalLM) else model
    sites = _student_sites(config) if isinstance(config, LinearizeConfig) else _teacher_sites(lm)
    layers = [_layer(lm, site, config, element_size) for site in sites]
    return {
        "model": str(path),
        "kind": "student" if student else "teacher",
        "family": lm.config.model_type,
        "dtype": str(config.dtype or torch.float32).removeprefix("torch."),
        **_totals(model, layers),
        "layers": layers,
        "cache": [_cache(layers, sites, element_size, context, student) for context in contexts],
    }


def read_config(
    path: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
) -> PreTrainedConfig:
    """A model's config, checked; no weights are read, nor fetched. Raises InputError."""
    if revision is None and token is None:
        source = find_model(path)
    else:
        source = find_config(local_copy(path, revision=revision, token=token, weights=False).path)
    config = read_source_config(source)
    if isinstance(config, LinearizeConfig):
        try:
            config.mixers()
        except InputError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"cannot read {path} as a model: {one_line(error)}") from error
    return config


def _on_meta(config: PreTrainedConfig, path: str | os.PathLike[str]) -> PreTrainedModel:
    """The model without its weights: names and shapes only."""
    try:
        with torch.device("meta"):
            if isinstance(config, LinearizeConfig):
                return LinearizedForCausalLM(config)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
            return model
    except InputError:
        raise
    except (ValueError, KeyError, RuntimeError, TypeError, ImportError) as error:
        raise InputError(f"cannot build {path} as a causal language model: {one_line(error)}") from error


def _element_size(config: PreTrainedConfig) -> int:
    dtype = config.dtype or torch.float32
    return (getattr(torch, dtype) if isinstance(dtype, str) else dtype).itemsize


def _student_sites(config: LinearizeConfig) -> list[AttentionSite]:
    teacher = config.teacher_config().get_text_config()
    types = config.layer_types or []
    return [
        AttentionSite(
            name=name,
            layer=layer,
            shape=AttentionShape(**sizes),
            sliding_window=getattr(teacher, "sliding_window", None) if _is_sliding(teacher, types, layer) else None,
        )
        for layer, (name, sizes) in enumerate(zip(config.attention, config.shapes, strict=True))
    ]


def _is_sliding(teacher: PreTrainedConfig, types: Sequence[str], layer: int) -> bool:
    """Whether the teacher limits this layer to a window, converted or not."""
    own = getattr(teacher, "layer_types", None)
    return (own[layer] if own else types[layer]) == "sliding_attention"


def _teacher_sites(model: PreTrainedModel) -> list[AttentionSite]:
    """Attention modules as the surgery finds them; where it refuses the family, from the config's usual names."""
    try:
        return probe(model)
    except InputError:
        return _sites_by_config(model)


def _sites_by_config(model: PreTrainedModel) -> list[AttentionSite]:
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not heads or not getattr(config, "num_hidden_layers", None):
        raise InputError(f"{config.model_type}: its config names no attention heads, so its cache cannot be told")
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    shape = AttentionShape(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, value_dim=dim, **body_sizes(model.config)
    )
    blocks = list_of_blocks(model, config.num_hidden_layers)
    return [
        AttentionSite(name=f"{blocks}.{i}.attention", layer=i, shape=shape, sliding_window=None)
        for i in range(config.num_hidden_layers)
    ]


def list_of_blocks(model: nn.Module, count: int) -> str:
    """The name of the list that holds the model's blocks."""
    lists = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise InputError(f"{type(model).__name__}: has no list of {count} blocks, so its layers cannot be told apart")
    return lists[0]


def _layer(lm: nn.Module, site: AttentionSite, config: PreTrainedConfig, element_size: int) -> dict[str, Any]:
    """One row of the table."""
    block = lm.get_submodule(site.name.rpartition(".")[0])
    entry = config.plan[site.layer] if isinstance(config, LinearizeConfig) else None
    row: dict[str, Any] = {"layer": site.layer, "mixer": SOFTMAX if entry is None else entry["name"]}
    if entry is None:
        row |= {"window": site.sliding_window, "parameters": _count(block), "mixer_parameters": 0}
        return row | {"state_bytes": 0, "bytes_per_token": _kv_bytes(site.shape, element_size)}
    mixer: Any = lm.get_submodule(site.name).mixer
    cost = mixer.cost(element_size)
    row |= {"window": entry.get("window"), "parameters": _count(block), "mixer_parameters": _count(mixer)}
    return row | {"state_bytes": cost.state_bytes, "bytes_per_token": cost.bytes_per_token}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _kv_bytes(shape: AttentionShape, element_size: int) -> int:
    return shape.num_kv_heads * (shape.head_dim + shape.value_dim) * element_size


def _totals(model: nn.Module, layers: Sequence[dict[str, Any]]) -> dict[str, int]:
    return {
        "num_layers": len(layers),
        "num_converted": sum(layer["mixer"] != SOFTMAX for layer in layers),
        "parameters": _count(model),
        "mixer_parameters": sum(layer["mixer_parameters"] for layer in layers),
        "state_bytes": sum(layer["state_bytes"] for layer in layers),
        "bytes_per_token": sum(layer["bytes_per_token"] for layer in layers),
    }


def _cache(
    layers: Sequence[dict[str, Any]], sites: Sequence[AttentionSite], element_size: int, context: int, student: bool
) -> dict[str, Any]:
    """Bytes of one sequence's cache at a context: the teacher's, and the student's with the ratio of the two."""
    teacher = sum(_kv_bytes(s.shape, element_size) * min(context, s.sliding_window or context) for s in sites)
    row: dict[str, Any] = {"context": context, "teacher_bytes": teacher}
    if student:
        own = sum(
            layer["state_bytes"] + layer["bytes_per_token"] * min(context, site.sliding_window or context)
            for layer, site in zip(layers, sites, strict=True)
        )
        row |= {"student_bytes": own, "ratio": round(teacher / own, 3)}
    return row


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


def inspect_backends(
    path: str | os.PathLike[str],
    *,
    device: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> dict[str, Any]:
    """For each mixer of a student and each kind of call the backend of its operations, and why. JSON-able.

    `device`: `cuda` or `cpu` (None: a GPU where there is one). Nothing is built: a backend that fails at its first use
    gives way to the next with a warning then.

    Raises:
        InputError: no student at `path`, or another device.
    """
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if where.partition(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"device {where!r}: backends are chosen for cpu or cuda")
    config = read_config(path, revision=revision, token=token)
    if not isinstance(config, LinearizeConfig):
        raise InputError(f"{path} is no student: --backends tells the backends of a student's mixers")
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    first: dict[str, tuple[MixerConfig, AttentionShape]] = {}
    for mixer, shape in zip(config.mixers(), config.attention_shapes(), strict=True):
        if mixer is not None:
            first.setdefault(mixer.model_dump_json(), (mixer, shape))
    rows = [row for mixer, shape in first.values() for row in _backends(mixer, shape, where.partition(":")[0], dtype)]
    return {"model": str(path), "device": where, "dtype": str(dtype).removeprefix("torch."), "backends": rows}


def all_backends(device: str, dtype: torch.dtype) -> list[dict[str, str]]:
    """For every mixer of the table, at the size of a layer of 8B parameters, the rows of `inspect_backends`.

    `device`: a type, like `cuda`.
    """
    shape = AttentionShape(num_heads=32, num_kv_heads=8, head_dim=128, value_dim=128, model_dim=4096)
    return [row for config in MIXERS.values() for row in _backends(config(), shape, device, dtype)]


def _backends(config: MixerConfig, shape: AttentionShape, device: str, dtype: torch.dtype) -> list[dict[str, str]]:
    """One row per kind of call and operation of a mixer."""
    with torch.device("meta"):
        mixer = config.build(shape)
    rows = []
    for name, tokens, past, gradients in SITUATIONS:
        query = Query(device=device, dtype=dtype, tokens=tokens, past=past, gradients=gradients)
        for dispatcher, call in mixer.operations(query):
            backend, why = dispatcher.choice(call)
            if isinstance(mixer, AttentionMixer) and mixer.decodes(query):
                backend, why = "decoder", f"one row, written in place; several rows: {backend}"
            row = {"mixer": str(config.name), "call": name, "operation": dispatcher.operation}  # type: ignore[attr-defined]
            rows.append(row | {"backend": backend, "why": why})
            if dispatcher.operation == "layer" and backend != "operations":
                break  # the kernel does what the operations would
    return rows

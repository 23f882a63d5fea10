"""Students as Qwen3.5 (text): a Qwen3 body, gated delta net layers and gated softmax layers with the gate held at 1/2.

Letters: H query heads, G key/value heads, D head dimension, V value dimension, M model width, K taps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.mixers import AttentionShape
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.export.common import (
    Source,
    body_fields,
    body_misfit,
    body_tensors,
    layer_misfit,
    listed,
    repeat_heads,
    rope_fields,
    write_model,
)

TARGET = "qwen3.5"
MIXER = "gated_delta_net"
FAMILIES = ("qwen3",)


def misfit(source: Source) -> str | None:
    """Why a student cannot be written as Qwen3.5, or None."""
    reason = layer_misfit(source, TARGET, MIXER) or body_misfit(source, TARGET, FAMILIES)
    if reason:
        return reason
    layers = source.holding(MIXER)
    biased = [i for i in layers if any(name.endswith("_proj.bias") for name in source.mixer(i))]
    if biased:
        return f"{TARGET} has no biases in its delta layers, {listed(biased)} have"
    if len({_sizes(source, i) for i in layers}) > 1:
        return f"{TARGET} has delta layers of one size, {listed(layers)} differ"
    return None


def _sizes(source: Source, layer: int) -> tuple[int, ...]:
    shape = source.shapes[layer]
    return shape.num_heads, shape.head_dim, shape.value_dim, source.mixer(layer)["conv_weight"].shape[1]


def write(student: LinearizedForCausalLM, source: Source, folder: Path) -> None:
    """Config and weights of the student as Qwen3.5 text."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    config = Qwen3_5TextConfig(**config_fields(source))
    write_model(Qwen3_5ForCausalLM, config, tensors(source), source, student.generation_config, folder)


def config_fields(source: Source) -> dict[str, Any]:
    """The fields of `Qwen3_5TextConfig`; nothing is left to its defaults that the student depends on."""
    shape = source.shapes[0]
    half = shape.head_dim // 2
    sections = {"mrope_section": [half - 2 * (half // 3), half // 3, half // 3], "mrope_interleaved": True}
    rope = rope_fields(source) | {"partial_rotary_factor": 1.0, **sections}
    fields = body_fields(source) | {
        "head_dim": shape.head_dim,
        "attention_bias": any(name.endswith("bias") for i in source.kept for name in source.attention(i)),
        "attention_dropout": 0.0,
        "rope_parameters": rope,
        "layer_types": ["full_attention" if mixer is None else "linear_attention" for mixer in source.plan],
    }
    if (interval := _interval(source)) is not None:
        fields["full_attention_interval"] = interval
    if layers := source.holding(MIXER):
        heads, keys, values, taps = _sizes(source, layers[0])
        fields |= {
            "linear_num_key_heads": heads,
            "linear_num_value_heads": heads,
            "linear_key_head_dim": keys,
            "linear_value_head_dim": values,
            "linear_conv_kernel_dim": taps,
        }
    return fields


def _interval(source: Source) -> int | None:
    """N where exactly every N-th layer keeps softmax: engines that do not read `layer_types` (mlx-lm) count so."""
    return next(
        (n for n in range(1, len(source.plan) + 1) if source.kept == list(range(n - 1, len(source.plan), n))), None
    )


def tensors(source: Source) -> dict[str, Tensor]:
    """All tensors of the student under Qwen3.5's names."""
    made = {name: centred(x) if "norm" in name else x for name, x in body_tensors(source).items()}
    for i, mixer in enumerate(source.plan):
        layer = f"model.layers.{i}"
        for name in ("gate", "up", "down"):
            made[f"{layer}.mlp.{name}_proj.weight"] = source.state[f"{layer}.mlp.{name}_proj.weight"]
        if mixer is None:
            block, name = softmax_tensors(source.attention(i), source.shapes[i]), "self_attn"
        else:
            block, name = delta_tensors(source.mixer(i), source.shapes[i]), "linear_attn"
        made |= {f"{layer}.{name}.{key}": x for key, x in block.items()}
    return made


def centred(weight: Tensor) -> Tensor:
    """The weight of a norm that multiplies by one plus it."""
    return (weight.float() - 1.0).to(weight.dtype)


def softmax_tensors(weights: dict[str, Tensor], shape: AttentionShape) -> dict[str, Tensor]:
    """A kept layer: gate rows of zeros (sigmoid(0) = 1/2) beside each head's queries, output projection doubled."""
    made = {"q_norm.weight": centred(weights["q_norm.weight"]), "k_norm.weight": centred(weights["k_norm.weight"])}
    for kind in ("weight", "bias"):
        if f"q_proj.{kind}" not in weights:
            continue
        q = weights[f"q_proj.{kind}"].unflatten(0, (shape.num_heads, shape.head_dim))
        made[f"q_proj.{kind}"] = torch.cat([q, torch.zeros_like(q)], dim=1).flatten(0, 1)
        made |= {f"{name}.{kind}": weights[f"{name}.{kind}"] for name in ("k_proj", "v_proj", "o_proj")}
    made["o_proj.weight"] = 2 * made["o_proj.weight"]
    return made


def delta_tensors(weights: dict[str, Tensor], shape: AttentionShape) -> dict[str, Tensor]:
    """A gated delta net layer: key and value rows repeated from the key/value heads to all heads.

    Repeating after a depthwise convolution equals repeating its channels and taps before it, so both options of the
    mixer fit.
    """
    conv = weights["conv_weight"]
    if conv.shape[0] != shape.num_heads * (shape.value_dim + 2 * shape.head_dim):
        conv = _all_heads(conv, shape)
    return {
        "in_proj_qkv.weight": _all_heads(weights["qkv_proj.weight"], shape),
        "in_proj_z.weight": weights["gate_proj.weight"],
        "in_proj_b.weight": weights["beta_proj.weight"],
        "in_proj_a.weight": weights["decay_proj.weight"],
        "conv1d.weight": conv[:, None],
        "dt_bias": weights["dt_bias"],
        "A_log": weights["A_log"],
        "norm.weight": weights["norm_weight"],
        "out_proj.weight": weights["out_proj.weight"],
    }


def _all_heads(rows: Tensor, shape: AttentionShape) -> Tensor:
    """Rows [q H D; k G D; v G V] with keys and values at H heads."""
    groups = shape.num_kv_heads
    q, k, v = rows.split([shape.num_heads * shape.head_dim, groups * shape.head_dim, groups * shape.value_dim])
    return torch.cat([q, repeat_heads(k, shape.head_dim, shape.group), repeat_heads(v, shape.value_dim, shape.group)])

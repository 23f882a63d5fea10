"""Students as GraniteMoeHybrid: a Llama-like body, Mamba-2 layers and softmax layers (Granite 4 without experts).

Letters: H query heads, G key/value heads, D head dimension (state), V value dimension, M model width, K taps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
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

TARGET = "granite-hybrid"
MIXER = "mamba2"
GROUPED_NORMS = "5.23.0"
FAMILIES = ("llama", "mistral", "qwen2", "smollm3", "granite")
MULTIPLIERS = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}
NO_LIMIT = [0.0, 1e30]
PUBLISHED_TYPES = {"linear_attention": "mamba", "full_attention": "attention"}


def misfit(source: Source) -> str | None:
    """Why a student cannot be written as GraniteMoeHybrid, or None."""
    reason = layer_misfit(source, TARGET, MIXER) or body_misfit(source, TARGET, FAMILIES)
    return reason or _mamba_misfit(source) or _softmax_misfit(source) or _library_misfit(source)


def _mamba_misfit(source: Source) -> str | None:
    layers = source.holding(MIXER)
    if not layers:
        return None
    sizes = {_sizes(source, i) for i in layers}
    if len(sizes) > 1:
        return f"{TARGET} has Mamba-2 layers of one size, {listed(layers)} differ"
    shape = source.shapes[layers[0]]
    inner, width = shape.num_heads * shape.value_dim, source.config.hidden_size
    if inner % width:
        return f"{TARGET} needs heads x head size to be a multiple of the width, here {inner} and {width}"
    return None


def _library_misfit(source: Source) -> str | None:
    if not source.holding(MIXER) or Version(transformers.__version__) >= Version(GROUPED_NORMS):
        return None
    return (
        f"{TARGET} needs transformers {GROUPED_NORMS} or newer, whose Mamba-2 layers normalise by group "
        f"({transformers.__version__} is installed and would give other text)"
    )


def _sizes(source: Source, layer: int) -> tuple[int, ...]:
    shape = source.shapes[layer]
    return shape.num_heads, shape.head_dim, shape.value_dim, source.mixer(layer)["conv_weight"].shape[1]


def _softmax_misfit(source: Source) -> str | None:
    if len(_rotary(source)) > 1:
        return f"some kept layers have rotary positions and some have none, {TARGET} has one rule for all"
    return None


def _rotary(source: Source) -> set[bool]:
    """Whether the kept layers have rotary positions (SmolLM3 leaves them out in some)."""
    uses = getattr(source.config, "no_rope_layers", None) or [1] * len(source.plan)
    return {bool(uses[i]) for i in source.kept}


def write(student: LinearizedForCausalLM, source: Source, folder: Path) -> None:
    """Config and weights of the student as GraniteMoeHybrid."""
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    config = GraniteMoeHybridConfig(**config_fields(source))
    write_model(GraniteMoeHybridForCausalLM, config, tensors(source), source, student.generation_config, folder)
    _publish(folder / "config.json")


def config_fields(source: Source) -> dict[str, Any]:
    """The fields of `GraniteMoeHybridConfig`; nothing is left to its defaults that the student depends on."""
    shape = source.shapes[0]
    multipliers = {name: getattr(source.config, name, value) for name, value in MULTIPLIERS.items()}
    fields = body_fields(source) | multipliers
    if shape.head_dim * shape.num_heads != source.config.hidden_size:
        fields["head_dim"] = shape.head_dim
    return fields | {
        "attention_multiplier": getattr(source.config, "attention_multiplier", shape.head_dim**-0.5),
        "attention_bias": any(name.endswith("bias") for i in source.kept for name in source.attention(i)),
        "attention_dropout": 0.0,
        "rope_parameters": rope_fields(source),
        "position_embedding_type": "rope" if True in _rotary(source) else None,
        "layer_types": ["full_attention" if mixer is None else "linear_attention" for mixer in source.plan],
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": source.config.intermediate_size,
        **_mamba_fields(source),
    }


def _mamba_fields(source: Source) -> dict[str, object]:
    layers = source.holding(MIXER)
    width = source.config.hidden_size
    if not layers:  # sizes that pass the config's own checks
        return {"mamba_n_heads": 1, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_d_head": width, "mamba_expand": 1}
    heads, state, value, taps = _sizes(source, layers[0])
    return {
        "mamba_n_heads": heads,
        "mamba_n_groups": heads,
        "mamba_d_state": state,
        "mamba_d_head": value,
        "mamba_d_conv": taps,
        "mamba_expand": heads * value // width,
        "mamba_conv_bias": True,
        "mamba_proj_bias": _mamba_bias(source),
    }


def _mamba_bias(source: Source) -> bool:
    return any(name in source.mixer(i) for i in source.holding(MIXER) for name in ("in_proj.bias", "out_proj.bias"))


def _publish(path: Path) -> None:
    """Fields as Granite's own checkpoints spell them: engines other than transformers 5 know no other names."""
    fields = json.loads(path.read_text("utf-8"))
    fields["layer_types"] = [PUBLISHED_TYPES[kind] for kind in fields["layer_types"]]
    fields["time_step_limit"] = NO_LIMIT  # not infinity, which JSON lacks; mlx-lm's own default would clip dt at 0.001
    rope = fields.get("rope_parameters") or {}
    if "rope_theta" in rope:
        fields["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        fields["rope_scaling"] = rope
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", "utf-8")


def tensors(source: Source) -> dict[str, Tensor]:
    """All tensors of the student under GraniteMoeHybrid's names."""
    made = body_tensors(source)
    attention_bias, mamba_bias = bool(config_fields(source)["attention_bias"]), _mamba_bias(source)
    for i, mixer in enumerate(source.plan):
        layer = f"model.layers.{i}"
        gate, up, down = (source.state[f"{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        made[f"{layer}.shared_mlp.input_linear.weight"] = torch.cat([gate, up])
        made[f"{layer}.shared_mlp.output_linear.weight"] = down
        if mixer is None:
            block, name = softmax_tensors(source.attention(i), attention_bias), "self_attn"
        else:
            block, name = mamba_tensors(source.mixer(i), source.shapes[i], mamba_bias), "mamba"
        made |= {f"{layer}.{name}.{key}": x for key, x in block.items()}
    return made


def softmax_tensors(weights: dict[str, Tensor], bias: bool) -> dict[str, Tensor]:
    """A kept layer: its own names; with `bias`, zeros where the teacher has none (Qwen2's output projection)."""
    made = {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        weight = made[f"{name}.weight"] = weights[f"{name}.weight"]
        if bias:
            made[f"{name}.bias"] = weights.get(f"{name}.bias", weight.new_zeros(weight.shape[0]))
    return made


def mamba_tensors(weights: dict[str, Tensor], shape: AttentionShape, bias: bool) -> dict[str, Tensor]:
    """A mamba2 layer: input and state rows repeated from the key/value heads to all heads; nothing else changes.

    Repeating after a depthwise convolution equals repeating its channels and taps before it, so both options of the
    mixer fit.
    """
    made = {"in_proj.weight": _all_heads(weights["in_proj.weight"], shape, gated=True)}
    if bias:
        rows = made["in_proj.weight"].shape[0]
        bias_R = weights.get("in_proj.bias")
        made["in_proj.bias"] = weights["dt_bias"].new_zeros(rows) if bias_R is None else _all_heads(bias_R, shape, True)
        out = weights["out_proj.weight"]
        made["out_proj.bias"] = weights.get("out_proj.bias", out.new_zeros(out.shape[0]))
    conv_weight, conv_bias = weights["conv_weight"], weights["conv_bias"]
    if conv_weight.shape[0] != shape.num_heads * (shape.value_dim + 2 * shape.head_dim):
        conv_weight, conv_bias = (_all_heads(x, shape, gated=False) for x in (conv_weight, conv_bias))
    return made | {
        "conv1d.weight": conv_weight[:, None],
        "conv1d.bias": conv_bias,
        "dt_bias": weights["dt_bias"],
        "A_log": weights["A_log"],
        "D": weights["D"],
        "norm.weight": weights["norm_weight"],
        "out_proj.weight": weights["out_proj.weight"],
    }


def _all_heads(rows: Tensor, shape: AttentionShape, gated: bool) -> Tensor:
    """Rows [gate H V; x G V; B G D; C H D; dt H] (`gated`) or [x; B; C] with x and B at H heads."""
    heads, groups, head_dim, value_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.value_dim
    sizes = [groups * value_dim, groups * head_dim, heads * head_dim]
    if gated:
        gate, x, b, c, dt = rows.split([heads * value_dim, *sizes, heads])
    else:
        x, b, c = rows.split(sizes)
    repeated = [repeat_heads(x, value_dim, shape.group), repeat_heads(b, head_dim, shape.group), c]
    return torch.cat([gate, *repeated, dt] if gated else repeated)

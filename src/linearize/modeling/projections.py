"""The projections of an attention module, whatever its family calls them and however it stores them.

Letters: H query heads, G key/value heads, D head dimension, V value dimension, M model width, R rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from linearize.errors import InputError
from linearize.modeling.four_bits import is_nf4, nf4_numbers

if TYPE_CHECKING:
    from linearize.mixers import AttentionShape
    from linearize.mixers.layer_mixer import AttentionWeights

OUTPUTS = ("o_proj", "dense", "out_proj", "c_proj")
Rows = tuple[Tensor, Tensor | None]


def attention_weights(module: nn.Module, shape: AttentionShape) -> AttentionWeights:
    """The four projections of an attention module, in the order of `nn.Linear` (`[out, in]`).

    Raises:
        InputError: a family whose projections are of no known kind.
    """
    from linearize.mixers.layer_mixer import AttentionWeights

    q, k, v = _inputs(module, shape)
    o = _linear(_output(module))
    expected = (
        shape.num_heads * shape.head_dim,
        shape.num_kv_heads * shape.head_dim,
        shape.num_kv_heads * shape.value_dim,
    )
    if (q[0].shape[0], k[0].shape[0], v[0].shape[0]) != expected:
        raise InputError(
            f"{type(module).__name__} has projections of unexpected sizes: a layer mixer cannot start from it"
        )
    return AttentionWeights(q[0], k[0], v[0], o[0], q[1], k[1], v[1], o[1])


def with_biases(module: nn.Module, shape: AttentionShape) -> AttentionShape:
    """The shape, saying which of the module's projections have biases (none where they are of no known kind)."""
    try:
        found = attention_weights(module, shape)
    except InputError:
        return shape
    qkv = any(bias is not None for bias in (found.q_bias, found.k_bias, found.v_bias))
    return replace(shape, qkv_bias=qkv, output_bias=found.o_bias is not None)


def key_projection(module: nn.Module, hidden_BTM: Tensor, shape: AttentionShape) -> Tensor:
    """The key projection's output before norms and rotary positions, `[B, G, T, D]`."""
    if isinstance(k_proj := getattr(module, "k_proj", None), nn.Module):
        keys: Tensor = k_proj(hidden_BTM)
    else:
        weight, bias = _inputs(module, shape)[1]
        keys = nn.functional.linear(hidden_BTM, weight, bias)
    return keys.unflatten(-1, (shape.num_kv_heads, shape.head_dim)).transpose(1, 2)


def read_directly(model: nn.Module) -> set[nn.Module]:
    """Projections whose weight is read without a call of theirs: where `key_projection` takes a part of it."""
    attentions = [m for m in model.modules() if getattr(getattr(m, "mixer", None), "needs_keys", False)]
    names = {name for names in READERS for name in names if len(names) == 1}
    return {child for module in attentions for name, child in module.named_children() if name in names}


def _inputs(module: Any, shape: AttentionShape) -> tuple[Rows, Rows, Rows]:
    for names, read in READERS.items():
        if all(isinstance(getattr(module, name, None), nn.Module) for name in names):
            return read(module, shape)
    known = "; ".join(", ".join(names) for names in READERS)
    raise InputError(
        f"{type(module).__name__} has no query, key and value projections that a layer mixer could start from "
        f"(known: {known}): use a mixer that stands between the projections, as lolcats"
    )


def _output(module: Any) -> nn.Module:
    for name in OUTPUTS:
        if isinstance(found := getattr(module, name, None), nn.Module):
            return found
    raise InputError(f"{type(module).__name__} has no output projection (known: {', '.join(OUTPUTS)})")


def _linear(layer: Any) -> Rows:
    """Weight `[out, in]` and bias of a linear layer (GPT-2's stores its weight the other way round)."""
    weight = layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight
    weight = nf4_numbers(weight) if is_nf4(weight) else weight.detach()
    return weight, None if getattr(layer, "bias", None) is None else layer.bias.detach()


def _separate(module: Any, _shape: AttentionShape) -> tuple[Rows, Rows, Rows]:
    return _linear(module.q_proj), _linear(module.k_proj), _linear(module.v_proj)


def _stacked(name: str) -> Callable[[Any, AttentionShape], tuple[Rows, Rows, Rows]]:
    """Rows [q; k; v]."""

    def read(module: Any, shape: AttentionShape) -> tuple[Rows, Rows, Rows]:
        weight, bias = _linear(getattr(module, name))
        heads, groups = shape.num_heads, shape.num_kv_heads
        sizes = [heads * shape.head_dim, groups * shape.head_dim, groups * shape.value_dim]
        biases = [None] * 3 if bias is None else bias.split(sizes)
        return tuple(zip(weight.split(sizes), biases, strict=True))  # type: ignore[return-value]

    return read


def _by_head(module: Any, shape: AttentionShape) -> tuple[Rows, Rows, Rows]:
    """Rows [q; k; v] head by head (GPT-NeoX)."""
    weight, bias = _linear(module.query_key_value)

    def part(rows: Tensor) -> list[Tensor]:
        return [x.flatten(0, 1) for x in rows.unflatten(0, (shape.num_heads, 3, shape.head_dim)).unbind(1)]

    biases = [None] * 3 if bias is None else part(bias)
    return tuple(zip(part(weight), biases, strict=True))  # type: ignore[return-value]


READERS: dict[tuple[str, ...], Callable[[Any, AttentionShape], tuple[Rows, Rows, Rows]]] = {
    ("q_proj", "k_proj", "v_proj"): _separate,
    ("qkv_proj",): _stacked("qkv_proj"),
    ("c_attn",): _stacked("c_attn"),
    ("query_key_value",): _by_head,
}

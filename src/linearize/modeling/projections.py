"""The projections of an attention module, whatever its family calls them and however it stores them.

Letters: H query heads, G key/value heads, D head dimension, V value dimension, M model width, R outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linearize.errors import InputError, one_line
from linearize.modeling.io.quantized import is_quantized, whole_weight
from linearize.modeling.library_internals import execution_device

if TYPE_CHECKING:
    from linearize.mixers import AttentionShape
    from linearize.mixers.layer_mixer import AttentionWeights

OUTPUTS = ("o_proj", "dense", "out_proj", "c_proj")
ALIKE = 0.95  # the cosine of vectors that are the same but for rounding
SEPARATE = ("q_proj", "k_proj", "v_proj")
Parts = tuple[Tensor, Tensor, Tensor]


def attention_weights(module: nn.Module, shape: AttentionShape) -> AttentionWeights:
    """The four projections of an attention module, in the order of `nn.Linear` (`[out, in]`).

    Raises:
        InputError: a family whose projections are of no known kind, or cannot be read.
    """
    from linearize.mixers.layer_mixer import AttentionWeights

    layers, cut = _inputs(module)
    width, heads = shape.model_dim, shape.num_heads * shape.value_dim
    read = [_linear(layer, width) for layer in layers]
    weights: Sequence[Tensor] = [weight for weight, _ in read]
    biases: Sequence[Tensor | None] = [bias for _, bias in read]
    sizes = _sizes(shape)
    if [weight.shape[0] for weight in weights] != (list(sizes) if cut is None else [sum(sizes)]):
        raise InputError(
            f"{type(module).__name__} has projections of unexpected sizes: a layer mixer cannot start from it"
        )
    if cut is not None:
        weights = [part.T for part in cut(weights[0].T, shape)]
        biases = [None] * 3 if biases[0] is None else cut(biases[0], shape)
    o, o_bias = _linear(_output(module), heads)
    q, k, v = weights
    q_bias, k_bias, v_bias = biases
    return AttentionWeights(q, k, v, o, q_bias, k_bias, v_bias, o_bias)


def with_biases(module: nn.Module, shape: AttentionShape) -> AttentionShape:
    """The shape, saying which of the module's projections have biases (none where they are of no known kind)."""
    try:
        layers, output = _inputs(module)[0], _output(module)
    except InputError:
        return shape
    qkv = any(getattr(layer, "bias", None) is not None for layer in layers)
    return replace(shape, qkv_bias=qkv, output_bias=getattr(output, "bias", None) is not None)


def key_projection(module: nn.Module, hidden_BTM: Tensor, shape: AttentionShape) -> Tensor:
    """The key projection's output before norms and rotary positions, `[B, G, T, D]`.

    The projection is called, whatever stands in its place (an adapter, a quantized layer, one whose weights come for
    the call): where it gives q, k and v in one, k is cut out of that.
    """
    layers, cut = _inputs(module)
    keys = layers[1](hidden_BTM) if cut is None else cut(layers[0](hidden_BTM), shape)[1]
    return keys.unflatten(-1, (shape.num_kv_heads, shape.head_dim)).transpose(1, 2)


@torch.no_grad()
def are_read_rightly(module: nn.Module, hidden_BTM: Tensor, seen: Parts, shape: AttentionShape) -> bool:
    """Whether the projections as they are read here give what a module's attention saw of an input: `seen` is its
    q `[B, H, T, D]`, k and v `[B, G, T, .]`, of tokens from position 0 on. True where none are known.

    Directions are compared, head by head: a scale (that of the scores, of a norm) is none of the projections'. Queries
    and keys are compared at position 0, where rotary positions turn nothing, and not where norms follow them.
    """
    try:
        layers, cut = _inputs(module)
    except InputError:
        return True
    normed = any("norm" in type(part).__name__.lower() for part in module.modules())
    try:
        projected = [layer(hidden_BTM) for layer in layers] if cut is None else cut(layers[0](hidden_BTM), shape)
        for i, (mine, theirs) in enumerate(zip(projected, seen, strict=True)):
            if i == 2 or not normed:
                heads = mine.unflatten(-1, (theirs.shape[1], -1)).transpose(1, 2)
                few = slice(None) if i == 2 else slice(1)
                if not _same_directions(heads[:, :, few].double(), theirs[:, :, few].double()):
                    return False
    except RuntimeError:  # sizes that do not fit
        return False
    return True


def _same_directions(a_BHTD: Tensor, b_BHTD: Tensor) -> bool:
    lengths = (a_BHTD.norm(dim=-1) * b_BHTD.norm(dim=-1)).sum()
    return bool((a_BHTD * b_BHTD).sum() >= ALIKE * lengths)


def _inputs(module: Any) -> tuple[list[Any], Callable[[Tensor, AttentionShape], Parts] | None]:
    """The projections of q, k and v; or the one of all three, and what cuts its outputs (the last dimension)."""
    if all(isinstance(getattr(module, name, None), nn.Module) for name in SEPARATE):
        return [getattr(module, name) for name in SEPARATE], None
    for name, choose in FUSED.items():
        if isinstance(layer := getattr(module, name, None), nn.Module):
            return [layer], choose(module)
    known = "; ".join([", ".join(SEPARATE), *FUSED])
    raise InputError(
        f"{type(module).__name__} has no query, key and value projections that a layer mixer could start from "
        f"(known: {known}): use a mixer that stands between the projections, as lolcats"
    )


def _output(module: Any) -> nn.Module:
    for name in OUTPUTS:
        if isinstance(layer := getattr(module, name, None), nn.Module):
            return layer
    raise InputError(f"{type(module).__name__} has no output projection (known: {', '.join(OUTPUTS)})")


def _linear(layer: Any, inputs: int) -> tuple[Tensor, Tensor | None]:
    """Weight `[out, in]` and bias of a layer that is linear in its `inputs` numbers.

    A plain layer says them itself (GPT-2's stores its weight the other way round). Of anything else (with an adapter,
    offloaded, in a form unknown here) they are what it gives for unit vectors and for zeros.
    """
    if not _is_plain(layer):
        return _measured(layer, inputs)
    weight = whole_weight(layer.weight) if is_quantized(layer.weight) else layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach()
    return (weight.T if type(layer).__name__ == "Conv1D" else weight), bias


def _is_plain(layer: Any) -> bool:
    """Whether a layer computes x W^T + b from what it holds and nothing else."""
    if "forward" in vars(layer) or hasattr(layer, "base_layer"):
        return False
    weight: Any = getattr(layer, "weight", None)
    if weight is None or is_quantized(weight):
        return weight is not None
    known = type(layer) is nn.Linear or type(layer).__name__ == "Conv1D"
    return known and weight.is_floating_point() and weight.itemsize > 1


@torch.no_grad()
def _measured(layer: Any, inputs: int) -> tuple[Tensor, Tensor | None]:
    """`_linear` by calls. Raises InputError for a layer that cannot be called with a matrix."""
    tensors = [x for x in (*layer.parameters(), *layer.buffers()) if x.is_floating_point() and x.itemsize > 1]
    like = {"device": tensors[0].device, "dtype": tensors[0].dtype} if tensors else {}
    if like and like["device"].type == "meta":
        like["device"] = execution_device(layer) or "cpu"
    was_training = layer.training
    try:
        layer.eval()
        bias = layer(torch.zeros(1, inputs, **like))[0]
        weight = (layer(torch.eye(inputs, **like)) - bias).T
    except Exception as error:
        raise InputError(
            f"a projection of type {type(layer).__name__} cannot be read ({one_line(error)}): load the teacher with "
            "whole weights, or merge its adapters"
        ) from error
    finally:
        layer.train(was_training)
    return weight, None if getattr(layer, "bias", None) is None and not bool(bias.any()) else bias


def _sizes(shape: AttentionShape) -> tuple[int, int, int]:
    """Outputs of the query, key and value projections."""
    groups = shape.num_kv_heads
    return shape.num_heads * shape.head_dim, groups * shape.head_dim, groups * shape.value_dim


def _stacked(x_R: Tensor, shape: AttentionShape) -> Parts:
    """Of outputs [q; k; v]: q, k and v."""
    q, k, v = x_R.split(_sizes(shape), dim=-1)
    return q, k, v


def _by_head(x_R: Tensor, shape: AttentionShape) -> Parts:
    """Of outputs [q; k; v] head by head (GPT-NeoX, GPT-BigCode with many key heads): q, k and v."""
    group = shape.group * shape.head_dim
    parts = x_R.unflatten(-1, (shape.num_kv_heads, -1)).split([group, shape.head_dim, shape.value_dim], dim=-1)
    q, k, v = (part.flatten(-2) for part in parts)
    return q, k, v


FUSED: dict[str, Callable[[Any], Callable[[Tensor, AttentionShape], Parts]]] = {
    "qkv_proj": lambda _: _stacked,
    "c_attn": lambda module: _stacked if getattr(module, "multi_query", True) else _by_head,
    "query_key_value": lambda _: _by_head,
}

"""A linearized Llama for mlx-lm: window + linear attention with a state of constant size, softmax where it was kept.

Written beside the weights by linearize and loaded by mlx-lm through `model_file`; needs nothing but mlx and mlx-lm.

Letters: B rows, T tokens of a part, S keys that a part sees, G key/value heads, R query heads for each, H = G R, D head
dimension, F features.
"""

from dataclasses import dataclass
from typing import Any, Optional

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, _BaseCache
from mlx_lm.models.rope_utils import initialize_rope

GAIN_LIMIT = 15.0
SMALLEST = 1e-12


@dataclass
class ModelArgs(BaseModelArgs):
    """`linearize_layers`: the mixer of each layer, None where softmax was kept."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    vocab_size: int
    linearize_layers: list
    rope_theta: float = 10000.0
    rope_scaling: Optional[dict] = None
    max_position_embeddings: Optional[int] = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    query_key_norm: bool = False


class FeatureMap(nn.Module):
    """phi: `[B, H, T, D]` -> `[B, H, T, F]`, or keys of G heads to features of H."""

    def __init__(self, name: str, heads: int, head_dim: int, dim: int):
        super().__init__()
        self.name, self.heads = name, heads
        if name != "elu":
            self.weight_HDF = mx.zeros((heads, head_dim, dim))
        if name == "t2r":
            self.bias_HF = mx.zeros((heads, dim))
        if name == "gain":
            self.gain_HD, self.log_scale_H = mx.zeros((heads, head_dim)), mx.zeros((heads,))

    def __call__(self, x: mx.array) -> mx.array:
        x = mx.repeat(x, self.heads // x.shape[1], axis=1)
        if self.name == "elu":
            return mx.where(x > 0, x, mx.exp(mx.minimum(x, 0)) - 1) + 1
        z = x @ self.weight_HDF.astype(x.dtype)
        if self.name == "t2r":
            return mx.maximum(z + self.bias_HF[:, None].astype(x.dtype), 0)
        if self.name == "exp":
            up, down = z - z.max(-1, keepdims=True), z.min(-1, keepdims=True) - z
            return mx.concatenate([mx.exp(up), mx.exp(down)], axis=-1)
        phi = mx.concatenate([mx.softmax(z, axis=-1), mx.softmax(-z, axis=-1)], axis=-1)
        phi = mx.maximum(phi, SMALLEST)
        if self.name == "hedgehog":
            return phi
        log_gain = (x * self.gain_HD[:, None].astype(x.dtype)).sum(-1, keepdims=True)
        log_gain = log_gain + self.log_scale_H[:, None, None].astype(x.dtype)
        return phi * mx.exp(mx.clip(log_gain, -GAIN_LIMIT, GAIN_LIMIT))


class WindowCache(_BaseCache):
    """Keys and values of the last two blocks and of the first tokens, and the sum of all that left the window."""

    def __init__(self):
        self.arrays, self.offset = [None] * 5, 0  # keys, values, sum, keys and values of the first tokens

    @property
    def state(self):
        return *self.arrays, mx.array(self.offset)

    @state.setter
    def state(self, values):
        self.arrays, self.offset = list(values[:5]), int(values[5].item())

    def size(self):
        return self.offset

    def empty(self):
        return self.offset == 0

    @property
    def nbytes(self):
        return sum(x.nbytes for x in self.arrays if x is not None)


class WindowMixer(nn.Module):
    """Softmax over blocks b - 1 and b and the first tokens, and a linear term over all others, one normaliser.

    y = [ sum_window g exp(s - m) v + r phi(q)^T sum phi(k) v^T ] / [ the same with v = 1 ]
    """

    def __init__(self, options: dict, heads: int, groups: int, head_dim: int):
        super().__init__()
        self.window, self.sinks, self.shift = options["window"], options["num_sinks"], options["shift"]
        self.affine, self.scale = options["affine"], head_dim**-0.5
        self.linear, self.ratio = options["feature_map"] is not None, heads // groups
        if self.linear:
            sizes = (options["feature_map"], heads, head_dim, options["feature_dim"])
            self.feature_q, self.feature_k = FeatureMap(*sizes), FeatureMap(*sizes)
            self.window_factor_H = mx.zeros((heads,))

    def __call__(self, q: mx.array, k: mx.array, v: mx.array, cache: WindowCache) -> mx.array:
        """Outputs `[B, H, T, D]` of new tokens, block by block; the cache goes on behind them."""
        dtype, outputs, done = q.dtype, [], 0
        q, k, v = (x.astype(mx.float32) for x in (q, k, v))
        while done < q.shape[2]:
            count = min(q.shape[2] - done, self.window - cache.offset % self.window)
            part = slice(done, done + count)
            outputs.append(self.block(q[:, :, part], k[:, :, part], v[:, :, part], cache))
            done += count
        return mx.concatenate(outputs, axis=2).astype(dtype)

    def block(self, q: mx.array, k: mx.array, v: mx.array, cache: WindowCache) -> mx.array:
        """The same of tokens that lie in one block."""
        if cache.offset % self.window == 0 and cache.offset >= 2 * self.window:
            self.fold(cache)
        ring_k, ring_v, memory, sink_k, sink_v = cache.arrays
        count, kept = q.shape[2], 0 if ring_k is None else ring_k.shape[2]
        k_all = k if ring_k is None else mx.concatenate([ring_k, k], axis=2)
        v_all = v if ring_v is None else mx.concatenate([ring_v, v], axis=2)
        gone = min(self.sinks, cache.offset - kept)  # first tokens that are in the window no more
        keys, values = k_all, v_all
        if gone > 0:
            keys = mx.concatenate([sink_k[:, :, :gone], k_all], axis=2)
            values = mx.concatenate([sink_v[:, :, :gone], v_all], axis=2)
        batch, _, _, dim = q.shape
        grouped = q.reshape(batch, -1, self.ratio, count, dim)
        s = (grouped @ keys[:, :, None].swapaxes(-1, -2)) * self.scale
        slot = mx.arange(keys.shape[2])
        seen = slot <= (keys.shape[2] - count + mx.arange(count))[:, None]
        s = mx.where(seen, s, -mx.inf)
        m = s.max(-1, keepdims=True)
        if self.shift == "shared":
            m = mx.maximum(m, 0)
        p = mx.exp(s - m)
        if self.linear:
            g = mx.sigmoid(self.window_factor_H.astype(mx.float32))
            p = p * g.reshape(-1, self.ratio, 1, 1)
        total = (p @ values[:, :, None]).reshape(batch, -1, count, dim)
        weight = p.sum(-1, keepdims=True).reshape(batch, -1, count, 1)
        if self.linear and memory is not None:
            phi = self.feature_q(q)
            if self.affine:
                phi = phi * (1 - g)[:, None, None]
            recalled = phi @ memory
            if self.shift == "shared":
                recalled = recalled * mx.exp(-m.reshape(batch, -1, count, 1))
            total, weight = total + recalled[..., :-1], weight + recalled[..., -1:]
        if self.sinks and (sink_k is None or sink_k.shape[2] < self.sinks):
            missing = self.sinks - (0 if sink_k is None else sink_k.shape[2])
            first = k[:, :, :missing], v[:, :, :missing]
            sink_k = first[0] if sink_k is None else mx.concatenate([sink_k, first[0]], axis=2)
            sink_v = first[1] if sink_v is None else mx.concatenate([sink_v, first[1]], axis=2)
        cache.arrays, cache.offset = [k_all, v_all, memory, sink_k, sink_v], cache.offset + count
        return total / weight

    def fold(self, cache: WindowCache) -> None:
        """Add the block before the last to the sum: it leaves the window of the tokens to come."""
        ring_k, ring_v, memory, sink_k, sink_v = cache.arrays
        first = cache.offset - ring_k.shape[2]
        start = min(max(self.sinks - first, 0), self.window)
        if self.linear:
            k, v = ring_k[:, :, start : self.window], ring_v[:, :, start : self.window]
            v = mx.concatenate([v, mx.ones((*v.shape[:-1], 1))], axis=-1)
            new = self.feature_k(k).swapaxes(-1, -2) @ mx.repeat(v, self.ratio, axis=1)
            memory = new if memory is None else memory + new
        cache.arrays = [ring_k[:, :, self.window :], ring_v[:, :, self.window :], memory, sink_k, sink_v]


class Attention(nn.Module):
    def __init__(self, args: ModelArgs, options: Optional[dict]):
        super().__init__()
        self.heads, self.groups, self.head_dim = args.num_attention_heads, args.num_key_value_heads, args.head_dim
        width, bias = args.hidden_size, args.attention_bias
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.groups * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.groups * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, width, bias=args.output_bias)
        if args.query_key_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=args.rms_norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=args.rms_norm_eps)
        self.normed = args.query_key_norm
        self.rope = initialize_rope(
            self.head_dim, args.rope_theta, False, args.rope_scaling, args.max_position_embeddings
        )
        self.linearized = options is not None
        if options is not None:
            self.mixer = WindowMixer(options, self.heads, self.groups, self.head_dim)

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        batch, tokens, _ = x.shape
        q = self.q_proj(x).reshape(batch, tokens, self.heads, -1)
        k = self.k_proj(x).reshape(batch, tokens, self.groups, -1)
        v = self.v_proj(x).reshape(batch, tokens, self.groups, -1).transpose(0, 2, 1, 3)
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (self.rope(y.transpose(0, 2, 1, 3), offset=cache.offset) for y in (q, k))
        if self.linearized:
            y = self.mixer(q, k, v, cache)
        else:
            k, v = cache.update_and_fetch(k, v)
            y = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.head_dim**-0.5, mask=mask)
        return self.o_proj(y.transpose(0, 2, 1, 3).reshape(batch, tokens, -1))


class MLP(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.gate_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, args: ModelArgs, options: Optional[dict]):
        super().__init__()
        self.self_attn, self.mlp = Attention(args, options), MLP(args)
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args, options) for options in args.linearize_layers]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, tokens: mx.array, cache: list, input_embeddings: Optional[mx.array]) -> mx.array:
        x = self.embed_tokens(tokens) if input_embeddings is None else input_embeddings
        kept = next((one for one in cache if isinstance(one, KVCache)), None)
        mask = None if kept is None else create_attention_mask(x, kept)
        for layer, one in zip(self.layers, cache):
            x = layer(x, mask, one)
        return self.norm(x)


class Model(nn.Module):
    """What mlx-lm loads."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args, self.model_type = args, args.model_type
        self.model = Backbone(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(
        self, inputs: mx.array, cache: Optional[list] = None, input_embeddings: Optional[mx.array] = None
    ) -> mx.array:
        out = self.model(inputs, cache or self.make_cache(), input_embeddings)
        return self.model.embed_tokens.as_linear(out) if self.args.tie_word_embeddings else self.lm_head(out)

    def make_cache(self) -> list:
        """A cache per layer: constant size, or keys and values of the whole text."""
        return [KVCache() if options is None else WindowCache() for options in self.args.linearize_layers]

    @property
    def layers(self) -> list:
        return self.model.layers

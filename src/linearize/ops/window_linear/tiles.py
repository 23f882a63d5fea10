"""A chunk group's keys and values as its queries see them: two chunks side by side, sinks in front.

Letters: B batch, G key/value heads, N chunks of the chunk group, M = N + 2 (with the two before it), C chunk, J sinks,
D head dimension, V value dimension, W = V + 1 (values and a one), P = some of the B G N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops.blocking import Scratch


def tiles(x_BGMCD: Tensor) -> Tensor:
    """Chunks n - 1 and n side by side, `[P, 2 C, D]`: a view where one head of one row is given, else a copy."""
    batch, groups, chunks, chunk, dim = x_BGMCD.shape
    strides = x_BGMCD.stride()
    assert strides[2] == chunk * strides[3]
    pairs = x_BGMCD[:, :, 1:].as_strided((batch, groups, chunks - 2, 2 * chunk, dim), strides)
    return pairs.flatten(0, 2)


def with_sinks(sink_BGNJD: Tensor | None, tile_PKD: Tensor) -> Tensor:
    """The sinks in front of the tiles, `[P, J + 2 C, D]`."""
    return tile_PKD if sink_BGNJD is None else torch.cat([sink_BGNJD.flatten(0, 2), tile_PKD], dim=1)


def value_rows(v_BGMCV: Tensor, memory: Scratch) -> Tensor:
    """[v, 1]: one product then gives numerator and normaliser together, `[b, g, M, C, W]`."""
    value = memory.rows("value", *v_BGMCV.shape[:-1], v_BGMCV.shape[-1] + 1, like=v_BGMCV)
    value[..., :-1] = v_BGMCV
    value[..., -1] = 1
    return value

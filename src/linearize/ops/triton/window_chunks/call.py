"""What the kernels of one call of window + linear attention share, and the sums before each run of chunks.

Letters: B batch, G key/value heads, R query heads for each, H = G R, T new tokens, S slots (ring, then new tokens), N
chunks, J sinks, D head dimension, V value dimension, F columns of the feature map, Q all features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from linearize.ops.triton.launch import rows_of
from linearize.ops.triton.window_chunks import carry
from linearize.ops.triton.window_chunks.sizes import Sizes, Tables, block
from linearize.ops.triton.window_chunks.tiles import GIVEN, HEDGEHOG, T2R
from linearize.ops.window_linear.spec import FeatureMap, WindowLinear, weights_of

MAPS = {"hedgehog": HEDGEHOG, "t2r": T2R}
JOIN_BLOCK = 1024
WIDEST_PART = 64  # columns of features: more of them do not fit into registers
ROWS_PER_WARP = 16  # of a chunk: more warps would compute the same rows
STAGES = 1  # of the loads ahead: more of them do not fit into the memory that an A100's program has


@dataclass(frozen=True, kw_only=True, eq=False)
class Mapped:
    """A feature map as the kernels take it: computed there from `weight: [H, D, F]` and `bias: [H, F]`, or given as
    `phi: [B, H, S, Q]`."""

    kind: int
    phi: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    @staticmethod
    def of(feature: FeatureMap | None, x: Tensor) -> Mapped:
        """The map of x, which is not computed here if the kernels can."""
        if feature is None:
            return Mapped(kind=GIVEN)
        known = weights_of(feature)
        if known is None or known.name not in MAPS:
            wide = torch.promote_types(x.dtype, torch.float32)
            return Mapped(kind=GIVEN, phi=rows_of(feature(x.to(wide))))
        return Mapped(kind=MAPS[known.name], weight=known.weight_HDC, bias=known.bias_HC)

    def like(self, x: Tensor) -> Mapped:
        """The weight in the dtype of x, or in fp32 where it has more digits than x: then it is taken in two parts."""
        if self.weight is None:
            return self
        kept = x.dtype if self.weight.dtype == x.dtype else torch.float32
        return replace(self, weight=self.weight.detach().to(kept).contiguous())

    @property
    def columns(self) -> int:
        """F; of given features all of them."""
        source = self.phi if self.weight is None else self.weight
        return 1 if source is None else source.shape[-1]

    @property
    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """phi, weight, bias."""
        return self.phi, self.weight, self.bias


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """What the kernels of one call share, apart from tensors with gradients."""

    spec: WindowLinear
    sizes: Sizes
    tables: Tables
    past: int
    kind: int
    columns: int
    heads: int

    @property
    def halves(self) -> int:
        """Parts of the features, each from the same columns."""
        return 2 if self.kind == HEDGEHOG else 1

    @property
    def block(self) -> int:
        """Columns of a part of the features: a half of Hedgehog's has all of them, for its softmax."""
        return block(self.columns if self.kind == HEDGEHOG else min(self.columns, WIDEST_PART))

    @property
    def parts(self) -> int:
        """Parts of the features: a program has one of them."""
        return 2 if self.kind == HEDGEHOG else self.tiles

    @property
    def tiles(self) -> int:
        """Tiles of the columns."""
        return -(-self.columns // self.block)

    @property
    def constants(self) -> dict[str, int]:
        """Constants that every kernel takes, and its warps."""
        warps = max(4, self.sizes.chunk // ROWS_PER_WARP)
        return {
            "num_warps": warps,
            "num_stages": STAGES,
            "H": self.heads,
            "C": self.sizes.chunk,
            "PER": self.sizes.per_run,
        }

    @property
    def features(self) -> dict[str, int]:
        """Constants of the kernels of the linear part."""
        return {"F": self.columns, "BLOCK_F": self.block, "MAP": self.kind, "HALVES": self.halves}

    @property
    def window(self) -> dict[str, int]:
        """Which keys the window has."""
        spec = self.spec
        terraced = spec.shape == "terraced" and spec.window > 0
        return {"W": spec.window, "TERRACED": terraced, "SINKS": spec.num_sinks}

    @property
    def scores(self) -> dict[str, int]:
        """Constants of the kernels of the window part."""
        return {**self.window, "CAP": self.spec.softcap is not None, "SHARED": self.spec.shared_shift}

    @property
    def far(self) -> bool:
        """Whether keys of the query's chunk, or of the one before, lie beyond its window."""
        return not (self.spec.shape == "terraced" and self.spec.window == self.sizes.chunk)

    @property
    def places(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tables, as the kernels take them."""
        return self.tables.slot, self.tables.first, self.tables.follows, self.tables.keep

    @property
    def begins(self) -> Tensor:
        """The table of documents that begin above position 0, or another that is not read."""
        return pointer(self.tables.begins, self.tables.first)

    def maps(
        self,
        phi_q: Tensor | None,
        weight_q: Tensor | None,
        bias_q: Tensor | None,
        phi_k: Tensor | None,
        weight_k: Tensor | None,
        bias_k: Tensor | None,
        *,
        like: Tensor,
    ) -> tuple[Mapped, Mapped]:
        """The maps of queries and keys, their weights in the dtype of `like`."""
        queries = Mapped(kind=self.kind, phi=phi_q, weight=weight_q, bias=bias_q)
        return queries.like(like), Mapped(kind=self.kind, phi=phi_k, weight=weight_k, bias=bias_k).like(like)

    def runs(self, chunks: int) -> int:
        """Programs of one head."""
        return -(-chunks // self.sizes.per_run)


def per_head(values_H: Tensor | None, default: float, like: Tensor) -> Tensor:
    """A number for each query head, fp32."""
    if values_H is None:
        return torch.full((like.shape[1],), default, device=like.device)
    return values_H.float().contiguous()


def pointer(x: Tensor | None, other: Tensor) -> Tensor:
    """A pointer that is not followed, where there is no x."""
    return other if x is None else x


def strides(x: Tensor) -> tuple[int, ...]:
    return x.stride()[:3]


def precision(x: Tensor) -> dict[str, str]:
    """How products of fp32 numbers are made: as they are, or with the 11 bits that fp16 has too."""
    return {"DOT": "ieee" if x.dtype == torch.float32 else "tf32"}


def dims(k: Tensor, v: Tensor) -> dict[str, int]:
    key, value = k.shape[-1], v.shape[-1]
    return {"D": key, "V": value, "BLOCK_D": block(key), "BLOCK_V": block(value)}


def run_sums(call: Call, k: Tensor, v: Tensor, keys: Mapped, sinks: int) -> tuple[Tensor, Tensor]:
    """What each run of chunks adds to the sum, `[B H, runs, Q, V + 1]`, and what stays of it, `[B H, runs]`."""
    batch, groups, heads, runs = k.shape[0], k.shape[1], call.heads, call.runs(call.tables.chunks)
    sums = k.new_empty(batch * heads, runs, call.halves * call.columns, v.shape[-1] + 1, dtype=torch.float32)
    carries = sums.new_empty(batch * heads, runs)
    phi = pointer(keys.phi, k)
    carry.runs_kernel[(batch * heads, runs, call.parts)](
        k, v, phi, pointer(keys.weight, k), pointer(keys.bias, k), *call.places, sums, carries,
        *(strides(x) for x in (k, v, phi)), *call.tables.strides, call.tables.chunks, runs,
        R=heads // groups, SINKS=sinks, **call.constants, **call.features, **dims(k, v), **precision(k),
    )  # fmt: skip
    return sums, carries


def join(sums: Tensor, carries: Tensor, start: Tensor | None, *, reverse: bool) -> None:
    """Runs' additions become the sums before them (after them in reverse), in place."""
    lines, runs = carries.shape
    size = sums[0, 0].numel()
    carry.join_kernel[(lines, -(-size // JOIN_BLOCK))](
        sums,
        carries,
        pointer(start, sums),
        size,
        runs,
        HAS_START=start is not None,
        REVERSED=reverse,
        BLOCK=JOIN_BLOCK,
        num_warps=4,
    )


def weights(maps: tuple[Mapped, Mapped], other: Tensor) -> tuple[Tensor, ...]:
    """Weight and bias of queries and of keys."""
    return tuple(pointer(x, other) for mapped in maps for x in (mapped.weight, mapped.bias))

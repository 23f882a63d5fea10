"""Whether a model gives the same logits however it reads a text: at once, cached, padded, packed, rolled back.

The yardstick is one full forward pass of each text alone, without a cache. Nothing here knows what a mixer does: it
asks any causal LM through transformers' own keywords.

Letters: T tokens, V vocabulary, B rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from linearize.modeling.cache_argument import with_cache
from linearize.training.data.pseudo_labels import left_padded

SLICE_TOKENS = 256  # tokens whose logits are compared in fp64 at once
BROKEN = 1e6  # in place of a difference that is not a number
TOLERANCE = {"float64": (1e-7, 1e-8, 1e-7), "float32": (1e-3, 1e-4, 1e-3), "float16": (0.15, 0.02, 0.01)}
COARSE = (0.6, 0.06, 0.03)  # bfloat16 and below
"""By dtype, the most that is rounding: largest and rms difference of logits in their spread, loss in nats per token."""
PADDED_STEPS = 5  # tokens decoded one by one after a padded prefill
DRAFTS = ((3, 2), (1, 4), (2, 0), (4, 3))  # right and wrong tokens of a draft, over and over
CHUNKS = (1, 5, 2, 37, 3, 70)  # tokens of a chunk of a prefill, over and over

Pair = tuple[Tensor, Tensor, Tensor]  # logits [N, V], those expected [N, V], the tokens they predict [N]


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """How far logits are from those expected, over `tokens` predictions.

    `largest`, `rms`: the largest and the root mean square difference, in units of the expected logits' standard
    deviation over the vocabulary; `flips`: predictions whose argmax is another; `loss`, `expected_loss`: nats a token.
    """

    tokens: int
    largest: float
    rms: float
    flips: int
    loss: float
    expected_loss: float

    def within(self, tolerance: tuple[float, float, float]) -> bool:
        """Whether largest and rms difference and the difference of the losses are at most so large."""
        deviations = (self.largest, self.rms, abs(self.loss - self.expected_loss))
        return all(x <= most for x, most in zip(deviations, tolerance, strict=True))


@dataclass(frozen=True, eq=False)
class CacheProbe:
    """A model and texts of unequal lengths, the longest first; `prefill`: tokens of it before decoding begins."""

    model: PreTrainedModel
    rows: Sequence[Tensor]
    prefill: int
    pad: int = 0
    seed: int = 0

    @cached_property
    def full(self) -> list[Tensor]:
        """The logits of each text alone in one pass, `[T, V]`."""
        return [self.run(row[None], use_cache=False).logits[0] for row in self.rows]

    def run(self, ids_BT: Tensor, **arguments: Any) -> Any:
        """One call of the model."""
        model: Any = self.model
        moved = {name: x.to(self.model.device) if isinstance(x, Tensor) else x for name, x in arguments.items()}
        return model(input_ids=ids_BT.to(self.model.device), **moved)

    def feed(self, ids_BT: Tensor, cache: Cache, sizes: Sequence[int], **arguments: Any) -> Tensor:
        """Logits `[B, T, V]` when the tokens go chunk by chunk into a cache."""
        parts = []
        for start, stop in pairwise(accumulate(sizes, initial=0)):
            parts.append(
                self.run(ids_BT[:, start:stop], **with_cache(self.model, cache), use_cache=True, **arguments).logits
            )
        return torch.cat(parts, dim=1)

    def new_cache(self) -> Cache:
        """What `generate` makes by default."""
        return DynamicCache(config=self.model.config)

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return all texts as one batch, padded on the left: ids, mask, positions, `[B, T]` each."""
        ids, mask = left_padded([row.tolist() for row in self.rows], self.pad, torch.device("cpu"))
        return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)

    def pair(self, logits_TV: Tensor, i: int, start: int = 0) -> Pair:
        """Return logits for text `i` from token `start` on, those expected there, and the next tokens."""
        stop = start + len(logits_TV)
        targets = self.rows[i][start + 1 : stop + 1].to(logits_TV.device)
        return logits_TV[: len(targets)], self.full[i][start : start + len(targets)], targets


def _decode(probe: CacheProbe) -> Iterator[Pair]:
    """A prefill, then one token at a time."""
    yield _one_by_one(probe, probe.new_cache())


def _one_by_one(probe: CacheProbe, cache: Cache) -> Pair:
    row = probe.rows[0]
    sizes = [probe.prefill, *[1] * (len(row) - probe.prefill)]
    return probe.pair(probe.feed(row[None], cache, sizes)[0, probe.prefill :], 0, probe.prefill)


def _chunks(probe: CacheProbe) -> Iterator[Pair]:
    """A prefill in uneven chunks."""
    for i, row in enumerate(probe.rows):
        yield probe.pair(probe.feed(row[None], probe.new_cache(), _chunk_sizes(len(row)))[0], i)


def _padding(probe: CacheProbe) -> Iterator[Pair]:
    """A left-padded batch, its last tokens decoded one by one."""
    ids, mask, positions = probe.padded()
    cache, longest, steps = probe.new_cache(), ids.shape[1], PADDED_STEPS
    parts = []
    for start, stop in pairwise([0, *range(longest - steps, longest + 1)]):
        arguments = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        parts.append(
            probe.run(ids[:, start:stop], **with_cache(probe.model, cache), use_cache=True, **arguments).logits
        )
    logits_BTV = torch.cat(parts, dim=1)
    for i, row in enumerate(probe.rows):
        yield probe.pair(logits_BTV[i, longest - len(row) :], i)


def _order(probe: CacheProbe) -> Iterator[Pair]:
    """The same left-padded batch with its rows in another order."""
    ids, mask, positions = probe.padded()
    order = torch.arange(len(ids)).roll(1)
    arguments = {"attention_mask": mask[order], "position_ids": positions[order]}
    logits_BTV = probe.run(ids[order], use_cache=False, **arguments).logits
    for place, i in enumerate(order.tolist()):
        yield probe.pair(logits_BTV[place, ids.shape[1] - len(probe.rows[i]) :], i)


def _packing(probe: CacheProbe) -> Iterator[Pair]:
    """All texts in one row, positions restarting."""
    positions = torch.cat([torch.arange(len(row)) for row in probe.rows])[None]
    logits_TV = probe.run(torch.cat(list(probe.rows))[None], position_ids=positions, use_cache=False).logits[0]
    for i, part in enumerate(logits_TV.split([len(row) for row in probe.rows])):
        yield probe.pair(part, i)


def _rollback(probe: CacheProbe) -> Iterator[Pair]:
    """Drafts of right and wrong tokens after a prefill; the wrong ones are dropped from the cache again."""
    row, cache, at = probe.rows[0], probe.new_cache(), probe.prefill
    drawn, parts, drafts = random.Random(probe.seed), [], 0
    probe.feed(row[None, :at], cache, [at])
    cache.activate_past_recording()
    while at < len(row):
        right, wrong = DRAFTS[drafts % len(DRAFTS)]
        right, drafts = min(right, len(row) - at), drafts + 1
        draft = torch.cat([row[at : at + right], _wrong(row, at + right, wrong, probe, drawn)])
        parts.append(probe.feed(draft[None], cache, [len(draft)])[0, :right])
        cache.crop(-wrong)
        at += right
    yield probe.pair(torch.cat(parts), 0, probe.prefill)


def _wrong(row: Tensor, at: int, count: int, probe: CacheProbe, drawn: random.Random) -> Tensor:
    """Return tokens other than those at this place of the text."""
    vocabulary: int = probe.model.config.get_text_config().vocab_size
    following = [int(row[i]) if i < len(row) else 0 for i in range(at, at + count)]
    return torch.tensor([(token + drawn.randrange(1, vocabulary)) % vocabulary for token in following], dtype=row.dtype)


def _static(probe: CacheProbe) -> Iterator[Pair]:
    """As `_decode`, through transformers' cache of fixed size."""
    yield _one_by_one(probe, StaticCache(config=probe.model.config, max_cache_len=len(probe.rows[0]) + 3))


def _chunk_sizes(tokens: int) -> list[int]:
    """Return sizes from CHUNKS that add up to so many tokens."""
    sizes: list[int] = []
    while (left := tokens - sum(sizes)) > 0:
        sizes.append(min(CHUNKS[len(sizes) % len(CHUNKS)], left))
    return sizes


def tolerance(dtype: str) -> tuple[float, float, float]:
    """For `Deviation.within`, by the name of a model's dtype."""
    return TOLERANCE.get(dtype, COARSE)


CHECKS: dict[str, Callable[[CacheProbe], Iterator[Pair]]] = {
    "decode": _decode,
    "chunks": _chunks,
    "padding": _padding,
    "order": _order,
    "packing": _packing,
    "rollback": _rollback,
    "static": _static,
}


@torch.inference_mode()
def check(name: str, probe: CacheProbe) -> Deviation:
    """Run one of CHECKS on a model in eval mode."""
    total = _Total()
    for logits_NV, expected_NV, targets_N in CHECKS[name](probe):
        for start in range(0, len(targets_N), SLICE_TOKENS):
            part = slice(start, start + SLICE_TOKENS)
            total.add(logits_NV[part].double(), expected_NV[part].double(), targets_N[part])
    return total.deviation()


class _Total:
    """Sums over slices of tokens."""

    def __init__(self) -> None:
        self.tokens = self.flips = self.logits = 0
        self.largest = self.square = self.variance = self.loss = self.expected = 0.0

    def add(self, logits_NV: Tensor, expected_NV: Tensor, targets_N: Tensor) -> None:
        difference = (logits_NV - expected_NV).nan_to_num(BROKEN, BROKEN, -BROKEN)
        self.tokens += len(targets_N)
        self.logits += difference.numel()
        self.flips += int((logits_NV.argmax(-1) != expected_NV.argmax(-1)).sum())
        self.largest = max(self.largest, float(difference.abs().max()))
        self.square += float(difference.square().sum())
        self.variance += float(expected_NV.var(-1, correction=0).sum()) * expected_NV.shape[-1]
        loss = torch.nn.functional.cross_entropy
        self.loss += float(loss(logits_NV, targets_N, reduction="sum").nan_to_num(BROKEN, BROKEN))
        self.expected += float(loss(expected_NV, targets_N, reduction="sum"))

    def deviation(self) -> Deviation:
        """Spread and means over all that was added."""
        spread = (self.variance / self.logits) ** 0.5
        return Deviation(
            tokens=self.tokens,
            largest=self.largest / spread,
            rms=(self.square / self.logits) ** 0.5 / spread,
            flips=self.flips,
            loss=self.loss / self.tokens,
            expected_loss=self.expected / self.tokens,
        )

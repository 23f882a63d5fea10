"""The loop of speculative decoding: draft, verify in one pass of the target, keep what agrees, repeat.

Letters: B batch, T tokens, K draft tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from linearize.decoding.speculative.cached_model import CachedModel
from linearize.decoding.speculative.draft_length import (
    AcceptanceStats,
    DraftLength,
    DraftTokens,
    Round,
    acceptance_stats,
    check_draft_tokens,
    draft_length_for,
)
from linearize.decoding.speculative.drafters import Drafter, ModelDrafter, check_vocabularies
from linearize.decoding.speculative.graphed_model import cached_model_for
from linearize.decoding.speculative.logits_processing import LogitsProcessing, logits_processing
from linearize.decoding.speculative.stats import SpeculationResult, SpeculationStats
from linearize.decoding.speculative.verify import GrowingTexts, verify_greedy, verify_sampled
from linearize.decoding.speculative.weight_layout import Pack, WeightLayout, check_pack
from linearize.errors import InputError


def speculate(
    target: PreTrainedModel,
    draft: PreTrainedModel | Drafter,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    draft_tokens: DraftTokens = "auto",
    generation_config: GenerationConfig | None = None,
    stop_tokens: Sequence[int] | None = None,
    seed: int = 0,
    streamer: BaseStreamer | None = None,
    pack: Pack = "auto",
    stats: AcceptanceStats | None = None,
) -> SpeculationResult:
    """Continue prompts with a target and a draft that proposes its tokens; the text is the target's own.

    `input_ids: [B, T]`, `attention_mask: [B, T]` (padding on the left). `draft`: a smaller model of the same vocabulary
    or `LookupDrafter()`. `draft_tokens`: per round; `auto`: by costs and acceptance, 0 where speculation loses.
    `generation_config` (None: the target's) says how tokens are chosen: greedy text is that of plain greedy decoding,
    sampling follows the target's distribution (2211.17192), with a generator of its own seeded with `seed`.
    `stop_tokens` None: the config's EOS tokens. `pack`: hold fp32 weights on a CPU in the layout that reads a few
    tokens fastest (`packed_projections`); `auto`: once speculation is known to pay, where many tokens may follow.
    `stats`: what `auto` reads and adds to (None: what was measured of this target and draft so far).

    Raises:
        InputError: before anything is read: sizes, vocabularies, settings such as beams, or a cache that cannot roll
            back.
    """
    check_draft_tokens(draft_tokens)
    check_pack(pack)
    prompts = check_input(input_ids, attention_mask, max_new_tokens, streamer)
    processing = logits_processing(
        target,
        prompts,
        generation_config=generation_config,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        seed=seed,
    )
    if isinstance(draft, PreTrainedModel):
        check_vocabularies(target, draft)
        draft = ModelDrafter(draft)
    elif not hasattr(draft, "models"):
        raise InputError(f"the draft is a {type(draft).__name__}: give a loaded model, or LookupDrafter()")
    if stats is None:
        stats = acceptance_stats(target, draft.source)
    length = draft_length_for(draft_tokens, stats, len(prompts))
    layout = WeightLayout([target, *draft.models], pack)
    texts = GrowingTexts(prompts, max_new_tokens, processing.stop_tokens)
    run = _Run(cached_model_for(target, "target"), draft, processing, texts, length, layout, streamer)
    with torch.inference_mode(), layout:
        return run.finish(input_ids, attention_mask)


class _Run:
    """One call of `speculate`."""

    def __init__(
        self,
        target: CachedModel,
        drafter: Drafter,
        processing: LogitsProcessing,
        batch: GrowingTexts,
        draft_length: DraftLength,
        layout: WeightLayout,
        streamer: BaseStreamer | None,
    ) -> None:
        self.target, self.drafter, self.processing, self.batch = target, drafter, processing, batch
        self.draft_length, self.layout, self.streamer = draft_length, layout, streamer
        self.stats = SpeculationStats()

    @property
    def by_row(self) -> bool:
        """Whether rows may keep different numbers of draft tokens."""
        return self.target.by_row and self.drafter.by_row

    def finish(self, input_ids: Tensor, mask: Tensor | None) -> SpeculationResult:
        """Read the prompts, then repeat rounds until every row has ended."""
        begin = perf_counter()
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        logits_B1V = self.target.read_prompt(input_ids, mask)
        self.drafter.start(input_ids, mask, self.processing)
        nothing_B0 = input_ids[:, :0]
        self._take(0, *self._decide(logits_B1V, nothing_B0, None, [[]] * len(self.batch.texts)), nothing_B0.tolist())
        self._wait()
        self.stats.prompt_seconds = perf_counter() - begin
        while self.batch.texts:
            self._round()
        self._wait()
        stats = self.stats
        stats.seconds = perf_counter() - begin
        stats.target_passes, stats.draft_passes = self.target.passes, self.drafter.passes
        stats.tokens = sum(len(row) for row in self.batch.new)
        if self.streamer is not None:
            self.streamer.end()
        return SpeculationResult(self.batch.new, stats)

    def _round(self) -> None:
        self.layout.consider(pays=self.draft_length.pays, tokens_left=self.batch.tokens_left)
        count = min(self.draft_length.next(), self.batch.tokens_left - 1)
        proposal = None
        if count > 0:
            self.drafter.prepare(self.batch.texts)
            self._wait()
        begin = perf_counter()
        if count > 0:
            proposal = self.drafter.propose(self.batch.texts, count)
            self._wait()
        between = perf_counter()
        kept = self._verify(proposal)
        end = perf_counter()
        drafted = 0 if proposal is None else count
        self.stats.draft_tokens[drafted] = self.stats.draft_tokens.get(drafted, 0) + 1
        self.draft_length.observe(Round(drafted, kept, end - between, between - begin if drafted else 0.0))

    def _verify(self, proposal: tuple[Tensor, Tensor | None] | None) -> list[int]:
        """Run the target over the last tokens and the draft; return how many draft tokens each row kept."""
        last_B1 = torch.tensor([[text[-1]] for text in self.batch.texts], device=self.target.model.device)
        draft_BK, q_BKV = (last_B1[:, :0], None) if proposal is None else proposal
        drafts: list[list[int]] = draft_BK.tolist()
        logits_BTV = self.target.read(torch.cat([last_B1, draft_BK], dim=1), settled=proposal is None)
        kept, following = self._decide(logits_BTV, draft_BK, q_BKV, drafts)
        return self._take(draft_BK.shape[1], kept, following, drafts)

    def _decide(
        self, logits_BTV: Tensor, draft_BK: Tensor, q_BKV: Tensor | None, drafts: list[list[int]]
    ) -> tuple[list[int], list[int]]:
        scores_BTV = self.processing.scores(logits_BTV, self.batch.texts, drafts)
        if not self.processing.sample:
            return verify_greedy(scores_BTV, draft_BK)
        assert self.processing.generator is not None
        return verify_sampled(scores_BTV.softmax(-1), draft_BK, q_BKV, self.processing.generator)

    def _take(self, drafted: int, kept: list[int], following: list[int], drafts: list[list[int]]) -> list[int]:
        """Append what is kept to the texts, roll the caches back, and go on with the rows that have not ended."""
        first = self.target.passes == 1
        new, kept = self.batch.extend(kept, following, drafts, alike=not self.by_row)
        for count in kept:
            self.stats.count(drafted, count)
        if self.streamer is not None:
            self.streamer.put(torch.tensor(new))
        going = self.batch.drop_ended()
        if going:
            self._roll_back(going, [kept[row] for row in going], drafted, first=first)
        return kept

    def _roll_back(self, going: list[int], kept: list[int], drafted: int, *, first: bool) -> None:
        if len(going) < len(self.processing.processors):
            self.processing.select(going)
            self.target.select(going)
            self.drafter.select(going)
        if not first:
            self.target.keep([count + 1 for count in kept])
        if drafted:
            self.drafter.accept(kept)

    def _wait(self) -> None:
        """Wait for the device, so that times mean something."""
        if self.target.model.device.type == "cuda":
            torch.cuda.synchronize(self.target.model.device)


def check_input(
    input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int, streamer: BaseStreamer | None
) -> list[list[int]]:
    """Return the prompts without padding. Raises InputError for shapes and sizes that cannot be used."""
    if not isinstance(input_ids, Tensor):
        raise InputError(f"input_ids is a {type(input_ids).__name__}: give a tensor [batch, tokens]")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise InputError(f"input_ids has shape {list(input_ids.shape)}: give [batch, tokens], at least one of each")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    if streamer is not None and input_ids.shape[0] > 1:
        raise InputError(f"a streamer shows one text and {input_ids.shape[0]} were given: leave it out")
    ids = input_ids.tolist()
    if attention_mask is None:
        return list(ids)
    if attention_mask.shape != input_ids.shape:
        shapes = f"{list(attention_mask.shape)} and input_ids {list(input_ids.shape)}"
        raise InputError(f"attention_mask has shape {shapes}: they must be alike")
    mask = attention_mask.bool()
    if not bool(mask[:, -1].all()) or bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise InputError("attention_mask has padding after a token, or a row of padding: pad prompts on the left")
    widths = mask.sum(1).tolist()
    return [row[len(row) - width :] for row, width in zip(ids, widths, strict=True)]

"""The loop: guess, check in one pass of the target, keep what agrees, go on.

Letters: B batch, T tokens, K guessed tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from linearize.decoding.speculative.acceptance_stats import Experience, remembered
from linearize.decoding.speculative.adaptive_draft_length import pace_of
from linearize.decoding.speculative.cached_model import Reader
from linearize.decoding.speculative.checks import check_input, check_vocabularies
from linearize.decoding.speculative.draft_length import Chooser, Round, check_draft_tokens
from linearize.decoding.speculative.drafters import Drafter, ModelDrafter
from linearize.decoding.speculative.graphed_model import reader_for
from linearize.decoding.speculative.logits_processing import ScoreRules, score_rules
from linearize.decoding.speculative.rows import Rows
from linearize.decoding.speculative.stats import SpeculationResult, SpeculationStats
from linearize.decoding.speculative.verify import verify_greedy, verify_sampled
from linearize.decoding.speculative.weight_layout import Pack, Products, check_pack


def speculate(
    target: PreTrainedModel,
    draft: PreTrainedModel | Drafter,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    draft_tokens: int | Literal["auto"] = "auto",
    generation_config: GenerationConfig | None = None,
    stop_tokens: Sequence[int] | None = None,
    seed: int = 0,
    streamer: BaseStreamer | None = None,
    pack: Pack = "auto",
    experience: Experience | None = None,
) -> SpeculationResult:
    """Continue prompts with a target and a draft that guesses for it; the text is the target's own.

    `input_ids: [B, T]`, `attention_mask: [B, T]` (padding on the left). `draft`: a smaller model of the same vocabulary
    or `LookupDrafter()`. `draft_tokens`: guesses per round; `auto`: by costs and acceptance, none where guessing loses.
    `generation_config` (None: the target's) says how tokens are chosen: greedy gives what plain greedy decoding does,
    sampling follows the target's distribution (2211.17192), with a generator of its own seeded with `seed`.
    `stop_tokens` None: the config's EOS tokens. `pack`: fp32 weights on a CPU in the form that reads a few tokens
    quickest (`packed_projections`); `auto`: once guessing is known to pay, where many tokens may follow. `experience`:
    what `auto` learns from and adds to (None: what it learned about this target and draft so far).

    Raises:
        InputError: before anything is read: sizes, vocabularies, settings such as beams, or a cache that cannot roll
            back.
    """
    check_draft_tokens(draft_tokens)
    check_pack(pack)
    prompts = check_input(input_ids, attention_mask, max_new_tokens, streamer)
    rules = score_rules(
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
    if experience is None:
        experience = remembered(target, draft.source)
    pace = pace_of(draft_tokens, experience, len(prompts))
    products = Products([target, *draft.models], pack)
    rows = Rows(prompts, max_new_tokens, rules.stop_tokens)
    run = _Run(reader_for(target, "target"), draft, rules, rows, pace, products, streamer)
    with torch.inference_mode(), products:
        return run.finish(input_ids, attention_mask)


class _Run:
    """One call of `speculate`."""

    def __init__(
        self,
        target: Reader,
        drafter: Drafter,
        rules: ScoreRules,
        rows: Rows,
        pace: Chooser,
        products: Products,
        streamer: BaseStreamer | None,
    ) -> None:
        self.target, self.drafter, self.rules, self.rows = target, drafter, rules, rows
        self.pace, self.streamer, self.stats = pace, streamer, SpeculationStats()
        self.products = products

    @property
    def by_row(self) -> bool:
        """Whether rows may keep different numbers of guesses."""
        return self.target.by_row and self.drafter.by_row

    def finish(self, input_ids: Tensor, mask: Tensor | None) -> SpeculationResult:
        """Read the prompts, then go round until every row has ended."""
        begin = perf_counter()
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        logits_B1V = self.target.read_prompt(input_ids, mask)
        self.drafter.start(input_ids, mask, self.rules)
        nothing_B0 = input_ids[:, :0]
        self._take(0, *self._verdict(logits_B1V, nothing_B0, None, [[]] * len(self.rows.texts)), nothing_B0.tolist())
        self._wait()
        self.stats.prompt_seconds = perf_counter() - begin
        while self.rows.texts:
            self._round()
        self._wait()
        stats = self.stats
        stats.seconds = perf_counter() - begin
        stats.target_passes, stats.draft_passes = self.target.passes, self.drafter.passes
        stats.tokens = sum(len(row) for row in self.rows.new)
        if self.streamer is not None:
            self.streamer.end()
        return SpeculationResult(self.rows.new, stats)

    def _round(self) -> None:
        self.products.consider(pays=self.pace.pays, room=self.rows.room)
        count = min(self.pace.next(), self.rows.room - 1)
        proposal = None
        if count > 0:
            self.drafter.prepare(self.rows.texts)
            self._wait()
        begin = perf_counter()
        if count > 0:
            proposal = self.drafter.propose(self.rows.texts, count)
            self._wait()
        between = perf_counter()
        kept = self._check(proposal)
        end = perf_counter()
        drafted = 0 if proposal is None else count
        self.stats.draft_tokens[drafted] = self.stats.draft_tokens.get(drafted, 0) + 1
        self.pace.observe(Round(drafted, kept, end - between, between - begin if drafted else 0.0))

    def _check(self, proposal: tuple[Tensor, Tensor | None] | None) -> list[int]:
        """One pass of the target over the last tokens and the guesses; how many guesses each row kept."""
        last_B1 = torch.tensor([[text[-1]] for text in self.rows.texts], device=self.target.model.device)
        draft_BK, q_BKV = (last_B1[:, :0], None) if proposal is None else proposal
        guesses: list[list[int]] = draft_BK.tolist()
        logits_BTV = self.target.read(torch.cat([last_B1, draft_BK], dim=1), settled=proposal is None)
        kept, following = self._verdict(logits_BTV, draft_BK, q_BKV, guesses)
        return self._take(draft_BK.shape[1], kept, following, guesses)

    def _verdict(
        self, logits_BTV: Tensor, draft_BK: Tensor, q_BKV: Tensor | None, guesses: list[list[int]]
    ) -> tuple[list[int], list[int]]:
        scores_BTV = self.rules.scores(logits_BTV, self.rows.texts, guesses)
        if not self.rules.sample:
            return verify_greedy(scores_BTV, draft_BK)
        assert self.rules.generator is not None
        return verify_sampled(scores_BTV.softmax(-1), draft_BK, q_BKV, self.rules.generator)

    def _take(self, drafted: int, kept: list[int], following: list[int], guesses: list[list[int]]) -> list[int]:
        """Append what stays to the texts, tell the caches, and go on with the rows that have not ended."""
        first = self.target.passes == 1
        new, kept = self.rows.extend(kept, following, guesses, alike=not self.by_row)
        for count in kept:
            self.stats.count(drafted, count)
        if self.streamer is not None:
            self.streamer.put(torch.tensor(new))
        going = self.rows.drop_ended()
        if going:
            self._roll_back(going, [kept[row] for row in going], drafted, first=first)
        return kept

    def _roll_back(self, going: list[int], kept: list[int], drafted: int, *, first: bool) -> None:
        if len(going) < len(self.rules.processors):
            self.rules.select(going)
            self.target.select(going)
            self.drafter.select(going)
        if not first:
            self.target.keep([count + 1 for count in kept])
        if drafted:
            self.drafter.accept(kept)

    def _wait(self) -> None:
        """Until the device has done what it was told, so that times mean something."""
        if self.target.model.device.type == "cuda":
            torch.cuda.synchronize(self.target.model.device)

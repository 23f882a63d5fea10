"""Conversations that a model holds with itself as the assistant: turns of the user given, answers written.

Every draw comes from a seed of its own question and turn, so that neither an interruption nor the order of the
questions changes an answer. (Rows that are written together are padded; a batch of another size can change the last bit
of a logit, and so a token, where two are as likely.)

Letters: B rows, T tokens of the prompt, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from linearize.decoding.loading import pad_token
from linearize.training.data.chat import render, with_template
from linearize.training.data.pseudo_labels import left_padded
from linearize.training.data.sampling import end_tokens, generation_config

PLAIN_STOP = "\nUser:"  # where a model without a template of its own goes on to write the user's part


@dataclass(frozen=True, kw_only=True)
class Ask:
    """The user's turns of one question. `temperature` 0 is greedy; `seed` is text that names the draw."""

    turns: tuple[str, ...]
    temperature: float
    seed: str


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One answer. `tokens` written, the end token included; `ended`: with an end token, not at the limit; `cut`: tokens
    of the prompt that did not fit into the context and were left out, the first ones."""

    text: str
    tokens: int
    ended: bool
    cut: int


def own_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer brings a chat template; else the plain one (`User: ... Assistant:`) is used."""
    return bool(tokenizer.chat_template)


def hold(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asks: Sequence[Ask], max_new_tokens: int
) -> list[list[Turn]]:
    """The answers to all turns of each question, the questions side by side, turn by turn."""
    held: list[list[Turn]] = [[] for _ in asks]
    for turn in range(max(len(ask.turns) for ask in asks)):
        rows = [row for row, ask in enumerate(asks) if turn < len(ask.turns)]
        prompts = [prompt_tokens(tokenizer, asks[row].turns, [t.text for t in held[row]]) for row in rows]
        draws = [(asks[row].temperature, f"{asks[row].seed}/{turn}") for row in rows]
        for row, answer in zip(rows, answer_batch(model, tokenizer, prompts, draws, max_new_tokens), strict=True):
            held[row].append(answer)
    return held


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, turns: Sequence[str], answers: Sequence[str]) -> list[int]:
    """The conversation up to the turn after the last answer. BOS is where an own template puts it, else first."""
    messages = [{"role": "user", "content": turns[0]}]
    for answer, turn in zip(answers, turns[1:], strict=False):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
    text = render(
        with_template(tokenizer, None if own_template(tokenizer) else "plain"), messages, add_generation_prompt=True
    )
    tokens = [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    bos = tokenizer.bos_token_id
    return [bos, *tokens] if isinstance(bos, int) and not own_template(tokenizer) else tokens


@torch.inference_mode()
def answer_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    draws: Sequence[tuple[float, str]],
    max_new_tokens: int,
) -> list[Turn]:
    """Answers to prompts of several lengths; `draws`: temperature and seed of each.

    With a short context at most half of it is for the answer, and a prompt that does not fit loses its first tokens.
    """
    room, limit = _room(model, max_new_tokens)
    shown = [list(prompt)[-room:] if room else list(prompt) for prompt in prompts]
    ends = end_tokens(model, tokenizer)
    config = generation_config(model, 0.0, limit, ends, pad_token(tokenizer))
    inputs_BT, mask_BT = left_padded(shown, pad_token(tokenizer), model.device)
    training = model.training
    model.eval()
    try:
        generate: Any = model.generate
        written_BT = generate(
            inputs_BT,
            attention_mask=mask_BT,
            generation_config=config,
            logits_processor=LogitsProcessorList([Draws(draws)]),
        )
    finally:
        model.train(training)
    rows = written_BT[:, inputs_BT.shape[1] :].tolist()
    cuts = [len(prompt) - len(kept) for prompt, kept in zip(prompts, shown, strict=True)]
    return [_turn(tokenizer, row, ends, cut) for row, cut in zip(rows, cuts, strict=True)]


def _room(model: PreTrainedModel, max_new_tokens: int) -> tuple[int, int]:
    """Tokens for the prompt (0: no limit) and for the answer."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return 0, max_new_tokens
    limit = max(1, min(max_new_tokens, context // 2))
    return max(1, context - limit), limit


def _turn(tokenizer: PreTrainedTokenizerBase, row: Sequence[int], ends: set[int], cut: int) -> Turn:
    """An answer out of a row that may be padded after its end token."""
    length = next((i for i, token in enumerate(row) if token in ends), None)
    text = str(tokenizer.decode(list(row[:length]), skip_special_tokens=True))
    if not own_template(tokenizer) and PLAIN_STOP in text:
        text, length = text[: text.index(PLAIN_STOP)], len(row) if length is None else length
    tokens = len(row) if length is None else min(length + 1, len(row))
    return Turn(text=text.strip(), tokens=tokens, ended=length is not None, cut=cut)


class Draws(LogitsProcessor):
    """Turns greedy decoding into sampling with a generator for each row: all but the token drawn become -inf.

    One uniform number a row and step is looked up in the cumulated probabilities (on the CPU, in double precision).
    """

    def __init__(self, draws: Sequence[tuple[float, str]]) -> None:
        self._temperatures = [temperature for temperature, _ in draws]
        self._generators = [torch.Generator().manual_seed(_seed(name)) for _, name in draws]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `[B, V]` in, scores `[B, V]` out; rows at temperature 0 stay as they are."""
        scores_BV = scores.clone()
        for row, (temperature, generator) in enumerate(zip(self._temperatures, self._generators, strict=True)):
            if temperature <= 0:
                continue
            cumulated_V = (scores[row].double().cpu() / temperature).softmax(-1).cumsum(-1)
            u = torch.rand((), generator=generator, dtype=torch.float64) * cumulated_V[-1]
            token = min(int(torch.searchsorted(cumulated_V, u, right=True)), cumulated_V.numel() - 1)
            scores_BV[row] = -torch.inf
            scores_BV[row, token] = 0.0
        return scores_BV


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1

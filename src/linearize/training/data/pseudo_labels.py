"""The data SPEC `pseudo:PATH`: the teacher answers the prompts in a file (sequence-level distillation, 1606.07947).

Answers are kept in a cache folder, batch by batch, so that a killed run continues and a second run reads
them. The folder's name is a hash of all that they depend on: the teacher's weights, the prompts, the settings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.errors import InputError
from linearize.modeling.io.integrity import model_fingerprint
from linearize.storage.journal import Journal, default_cache, open_journal
from linearize.training.data.chat import Chat, note_unread
from linearize.training.data.documents import Document, end_token
from linearize.training.data.loading import DataConfig
from linearize.training.data.row_fields import (
    CHAT_FIELDS,
    Note,
    NullError,
    as_messages,
    holds,
    ignore,
    message_list,
    with_system,
)
from linearize.training.data.row_formats import alpaca_prompt
from linearize.training.data.sampling import Progress, cuda_devices, end_tokens, generation_config, write
from linearize.training.data.sources import read_as
from linearize.training.step import derived_seed

KIND = "pseudo_labels"
FILE = "answers.jsonl"
FORMATS = "prompt; messages; conversations; instruction (and input)"


@dataclass(frozen=True, kw_only=True)
class PseudoConfig:
    """How the teacher answers. `batch` prompts at a time; `temperature` 0 is greedy."""

    temperature: float = 1.0
    max_new_tokens: int = 512
    seed: int = 0
    batch: int = 16


def pseudo_labeller(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Callable[[str], list[Document]]:
    """The `answer` argument of `load_documents`: the teacher and the `pseudo_*` settings, bound.

    Args:
        cache: folder of all cached answers; None: see `journal.default_cache`.
        progress: called with prompts answered so far, and their number.
    """
    settings = PseudoConfig(
        temperature=config.pseudo_temperature,
        max_new_tokens=config.pseudo_max_new_tokens,
        seed=config.pseudo_seed,
        batch=config.pseudo_batch,
    )
    return lambda spec: pseudo_documents(
        model, tokenizer, spec, settings, answer_only=config.answer_only, cache=cache, progress=progress
    )


def pseudo_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: str,
    config: PseudoConfig,
    *,
    answer_only: bool = False,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> list[Document]:
    """One document per prompt: BOS, the prompt, the teacher's answer with the token that ended it.

    Prompts go through the teacher's chat template if it has one, else they are taken as they are. Greedy answers do not
    depend on `batch`, but for rounding where two tokens are as likely. With `answer_only` the loss counts on answers
    alone. The caller's random state and the model's mode are left as they were.

    Raises:
        InputError: prompts that cannot be read or fill the teacher's context (names the row), or none at all.
    """
    prompts = read_prompts(spec, model, tokenizer)
    folder = (default_cache(KIND) if cache is None else cache) / _key(model, tokenizer, prompts, config)
    with open_journal(folder / FILE) as journal:
        answers = _answers(model, tokenizer, prompts, config, journal, progress)
    return [
        Document(prompt + answer, [0 if answer_only else 1] * len(prompt) + [1] * len(answer))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def read_prompts(spec: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The prompts of a data SPEC as tokens, BOS in front where the tokenizer has one."""
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)

    def parse(row: object, note: Note) -> list[int]:
        text = prompt_of(row, tokenizer, note)
        tokens = [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
        bos = tokenizer.bos_token_id
        if isinstance(bos, int) and tokens[:1] != [bos]:
            tokens = [bos, *tokens]
        if not tokens or not text.strip():
            raise InputError("its prompt is empty")
        if context is not None and len(tokens) >= context:
            raise InputError(f"its prompt has {len(tokens)} tokens, the teacher's context {context}; shorten it")
        return tokens

    prompts = read_as(spec, parse)
    if not prompts:
        raise InputError(f"data 'pseudo:{spec}': is empty, it holds no prompts; give rows with one of: {FORMATS}")
    return prompts


def prompt_of(row: object, tokenizer: PreTrainedTokenizerBase, note: Note = ignore) -> str:
    """The text that the teacher is to continue. Raises InputError for a row without a prompt."""
    if not isinstance(row, Mapping):
        raise InputError(f"is a {type(row).__name__}, a row must be an object with one of: {FORMATS}")
    named = [name for name in (*CHAT_FIELDS, "prompt", "instruction") if name in row]
    field = next((name for name in named if holds(row, name)), None)
    if field is None and named:
        raise NullError(named[0])
    if field is None:
        raise InputError(f"has the fields {', '.join(map(str, row)) or 'none'}; give one of: {FORMATS}")
    if field == "instruction":
        plain: str | None = alpaca_prompt(row)
        question = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
        messages = [{"role": "user", "content": question}]
    else:
        plain = row[field] if isinstance(row[field], str) and field == "prompt" else None
        messages = as_messages(row[field], field, "user") if field == "prompt" else message_list(row, field)
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise InputError(f"field {field!r} holds no question before the answer")
    if plain is not None and not tokenizer.chat_template:
        note_unread(row, note)
        return plain
    return Chat.of(row, with_system(row, messages), tokenizer, note).text(opened=True)


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: PseudoConfig,
    journal: Journal,
    progress: Progress | None,
) -> list[list[int]]:
    """The answers to all prompts: first those in the journal, to which each new batch is appended."""
    answers: list[list[int]] = [answer for batch in journal.rows for answer in batch]
    if progress is not None:
        progress(len(answers), len(prompts))
    training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=cuda_devices(model)):
            while len(answers) < len(prompts):
                first = len(answers)
                torch.manual_seed(derived_seed(config.seed, first, 0))
                journal.append(_answer_batch(model, tokenizer, prompts[first : first + config.batch], config))
                answers += journal.rows[-1]
                if progress is not None:
                    progress(len(answers), len(prompts))
    finally:
        model.train(training)
    return answers


def _answer_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], config: PseudoConfig
) -> list[list[int]]:
    """Answers in the prompts' order. Rows whose answers may be equally long are generated together."""
    ends, pad = end_tokens(model, tokenizer), end_token(tokenizer)
    limits = [_max_answer(model, len(prompt), config.max_new_tokens) for prompt in prompts]
    answers: dict[int, list[int]] = {}
    for limit in sorted(set(limits)):
        rows = [row for row, longest in enumerate(limits) if longest == limit]
        inputs_BT, mask_BT = left_padded([prompts[row] for row in rows], pad, model.device)
        settings = generation_config(model, config.temperature, limit, ends, pad)
        answers |= zip(rows, write(model, inputs_BT, mask_BT, settings, ends), strict=True)
    return [answers[row] for row in range(len(prompts))]


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of tokens as one tensor `[B, T]`, filled up on the left, and the mask that is 0 there."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _max_answer(model: PreTrainedModel, num_prompt: int, max_new_tokens: int) -> int:
    """How long an answer to a prompt of this length may be."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return max_new_tokens if context is None else min(max_new_tokens, context - num_prompt)


def _key(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], config: PseudoConfig
) -> str:
    """A hash of all that the answers depend on."""
    digest = hashlib.sha256()
    parts = [vars(config), list(map(list, prompts)), sorted(end_tokens(model, tokenizer)), str(model.device.type)]
    digest.update(json.dumps(parts).encode())
    digest.update(model_fingerprint(model).encode())
    return digest.hexdigest()[:24]

"""The data SPEC `self`: text sampled from the teacher, so that a conversion needs no data set.

It is kept in a cache folder, batch by batch with the random state after it, so that a killed run goes on where it
stopped, and a second run or an evaluation reads it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from linearize.errors import InputError
from linearize.modeling.io.integrity import model_fingerprint
from linearize.storage.journal import Journal, default_cache, open_journal
from linearize.training.data.documents import Document, end_token
from linearize.training.data.loading import DataConfig

KIND = "self_text"
FILE = "texts.jsonl"

_MAX_EMPTY = 256  # documents in a row without a token before the teacher counts as unable to write

Progress = Callable[[int, int], None]  # tokens so far, tokens wanted


def self_sampler(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Callable[[], list[Document]]:
    """The `sample` argument of `load_documents`: the teacher and the `self_*` settings, bound.

    `cache`: folder of all texts kept; None: see `journal.default_cache`.
    """
    return lambda: sample_documents(
        model,
        tokenizer,
        config.self_tokens,
        temperature=config.self_temperature,
        seed=config.self_seed,
        batch_size=config.self_batch,
        max_new_tokens=config.self_max_new_tokens or config.length,
        prompt=config.self_prompt,
        cache=default_cache(KIND) if cache is None else cache,
        progress=progress,
    )


def sample_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    max_new_tokens: int = 1024,
    prompt: str | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> list[Document]:
    """Documents sampled from the teacher's own distribution until they hold `num_tokens` tokens or a little more.

    Each begins with BOS (if the tokenizer has one) and the prompt, and ends with the token that the teacher ended it
    with; one that reaches `max_new_tokens`, or the teacher's context, ends there without. The same seed, batch size
    and machine give the same text. The caller's random state and the model's mode are left as they were. With `cache`,
    a folder, the text is kept there, and what was asked for before is not written again.

    Raises:
        InputError: a temperature that is not positive, a prompt that fills the context, or a teacher that writes only
            end tokens.
    """
    if temperature <= 0:
        raise InputError(f"temperature {temperature}: sampling needs one above 0 (1 is the teacher's own distribution)")
    start, shown = _start(tokenizer, prompt)
    ends = end_tokens(model, tokenizer)
    limit = _fit_context(model, len(start), max_new_tokens)
    config = generation_config(model, temperature, limit, ends, end_token(tokenizer))
    inputs = torch.tensor([start] * batch_size, device=model.device)
    file = None if cache is None else cache / _key(model, config, inputs, seed) / FILE

    documents: list[Document] = []
    written = num_empty = 0
    training = model.training
    model.eval()
    try:
        with (
            torch.random.fork_rng(devices=cuda_devices(model)),
            nullcontext() if file is None else open_journal(file) as journal,
        ):
            torch.manual_seed(seed)
            batches = _batches(journal, model, lambda: write(model, inputs, torch.ones_like(inputs), config, ends))
            while written < num_tokens:
                for tokens in next(batches):
                    num_empty = 0 if len(tokens) > 1 or tokens[0] not in ends else num_empty + 1
                    if num_empty == 0 and written < num_tokens:
                        documents.append(_document([*shown, *tokens]))
                        written += len(documents[-1])
                _check_writes(num_empty)
                if progress is not None:
                    progress(min(written, num_tokens), num_tokens)
    finally:
        model.train(training)
    return documents


def _batches(
    journal: Journal | None, model: PreTrainedModel, write_batch: Callable[[], list[list[int]]]
) -> Iterator[list[list[int]]]:
    """Batches of texts without end: those in the journal, then new ones from the random state after them."""
    rows = [] if journal is None else list(journal.rows)
    for row in rows:
        yield row["texts"]
    if rows:
        _set_random_state(model, rows[-1]["random"])
    while True:
        texts = write_batch()
        if journal is not None:
            journal.append({"texts": texts, "random": _random_state(model)})
        yield texts


def _random_state(model: PreTrainedModel) -> str:
    """The state of the generator that sampling on the model's device uses."""
    state = torch.cuda.get_rng_state(model.device) if model.device.type == "cuda" else torch.get_rng_state()
    return base64.b64encode(state.numpy().tobytes()).decode()


def _set_random_state(model: PreTrainedModel, text: str) -> None:
    state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
    if model.device.type == "cuda":
        torch.cuda.set_rng_state(state, model.device)
    else:
        torch.set_rng_state(state)


def _key(model: PreTrainedModel, config: GenerationConfig, inputs_BT: Tensor, seed: int) -> str:
    """A hash of all that the text depends on."""
    inputs = [config.to_json_string(), inputs_BT.tolist(), seed, model.device.type, model_fingerprint(model)]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:24]


def write(
    model: PreTrainedModel, inputs_BT: Tensor, mask_BT: Tensor, config: GenerationConfig, ends: set[int]
) -> list[list[int]]:
    """The new tokens of each row, up to and with the first end token; `mask_BT` is 0 on padding, which is on the left.

    A row that was done earlier than others is padded by `generate`; that is cut off here.
    """
    output_BT: Tensor = model.generate(inputs_BT, attention_mask=mask_BT, generation_config=config)  # type: ignore[operator]  # PreTrainedModel hides GenerationMixin
    rows = output_BT[:, inputs_BT.shape[1] :].tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


def _start(tokenizer: PreTrainedTokenizerBase, prompt: str | None) -> tuple[list[int], list[int]]:
    """The tokens generation starts from, and those of them that the document shows.

    A tokenizer without BOS starts from EOS, which parted the documents in pretraining; it is not part of the text.
    """
    text = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    if isinstance(tokenizer.bos_token_id, int):
        shown = text if text[:1] == [tokenizer.bos_token_id] else [tokenizer.bos_token_id, *text]
        return shown, shown
    return [end_token(tokenizer), *text], text


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokenizer's EOS and all that the teacher's generation config names (some have several)."""
    named = getattr(model.generation_config, "eos_token_id", None)
    return {end_token(tokenizer), *(named if isinstance(named, (list, tuple)) else [] if named is None else [named])}


def _fit_context(model: PreTrainedModel, num_start: int, max_new_tokens: int) -> int:
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or num_start + max_new_tokens
    if num_start >= context:
        raise InputError(f"the prompt has {num_start} tokens, the teacher's context {context}; shorten the prompt")
    return min(max_new_tokens, context - num_start)


def generation_config(
    model: PreTrainedModel, temperature: float, limit: int, ends: set[int], pad: int
) -> GenerationConfig:
    """Plain sampling, greedy at temperature 0, of at most `limit` tokens.

    What is not set here would come from the teacher's generation config, so set what truncates.
    """
    sampling: dict[str, Any] = {
        "temperature": temperature,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "typical_p": 1.0,
        "epsilon_cutoff": 0.0,
        "eta_cutoff": 0.0,
    }
    return GenerationConfig(
        do_sample=temperature > 0,
        **(sampling if temperature > 0 else {}),
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        num_beams=1,
        num_return_sequences=1,
        min_length=0,
        max_new_tokens=limit,
        use_cache=True,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
        bos_token_id=getattr(model.config, "bos_token_id", None),
    )


def _document(tokens: list[int]) -> Document:
    return Document(tokens, [1] * len(tokens))


def cuda_devices(model: PreTrainedModel) -> list[torch.device]:
    return [model.device] if model.device.type == "cuda" else []


def _check_writes(num_empty: int) -> None:
    if num_empty >= _MAX_EMPTY:
        raise InputError(
            f"the teacher ended {num_empty} texts in a row without writing a token, so it cannot provide data 'self'; "
            "give data.self_prompt or a data file"
        )

"""`linearize.generate`: text from a model in memory, a folder or a Hub name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from linearize.decoding.generate import continue_text
from linearize.decoding.loading import load_any
from linearize.decoding.speculative import share_equal_weights
from linearize.decoding.speculative.draft_length import DraftTokens
from linearize.decoding.speculative.drafters import check_tokenizers
from linearize.errors import InputError
from linearize.modeling.io.teacher import own_tokenizer


def generate(
    model: str | os.PathLike[str] | PreTrainedModel,
    prompt: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    seed: int = 0,
    stream: bool = False,
    prompt_lookup: bool = False,
    draft: str | os.PathLike[str] | PreTrainedModel | None = None,
    draft_tokens: DraftTokens = "auto",
    adapter: str | os.PathLike[str] | None = None,
    store: int | None = None,
    revision: str | None = None,
    token: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
    device_map: str | dict[str, Any] | None = None,
) -> str:
    """Continue a prompt with a student or any causal LM; returns prompt and continuation, special tokens left out.

    Args:
        model: a model in memory, a folder or a Hub name; load it once and give it for many prompts.
        tokenizer: of a model in memory; None: the one in the folder that it was loaded from.
        temperature: 0 is greedy.
        stream: write the text to stdout as it comes.
        prompt_lookup, draft: draft tokens by repetitions in the text, or by a smaller model with the same tokenizer;
            the text stays the same. `draft_tokens` at a time.
        adapter, store: of a model that is named; see `linearize.load`, also for all that follows.

    Raises:
        InputError: a model, tokenizer, draft or setting that cannot be used.
    """
    if not isinstance(prompt, str):
        raise InputError(
            f"the prompt is a {type(prompt).__name__}: give one text (the model's own generate has batches)"
        )
    options = {
        "adapter": adapter, "store": store, "revision": revision, "token": token, "dtype": dtype, "device": device,
        "device_map": device_map,
    }  # fmt: skip
    if isinstance(model, PreTrainedModel):
        if present := [name for name, value in options.items() if value is not None]:
            raise InputError(f"{present[0]} given for a model in memory, which is loaded already: leave it out")
        tokenizer = tokenizer or own_tokenizer(model)
    else:
        model, read = load_any(Path(model) if isinstance(model, os.PathLike) else model, **options)  # type: ignore[arg-type]
        tokenizer = tokenizer or read
    if draft is not None and not isinstance(draft, PreTrainedModel):
        name = str(draft)
        draft, draft_tokenizer = load_any(name, device=str(model.device), token=token, dtype=dtype)
        check_tokenizers(tokenizer, draft_tokenizer, str(model.name_or_path), name)
        share_equal_weights(draft, model)
    return continue_text(
        model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True) if stream else None, prompt_lookup=prompt_lookup,
        draft=draft, draft_tokens=draft_tokens,
    )  # fmt: skip

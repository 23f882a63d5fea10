"""Pad tokens that a model has no embedding for, which tokenizers with a pad token added later often have."""

from __future__ import annotations

import logging
from typing import Any

from transformers import PreTrainedConfig

LOG = logging.getLogger("linearize")


def fit_pad_token_of_config(config: PreTrainedConfig) -> None:
    """Let a config pad with EOS where its pad id is beyond the vocabulary; no model can be built with such an id."""
    for each in {id(part): part for part in (config, config.get_text_config())}.values():
        _fit(each, getattr(each, "vocab_size", None))


def fit_pad_token(model: Any, tokenizer: Any) -> None:
    """Let a tokenizer, and `generate` of the model, pad with EOS where the pad id has no embedding."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    _fit(model.generation_config, vocabulary)
    if is_outside(tokenizer.pad_token_id, vocabulary):
        LOG.warning(
            "the tokenizer's pad token %r has the id %d and the model %d embeddings: padding with EOS instead",
            tokenizer.pad_token, tokenizer.pad_token_id, vocabulary,
        )  # fmt: skip
        tokenizer.pad_token = None if is_outside(tokenizer.eos_token_id, vocabulary) else tokenizer.eos_token


def take_special_tokens(tokenizer: Any, config: PreTrainedConfig) -> None:
    """Give a tokenizer the BOS, EOS and pad token that a config names by ids: some versions of transformers read a
    GGUF file's BOS as its EOS."""
    for kind in ("bos", "eos", "pad"):
        token = getattr(config, f"{kind}_token_id", None)
        if isinstance(token, int) and token != getattr(tokenizer, f"{kind}_token_id"):
            setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(token))


def is_outside(token: int | None, vocabulary: int) -> bool:
    """Whether there is such a token, and no embedding for it."""
    return token is not None and not 0 <= token < vocabulary


def _fit(config: Any, vocabulary: int | None) -> None:
    """The pad id of a config that has EOS ids, one or several, beside it."""
    if vocabulary is None or not is_outside(getattr(config, "pad_token_id", None), vocabulary):
        return
    ends = getattr(config, "eos_token_id", None)
    inside = [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None and 0 <= end < vocabulary]
    config.pad_token_id = inside[0] if inside else None

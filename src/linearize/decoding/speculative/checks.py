"""What cannot be speculated with, told in one line before anything is read."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from linearize.decoding.speculative.logits_processing import vocabulary_size
from linearize.errors import InputError


def check_input(
    input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int, streamer: BaseStreamer | None
) -> list[list[int]]:
    """The prompts without padding. Raises InputError for shapes and sizes that cannot be used."""
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


def check_vocabularies(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    """Raises InputError where the models have vocabularies of different sizes."""
    sizes = [vocabulary_size(model) for model in (target, draft)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the draft has a vocabulary of {sizes[1]} tokens and the target one of {sizes[0]}: a draft must guess in "
            "the target's own tokens; take one made from it (recipe draft), or prompt lookup"
        )


def check_tokenizers(
    tokenizer: PreTrainedTokenizerBase, draft_tokenizer: PreTrainedTokenizerBase, path: str, draft: str
) -> None:
    """Raises InputError where two models split text into different tokens."""
    if tokenizer.get_vocab() != draft_tokenizer.get_vocab():
        raise InputError(
            f"draft {draft}: its vocabulary is not that of {path}, so its guesses mean other tokens; take a draft made "
            "from it (recipe draft), or prompt lookup"
        )

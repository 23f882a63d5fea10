"""From logits to tokens as the generation config says: transformers' own processors, for target and draft alike.

Letters: B batch, T positions, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from linearize.errors import InputError
from linearize.modeling.library_internals import filled_generation_config, logits_processors, prepare_special_tokens

# Processors of transformers that look at the scores alone; all others may look at the text before.
_TEXT_FREE = {
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "MinPLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopHLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TypicalLogitsWarper",
}


@dataclass
class LogitsProcessing:
    """Turns logits into scores and scores into tokens, sampled or greedy.

    `processors`: one list per row of the batch; `text_free`: whether none of them reads the text. `vocabulary`: the
    width of the target's logits.
    """

    sample: bool
    stop_tokens: frozenset[int]
    processors: list[Any]
    text_free: bool
    vocabulary: int
    generator: torch.Generator | None = field(default=None)

    def scores(self, logits_BTV: Tensor, texts: Sequence[Sequence[int]], drafts: Sequence[Sequence[int]]) -> Tensor:
        """Return scores `[B, T, V]` in fp32: position t of row b follows `texts[b]` and t tokens of `drafts[b]`."""
        scores_BTV = logits_BTV.float()
        if not self.processors[0]:
            return scores_BTV
        rows, count, vocabulary = scores_BTV.shape
        if self.text_free:
            no_text = torch.empty(rows * count, 0, dtype=torch.long, device=scores_BTV.device)
            flat: Tensor = self.processors[0](no_text, scores_BTV.reshape(rows * count, vocabulary))
            return flat.view(rows, count, vocabulary)
        return torch.stack(
            [
                torch.cat([self._one(row, [*texts[row], *drafts[row][:t]], scores_BTV[row, t]) for t in range(count)])
                for row in range(rows)
            ]
        )

    def _one(self, row: int, text: list[int], scores_V: Tensor) -> Tensor:
        ids = torch.tensor([text], device=scores_V.device)
        scores_1V: Tensor = self.processors[row](ids, scores_V[None].clone())
        return scores_1V

    def choose(self, scores_BV: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return a token per row, `[B, 1]`, and the distribution `[B, V]` it was drawn from (None: greedy)."""
        if not self.sample:
            return scores_BV.argmax(-1, keepdim=True), None
        probabilities = scores_BV.softmax(-1)
        return torch.multinomial(probabilities, 1, generator=self.generator), probabilities

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch alone."""
        self.processors = [self.processors[row] for row in rows]


def logits_processing(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    generation_config: GenerationConfig | None,
    max_new_tokens: int,
    stop_tokens: Sequence[int] | None,
    seed: int,
) -> LogitsProcessing:
    """Return the processing of a generation config (None: the model's own; unset values are taken from there).

    `stop_tokens` None: the config's EOS tokens. Raises InputError for settings that the loop cannot follow.
    """
    config = filled_generation_config(model, generation_config)
    _check_config(config)
    if stop_tokens is not None:
        config.eos_token_id = list(stop_tokens) or None
    prepare_special_tokens(model, config)
    lists = [_processors(model, copy.copy(config), len(prompt), max_new_tokens) for prompt in prompts]
    return LogitsProcessing(
        sample=bool(config.do_sample),
        stop_tokens=frozenset(_token_list(config.eos_token_id)),
        processors=lists,
        text_free=all(type(processor).__name__ in _TEXT_FREE for processor in lists[0]),
        vocabulary=vocabulary_size(model),
        generator=torch.Generator(device=model.device).manual_seed(seed) if config.do_sample else None,
    )


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the width of a model's logits."""
    embeddings: Any = model.get_output_embeddings()
    size: int = model.config.get_text_config().vocab_size if embeddings is None else embeddings.weight.shape[0]
    return size


def _processors(
    model: PreTrainedModel, config: GenerationConfig, prompt: int, max_new_tokens: int
) -> LogitsProcessorList:
    config.max_length = prompt + max_new_tokens
    return logits_processors(model, config, prompt)


def _token_list(tokens: int | Sequence[int] | None) -> list[int]:
    if tokens is None:
        return []
    return [tokens] if isinstance(tokens, int) else list(tokens)


def _check_config(config: GenerationConfig) -> None:
    refused = {"num_beams": 1, "num_return_sequences": 1, "guidance_scale": 1, "watermarking_config": None}
    refused |= {"penalty_alpha": None, "dola_layers": None, "stop_strings": None, "constraints": None}
    refused |= {"assistant_ensemble_weight": None, "token_healing": False}
    for name, allowed in refused.items():
        value = getattr(config, name, None)
        if value is not None and value != allowed:
            raise InputError(
                f"{name} is {value} in the generation config: with speculation it must be {allowed}; set it so, or "
                "decode without a draft"
            )

"""How a request's tokens are chosen, one random generator each, and the log-probabilities that it asked for.

Letters: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from linearize.decoding.speculative.logits_processing import LogitsProcessing, logits_processing
from linearize.serving.errors import server_error


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """What a request says of sampling; None: as the model's generation config, else neither top-p nor top-k and a
    temperature of 1. Temperature 0 is greedy. `ignore_eos`: no token ends the text."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    ignore_eos: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability under the model (before temperature and the like), None at the start of a prompt, and
    the likeliest tokens of its place, best first."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


def chooser_of_tokens(
    model: PreTrainedModel, prompt: Sequence[int], settings: SamplingSettings, max_tokens: int, choice: int
) -> LogitsProcessing:
    """What turns logits into the tokens of one answer; the seed of answer `choice` of a request is that much higher."""
    own: Any = model.generation_config
    temperature = _first(settings.temperature, own.temperature, 1.0)
    fields: dict[str, Any] = {"do_sample": temperature > 0, "num_beams": 1, "num_return_sequences": 1}
    if temperature > 0:
        fields["temperature"] = temperature
        fields["top_p"] = _first(settings.top_p, own.top_p, 1.0)
        fields["top_k"] = max(_first(settings.top_k, own.top_k, 0), 0)
        fields["min_p"] = settings.min_p
    if settings.repetition_penalty is not None:
        fields["repetition_penalty"] = settings.repetition_penalty
    seed = secrets.randbits(62) if settings.seed is None else settings.seed
    return logits_processing(
        model,
        [prompt],
        generation_config=GenerationConfig(**fields),
        max_new_tokens=max(max_tokens, 1),
        stop_tokens=[] if settings.ignore_eos else None,
        seed=(seed + choice) % 2**63,
    )


def choose(processing: LogitsProcessing, logits_V: Tensor, text: Sequence[int]) -> int:
    """The next token of a text.

    Raises:
        ApiError: the model gives no finite logits.
    """
    if not bool(logits_V.amax().isfinite()):
        raise server_error("the model's logits are not finite: its weights, or its type of numbers, do not fit")
    scores_BTV = processing.scores(logits_V[None, None], [text], [[]])
    return int(processing.choose(scores_BTV[:, 0])[0])


def is_plain_argmax(processing: LogitsProcessing) -> bool:
    """Whether the next token is just that of the largest logit."""
    return not processing.sample and not processing.processors[0]


def token_logprobs(logits_TV: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """The log-probability of each token, of which logits t are those of its place, and the `top` likeliest ones."""
    logprobs_TV = logits_TV.float().log_softmax(-1)
    chosen = logprobs_TV.gather(1, torch.tensor(tokens, device=logits_TV.device)[:, None])[:, 0].tolist()
    best = logprobs_TV.topk(min(top, logprobs_TV.shape[1]))
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        TokenLogprob(token, value, tuple(zip(ids, values, strict=True)))
        for token, value, (ids, values) in zip(tokens, chosen, rows, strict=True)
    ]


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)

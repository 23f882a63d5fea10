"""Recall: greedy answers to questions whose fact is far back in the prompt, and what the full forward would answer.

Letters: B prompts, T tokens, N tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.decoding.loading import pad_token
from linearize.errors import InputError
from linearize.metrics.plots import figure_files, new_figure
from linearize.metrics.theme import COLOURS, legend_below, percent_label
from linearize.training.data.pseudo_labels import left_padded

SPARE_TOKENS = 2  # generated beyond the answer's own, so that a longer wrong answer shows
TIE = 1e-3  # nats between two tokens that the arithmetic's noise may swap, at least
PLAIN = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0, "num_beams": 1}
"""Greedy search without the settings that some models bring along: they would change what the model itself answers."""


class RecallItem(Protocol):
    """A prompt that holds the answer somewhere and asks for it at its end."""

    @property
    def prompt(self) -> str: ...

    @property
    def answer(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class RecallAnswer:
    """One item as answered; `distance`: tokens from the end of the fact to the end of the prompt."""

    distance: int
    expected: str
    answer: str
    correct: bool


@dataclass(frozen=True, kw_only=True)
class RecallBin:
    """Items whose distance is in [start, end)."""

    start: int
    end: int
    items: int
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class RecallReport:
    """Exact-match accuracy over all items and by distance, and every answer."""

    items: int
    accuracy: float
    by_distance: tuple[RecallBin, ...]
    answers: tuple[RecallAnswer, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict."""
        lists = {"by_distance": [asdict(b) for b in self.by_distance], "answers": [asdict(a) for a in self.answers]}
        return asdict(self) | lists


def recall_beyond_window(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[RecallItem],
    *,
    batch_size: int = 16,
    distance_edges: Sequence[int] | None = None,
) -> RecallReport:
    """Answer every item greedily, in left-padded batches, and count exact matches.

    An answer is right when the generated text starts with it and it ends there as a word. `distance_edges` are the
    bins' edges in tokens (default: powers of two). Raises InputError for no items, or a prompt without its answer.
    """
    if not items:
        raise InputError("recall: no items; give at least one prompt with its answer")
    distances = [fact_distance(tokenizer, item) for item in items]
    generated: list[Generated] = []
    for start in range(0, len(items), batch_size):
        generated += answer_greedily(model, tokenizer, items[start : start + batch_size])
    answers = tuple(
        RecallAnswer(distance=d, expected=item.answer.strip(), answer=own.text, correct=own.correct)
        for d, item, own in zip(distances, items, generated, strict=True)
    )
    edges = list(distance_edges) if distance_edges is not None else _powers_of_two(min(distances), max(distances))
    return RecallReport(
        items=len(answers), accuracy=_accuracy(answers), by_distance=_by_distance(answers, edges), answers=answers
    )


def fact_distance(tokenizer: PreTrainedTokenizerBase, item: RecallItem) -> int:
    """Tokens between the answer's last mention in the prompt and the prompt's end."""
    at = item.prompt.rfind(item.answer.strip())
    if at < 0:
        raise InputError(
            f"recall: the answer {item.answer!r} is nowhere in its prompt: every prompt must hold its fact"
        )
    return len(prompt_tokens(tokenizer, item.prompt)) - len(
        prompt_tokens(tokenizer, item.prompt[: at + len(item.answer.strip())])
    )


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids without a space at the end: most tokenizers join a space to the word that follows, here the answer."""
    return list(tokenizer(prompt.rstrip(), verbose=False)["input_ids"])


def answer_tokens(tokenizer: Any, prompt: str, answer: str) -> list[int]:
    """The answer's tokens as they follow the prompt (as they are alone, where the two do not part cleanly)."""
    before, both = prompt_tokens(tokenizer, prompt), prompt_tokens(tokenizer, f"{prompt.rstrip()} {answer.strip()}")
    if both[: len(before)] == before and len(both) > len(before):
        return both[len(before) :]
    return list(tokenizer(f" {answer.strip()}", add_special_tokens=False)["input_ids"])


def matches(text: str, answer: str) -> bool:
    """Whether the text starts with the answer, and the answer ends there as a word."""
    text, answer = text.strip(), answer.strip()
    return text.startswith(answer) and not text[len(answer) : len(answer) + 1].isalnum()


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What a model answered: `text`, its `tokens`, whether it is `correct`; `expected`: the right answer's tokens."""

    text: str
    correct: bool
    tokens: tuple[int, ...]
    expected: tuple[int, ...]


@torch.inference_mode()
def answer_greedily(model: Any, tokenizer: PreTrainedTokenizerBase, items: Sequence[RecallItem]) -> list[Generated]:
    """Answers to all prompts in one left-padded batch, greedy, through the model's own cache.

    Only the model decides: penalties and the like in its generation settings are turned off.
    """
    prompts = [prompt_tokens(tokenizer, item.prompt) for item in items]
    expected = [answer_tokens(tokenizer, item.prompt, item.answer) for item in items]
    input_ids, mask = left_padded(prompts, pad_token(tokenizer), model.device)
    own = getattr(model, "generation_config", None)
    out = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=max(map(len, expected)) + SPARE_TOKENS,
        pad_token_id=pad_token(tokenizer),
        **{name: plain for name, plain in PLAIN.items() if getattr(own, name, None) not in (None, plain)},
    )
    new_BN = out[:, input_ids.shape[1] :].tolist()
    texts = tokenizer.batch_decode(new_BN, skip_special_tokens=True)
    ends = _ends(own, tokenizer)
    return [
        Generated(text=text, correct=matches(text, item.answer), tokens=_up_to_end(new, ends), expected=tuple(right))
        for text, new, right, item in zip(texts, new_BN, expected, items, strict=True)
    ]


def _ends(own: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    named = getattr(own, "eos_token_id", None)
    ends = {*named} if isinstance(named, (list, tuple)) else {named}
    return {token for token in (*ends, tokenizer.eos_token_id) if isinstance(token, int)}


def _up_to_end(tokens: Sequence[int], ends: set[int]) -> tuple[int, ...]:
    """Up to and with the first end token; what follows is padding."""
    return tuple(tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))])


@dataclass(frozen=True, kw_only=True)
class FullForward:
    """One answered item in forwards without padding or cache.

    `right`: every token of the right answer is the likeliest there. `agrees`: whether every token that was generated
    is the likeliest here too; `tie` where one is not and the noise of the arithmetic explains it.
    """

    right: bool
    agrees: Literal["yes", "no", "tie"]


def full_forward(model: Any, tokenizer: PreTrainedTokenizerBase, item: RecallItem, generated: Generated) -> FullForward:
    """What the full forward makes of an item that was answered through the cache."""
    prompt, number = prompt_tokens(tokenizer, item.prompt), len(generated.expected)
    logits_NV = _logits_after(model, prompt, generated.tokens)
    agrees: Literal["yes", "no", "tie"] = "yes"
    for logits_V, token, best in zip(logits_NV, generated.tokens, logits_NV.argmax(-1).tolist(), strict=True):
        if token != best:
            agrees = "tie" if _is_tie(logits_V, token, model.dtype) else "no"
            break
    if generated.tokens[:number] != generated.expected:
        logits_NV = _logits_after(model, prompt, generated.expected)
    return FullForward(right=logits_NV[:number].argmax(-1).tolist() == list(generated.expected), agrees=agrees)


@torch.inference_mode()
def _logits_after(model: Any, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """The logits that predict each of `tokens` after the prompt, `[N, V]` fp32."""
    ids = torch.tensor([[*prompt, *tokens[:-1]]], device=model.device)
    last = {"logits_to_keep": len(tokens)} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits_NV: Tensor = model(input_ids=ids, use_cache=False, **last).logits[0, -len(tokens) :].float()
    return logits_NV


def _is_tie(logits_V: Tensor, token: int, dtype: torch.dtype) -> bool:
    noise = max(TIE, 4 * torch.finfo(dtype).eps * float(logits_V.abs().max()))
    return float(logits_V.max() - logits_V[token]) <= noise


def _accuracy(answers: Sequence[RecallAnswer]) -> float:
    return sum(answer.correct for answer in answers) / len(answers)


def _powers_of_two(nearest: int, farthest: int) -> list[int]:
    first, last = max(nearest, 1).bit_length() - 1, farthest.bit_length()
    return [2**i for i in range(first, last + 1)] if nearest else [0, *(2**i for i in range(last + 1))]


def _by_distance(answers: Sequence[RecallAnswer], edges: Sequence[int]) -> tuple[RecallBin, ...]:
    bins = []
    for start, end in pairwise(edges):
        inside = [answer for answer in answers if start <= answer.distance < end]
        if inside:
            bins.append(RecallBin(start=start, end=end, items=len(inside), accuracy=_accuracy(inside)))
    return tuple(bins)


def plot_recall(reports: Mapping[str, RecallReport], folder: Path | str) -> list[Path]:
    """Share of exact answers by the distance to the fact, a line per model; files `recall.svg` and `.png`.

    `reports` maps `teacher` and `student` (or names of your own) to what `recall_beyond_window` gave.
    """
    with new_figure(Path(folder) / "recall") as (figure, (axis,)):
        for name, report in reports.items():
            shares = [b.accuracy for b in report.by_distance]
            style: dict[str, Any] = {"marker": "o", "color": COLOURS.get(name), "clip_on": False}
            axis.plot(range(len(shares)), shares, **style, label=f"{name} {report.accuracy:.0%}")
            names = [f"{b.start}-{b.end - 1}" for b in report.by_distance]
            axis.set_xticks(range(len(names)), names)
        axis.yaxis.set_major_formatter(percent_label)
        axis.set(title="Recall beyond the window", xlabel="tokens back to the fact", ylabel="exact answers")
        axis.set_ylim(0, 1)
        axis.margins(x=0.15)
        legend_below(figure)
    return figure_files(folder, "recall")

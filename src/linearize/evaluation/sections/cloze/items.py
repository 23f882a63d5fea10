"""Items of a last-word cloze, cut from any text: what comes before the last word of a sentence, and that word."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

_APOSTROPHES, _CLOSING = "'\u2019", "\"'\u201d\u2019\u00bb)\\]"
_LAST_WORD = re.compile(rf"(?<=\S )[^\W\d_]{{2,}}(?:[{_APOSTROPHES}-][^\W\d_]+)*(?=[.!?][{_CLOSING}]*(?:\s|$))")
_WORD = re.compile(r"\S+")


@dataclass(frozen=True, kw_only=True)
class ClozeItem:
    """`context` ends without a space; `choices[0]` is the true word, the others are last words of other items.

    Token ids: `context_ids` begin with BOS where the tokenizer has one; `choice_ids` are those of each choice behind
    the context, the space between them included.
    """

    context: str
    choices: tuple[str, ...]
    context_ids: tuple[int, ...]
    choice_ids: tuple[tuple[int, ...], ...]

    @property
    def word(self) -> str:
        """The true word."""
        return self.choices[0]


def cut_items(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    items: int,
    choices: int,
    min_words: int,
    max_words: int,
    max_tokens: int,
    seed: int,
) -> list[ClozeItem]:
    """At most `items` items, drawn by the seed: one of every text before a second one of any.

    A context has at least `min_words` words and is cut on the left to `max_words`; with its word it has at most
    `max_tokens` tokens. Fewer items, perhaps none, where the text has no more.
    """
    rng = random.Random(seed)
    found = _candidates(texts, min_words, max_words, rng)
    words = sorted({word for _, word in found})
    made: list[ClozeItem] = []
    for context, word in found:
        if len(made) == items:
            break
        others = [other for other in words if other.casefold() != word.casefold()]
        if len({other.casefold() for other in others}) < choices - 1:
            continue
        item = _item(context, (word, *_draw(others, choices - 1, rng)), tokenizer)
        if item is not None and len(item.context_ids) + max(map(len, item.choice_ids)) <= max_tokens:
            made.append(item)
    return made


def _candidates(texts: Sequence[str], min_words: int, max_words: int, rng: random.Random) -> list[tuple[str, str]]:
    """(context, word) of every place, in rounds: each round takes one place of every text that has any left."""
    queues = []
    for text in texts:
        places = [m for m in _LAST_WORD.finditer(text) if len(text[: m.start()].split()) >= min_words]
        rng.shuffle(places)
        queues.append([(_last_words(text[: m.start()].rstrip(), max_words), m.group()) for m in places])
    rng.shuffle(queues)
    longest = max(map(len, queues), default=0)
    return [queue[i] for i in range(longest) for queue in queues if i < len(queue)]


def _last_words(text: str, count: int) -> str:
    """The end of a text, from its `count`-th last word on."""
    starts = [m.start() for m in _WORD.finditer(text)]
    return text[starts[-count] :] if len(starts) > count else text


def _draw(words: list[str], count: int, rng: random.Random) -> list[str]:
    """Different words, also when case is ignored."""
    drawn: dict[str, str] = {}
    while len(drawn) < count:
        word = rng.choice(words)
        drawn.setdefault(word.casefold(), word)
    return list(drawn.values())


def _item(context: str, choices: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> ClozeItem | None:
    """The item as tokens; None where a tokenizer joins a choice to what stands before it, so that they cannot be told
    apart."""
    context_ids = tuple(tokenizer(context, add_special_tokens=False)["input_ids"])
    choice_ids = []
    for choice in choices:
        ids = tuple(tokenizer(f"{context} {choice}", add_special_tokens=False)["input_ids"])
        if ids[: len(context_ids)] != context_ids or len(ids) == len(context_ids):
            return None
        choice_ids.append(ids[len(context_ids) :])
    bos = (tokenizer.bos_token_id,) if isinstance(tokenizer.bos_token_id, int) else ()
    return ClozeItem(context=context, choices=choices, context_ids=(*bos, *context_ids), choice_ids=tuple(choice_ids))

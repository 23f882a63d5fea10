"""Where the assistant's answers are in the text that a template made of a chat.

The text of a chat mostly begins with that of its first messages, and an answer is what one more message adds. There are
two exceptions. A template may close a chat in another way than a turn (phi-3: EOS after the last one alone), and it may
write a message in another way where others follow (qwen3 drops the reasoning, mistral moves the system's text).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from linearize.errors import InputError
from linearize.training.data.chat import Chat
from linearize.training.data.row_fields import Note, ignore

Ranges = tuple[tuple[int, int], ...]
Spans = Callable[[], Sequence[tuple[int, int]]]


def assistant_ranges(chat: Chat, text: str, *, first: int = 0, note: Note = ignore) -> Ranges:
    """Character ranges of the assistant's turns in the chat's `text`, from message `first` on.

    A range holds the content and what closes the turn. What cannot be found is noted.
    """

    @cache
    def spans() -> Sequence[tuple[int, int]]:
        encoded = chat.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets: Sequence[tuple[int, int]] = encoded["offset_mapping"]
        return offsets

    turns = [turn for turn in range(first, len(chat.messages)) if chat.messages[turn]["role"] == "assistant"]
    ranges = [_range_or_none(chat, text, turn, spans) for turn in turns]
    if not all(ranges):
        note("have answers that are not in the text as the chat template writes it: these do not count")
    if not turns:
        note("have no answer of the assistant: nothing of them counts")
    return tuple(range_ for range_ in ranges if range_ is not None)


def _range_or_none(chat: Chat, text: str, turn: int, spans: Spans) -> tuple[int, int] | None:
    """The range of one turn; None where it cannot be found, as where the template refuses a part of the chat."""
    try:
        return _turn_range(chat, text, turn, spans)
    except InputError:
        return None


def _turn_range(chat: Chat, text: str, turn: int, spans: Spans) -> tuple[int, int] | None:
    """The range of one turn; None where its content is not in the text."""
    before, after = chat.first(turn).text(opened=True), chat.first(turn + 1).text()
    whole = text.startswith(after)
    if whole and after.startswith(before):
        return len(before), len(after)
    here = _difference(text, chat.marked(turn).text())
    alone = _difference(after, chat.first(turn + 1).marked(turn).text())
    if here is None or alone is None:
        return None
    start, stop = here
    start = min(start, len(before)) if text.startswith(before) else start
    return start, len(after) if whole else stop + _closing(chat, text[stop:], after[alone[1] :], stop, spans)


def _closing(chat: Chat, rest: str, alone: str, stop: int, spans: Spans) -> int:
    """How many characters close a turn, of the `rest` of the text after its content (from character `stop` on).

    `alone`: what follows the content where the chat ends with this turn; that may be EOS besides.
    """
    without_eos = alone.rstrip().removesuffix(str(chat.tokenizer.eos_token))
    for closing in (alone, without_eos):
        if closing and rest.startswith(closing):
            return len(closing)
    end = stop + same_beginning(rest, alone)
    if chat.tokenizer.is_fast:  # what follows may be other tokens that begin alike: none of them is cut
        end = next((begin for begin, after in spans() if stop <= begin < end < after), end)
    return end - stop


def _difference(text: str, marked: str) -> tuple[int, int] | None:
    """The characters of a text that are different in another one; None where they are equal."""
    if text == marked:
        return None
    start = same_beginning(text, marked)
    most = min(len(text), len(marked)) - start
    end = same_beginning(text[len(text) - most :][::-1], marked[len(marked) - most :][::-1])
    return start, len(text) - end


def same_beginning(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)

"""Questions about facts hidden in long text, counted in tokens: needles, pass keys, many facts in one document.

A question is a prompt that holds its answer somewhere and asks for it at its end. Lengths are met as closely as whole
sentences allow (at the end, one that is too long is left out for a shorter one) and never exceeded; what came out
(tokens, distance) stands in each question.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, cycle, islice
from typing import Any

from linearize.errors import InputError
from linearize.evaluation.needles import COLOURS, OBJECTS, QUESTION, STATEMENT, sentences
from linearize.evaluation.recall import SPARE_TOKENS, answer_tokens, prompt_tokens

CITIES = (
    "Accra", "Bogota", "Cairo", "Dublin", "Geneva", "Hanoi", "Jakarta", "Kyoto", "Lagos", "Lima", "Lisbon", "Madrid",
    "Manila", "Nairobi", "Oslo", "Prague", "Quito", "Riga", "Seoul", "Toronto", "Vienna", "Warsaw", "York", "Zagreb",
)  # fmt: skip
NOISE = (
    "The sun was warm.", "The wind was soft.", "The river ran on and on.", "Birds sat in the old tree.",
    "And so the day went by.",
)  # fmt: skip
LONGEST_PIECE = 60
"""Words; a longer "sentence" (a list, an unclosed quote) is cut."""

FILLERS = 24
"""Sentences further on that are tried where the next one is too long for the room that is left."""

Piece = tuple[str, str]
"""What parts a sentence from the one before it, and the sentence."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a fact is told and asked for; `{thing}` and `{answer}` are filled in. `answer`: always this one."""

    statement: str
    question: str
    digits: int = 4
    answer: str | None = None
    things: tuple[str, ...] = ("",)


@dataclass(frozen=True, kw_only=True)
class HiddenFact:
    """A prompt that ends right before its answer.

    `group`: the length wanted, in tokens, or the number of facts; `depth`: the share of the text before the fact, as
    wanted; `tokens`: of the prompt; `distance`: tokens from the end of the fact to the end of the prompt.
    """

    prompt: str
    answer: str
    group: int
    depth: float | None = None
    tokens: int
    distance: int


CODE = Form(
    statement=STATEMENT + "{answer}.",
    question=(QUESTION + STATEMENT).rstrip(),
    things=tuple(f"{colour} {thing}" for colour in COLOURS for thing in OBJECTS),
)
CITY = Form(
    statement="The special number of the city of {thing} is {answer}.",
    question="What is the special number of the city of {thing}? The special number of the city of {thing} is",
    digits=7,
    things=CITIES,
)
PASS_KEY = Form(
    statement="The pass key is {answer}. Remember it. {answer} is the pass key.",
    question="What is the pass key? The pass key is",
    digits=5,
)
PASS_KEY_TASK = "There is a pass key hidden in this text. Find it and remember it."


class Ruler:
    """Counts tokens; those of a sentence only once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._counts: dict[Piece, int] = {}

    def count(self, piece: Piece) -> int:
        """Tokens of a sentence, with what parts it from the one before, by itself."""
        if piece not in self._counts:
            ids = self.tokenizer("".join(piece), add_special_tokens=False, verbose=False)["input_ids"]
            self._counts[piece] = len(ids)
        return self._counts[piece]

    def prompt(self, text: str) -> int:
        """Tokens of a prompt, the first special one included."""
        return len(prompt_tokens(self.tokenizer, text))


class Hay:
    """Texts to hide facts in, cut into sentences when needed; sentences that tell facts of the same form are left out.

    Raises InputError for texts without a word.
    """

    def __init__(self, texts: Sequence[str], form: Form) -> None:
        self.texts = [text for text in texts if text.strip()]
        self.competes = _competitor(form)
        self._pieces: dict[int, list[Piece]] = {}
        if not any(self._of(i) for i in range(len(self.texts))):
            raise InputError("recall: the texts to hide facts in hold no sentence to use; give `hay` a file of prose")

    def draw(self, rng: random.Random, usable: Callable[[str], bool]) -> Iterator[Piece]:
        """Sentences without end: from anywhere in a random text on, then whole texts in random order."""
        first = True
        while True:
            found = False
            for index in rng.sample(range(len(self.texts)), len(self.texts)):
                pieces = self._of(index)
                start = rng.randrange(len(pieces)) if first and pieces else 0
                for number, (separator, body) in enumerate(pieces[start:]):
                    if usable(body):
                        first, found = False, True
                        yield (separator if number else "\n\n", body)
            if not found:
                raise InputError("recall: every sentence of the hay tells the answer itself; give other texts")

    def _of(self, index: int) -> list[Piece]:
        if index not in self._pieces:
            pieces = [piece for pair in sentences(self.texts[index]) for piece in _cut(*pair)]
            self._pieces[index] = [piece for piece in pieces if piece[1] and not self.competes(piece[1])]
        return self._pieces[index]


def needle_question(ruler: Ruler, hay: Hay, form: Form, rng: random.Random, *, length: int, depth: float) -> HiddenFact:
    """One fact in `length` tokens of hay (fact, question and answer included), `depth` of the hay before it."""
    thing, answer = _facts(form, rng, 1)[0]
    pieces = hay.draw(rng, lambda body: answer not in body)
    return _hidden(ruler, pieces, form, thing, answer, length=length, depth=depth)


def passkey_question(ruler: Ruler, form: Form, rng: random.Random, *, length: int) -> HiddenFact:
    """A fact (a pass key, say) anywhere in `length` tokens of noise: the same few sentences again and again."""
    thing, answer = _facts(form, rng, 1)[0]
    pieces = cycle([(" ", sentence) for sentence in NOISE])
    before = PASS_KEY_TASK if form == PASS_KEY else ""
    return _hidden(ruler, pieces, form, thing, answer, length=length, depth=rng.random(), before=before)


def association_questions(
    ruler: Ruler, hay: Hay, form: Form, rng: random.Random, *, keys: int, queries: int, hay_tokens: int
) -> list[HiddenFact]:
    """`keys` facts anywhere in about `hay_tokens` tokens of hay, `queries` of them asked one after the other.

    Each query is a question of its own; the earlier ones stand answered before it. Raises InputError for more keys
    than the form has things.
    """
    facts = _facts(form, rng, keys)
    answers = [answer for _, answer in facts]
    pieces = _first(ruler, hay.draw(rng, lambda body: not any(a in body for a in answers)), hay_tokens)
    places = [rng.randrange(len(pieces) + 1) for _ in facts]
    text, ends = "", {}
    for place in range(len(pieces) + 1):
        for (thing, answer), at in zip(facts, places, strict=True):
            if at == place:
                text = _joined(text, " ", form.statement.format(thing=thing, answer=answer))
                ends[thing] = text
        text = _joined(text, *pieces[place]) if place < len(pieces) else text
    found = []
    for thing, answer in rng.sample(facts, min(queries, keys)):
        text = _joined(text, " ", form.question.format(thing=thing))
        tokens = ruler.prompt(text)
        distance = tokens - ruler.prompt(ends[thing])
        found.append(HiddenFact(prompt=text, answer=answer, group=keys, tokens=tokens, distance=distance))
        text = f"{text} {answer}."
    return found


def _hidden(
    ruler: Ruler, source: Iterator[Piece], form: Form, thing: str, answer: str, *, length: int, depth: float,
    before: str = "",
) -> HiddenFact:  # fmt: skip
    """As many sentences as fit, the fact at the border nearest to its depth, the question at the end."""
    statement, question = form.statement.format(thing=thing, answer=answer), form.question.format(thing=thing)
    room = length - SPARE_TOKENS - len(answer_tokens(ruler.tokenizer, question, answer))

    def written(hay: Sequence[Piece]) -> tuple[str, str]:
        place = _border([ruler.count(piece) for piece in hay], depth)
        told = _joined(_text(before, hay[:place]), " ", statement)
        return told, _joined(_text(told, hay[place:]), " ", question)

    def tokens(hay: Sequence[Piece]) -> int:
        return ruler.prompt(written(hay)[1])

    pieces = _first(ruler, source, room)
    totals = list(accumulate(map(ruler.count, pieces), initial=tokens([])))
    number = max(0, bisect_right(totals, room) - 1)
    while number < len(pieces) and tokens(pieces[: number + 1]) <= room:
        number += 1
    while number and tokens(pieces[:number]) > room:
        number -= 1
    hay, size = pieces[:number], tokens(pieces[:number])
    if size > room:
        raise InputError(
            f"recall: {length} tokens are too few: the fact and its question alone take {size + length - room}; "
            "give greater lengths"
        )
    for piece in chain(pieces[number + 1 :], islice(source, FILLERS)):
        if ruler.count(piece) <= room - size and (longer := tokens([*hay, piece])) <= room:
            hay, size = [*hay, piece], longer
    told, prompt = written(hay)
    distance = size - ruler.prompt(told)
    return HiddenFact(prompt=prompt, answer=answer, group=length, depth=depth, tokens=size, distance=distance)


def _first(ruler: Ruler, source: Iterator[Piece], num_tokens: int) -> list[Piece]:
    """Sentences of at least `num_tokens` tokens together, as counted one by one and as counted in one text."""
    pieces: list[Piece] = []
    counted = 0
    while counted < num_tokens:
        while counted < num_tokens:
            pieces += islice(source, 1)
            counted += ruler.count(pieces[-1])
        counted = ruler.prompt(_text("", pieces))
    return pieces


def _border(counts: Sequence[int], depth: float) -> int:
    """The number of sentences before the fact whose tokens come nearest to the share `depth` of all."""
    before = [0, *accumulate(counts)]
    return min(range(len(before)), key=lambda n: abs(before[n] - depth * before[-1]))


def _text(before: str, pieces: Sequence[Piece]) -> str:
    for separator, body in pieces:
        before = _joined(before, separator, body)
    return before


def _joined(text: str, separator: str, more: str) -> str:
    return text.rstrip() + (separator or " ") + more if text else more


def _facts(form: Form, rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Things, all different, and their answers, all different.

    Up to ten coloured things differ in colour and in object; more of them must share one or the other.
    """
    if count > len(form.things):
        raise InputError(f"recall: {count} keys: this form of facts knows {len(form.things)} different things")
    if form.things == CODE.things and count <= min(len(COLOURS), len(OBJECTS)):
        pairs = zip(rng.sample(COLOURS, count), rng.sample(OBJECTS, count), strict=True)
        things = [f"{colour} {thing}" for colour, thing in pairs]
    else:
        things = rng.sample(form.things, count)
    codes = rng.sample(range(10**form.digits), count)
    answers = [form.answer or f"{code:0{form.digits}d}" for code in codes]
    return list(zip(things, answers, strict=True))


def _competitor(form: Form) -> Callable[[str], bool]:
    """Whether a sentence holds the longest fixed part of the form's statement, if that has two words or more."""
    part = max((" ".join(part.split()) for part in re.split(r"\{\w+\}", form.statement)), key=len).lower()
    return lambda body: " " in part and part in " ".join(body.lower().split())


def _cut(separator: str, body: str) -> Iterator[Piece]:
    words = body.split()
    if len(words) <= LONGEST_PIECE:
        yield separator, body
        return
    for start in range(0, len(words), LONGEST_PIECE):
        yield (" " if start else separator), " ".join(words[start : start + LONGEST_PIECE])

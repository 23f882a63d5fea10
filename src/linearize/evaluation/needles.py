"""Recall documents: short facts hidden in stories and asked again much later, counted in words.

"... The code of the red box is 4821. ... What is the code of the red box? The code of the red box is 4821."
The digits are random, so only attention to the fact can give them: a model whose reach is shorter fails.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from linearize.errors import InputError

COLOURS = ("red", "blue", "green", "yellow", "pink", "black", "white", "brown", "orange", "purple")
OBJECTS = ("box", "bag", "door", "car", "boat", "house", "book", "hat", "ball", "bottle")
CODE_DIGITS = 4
STATEMENT = "The code of the {thing} is "
QUESTION = "What is the code of the {thing}? "
NEAREST_QUESTION = 4
"""Words between a fact and an extra question, at least (they are drawn log-uniformly from here up)."""

_SENTENCE_END = re.compile(r"(?<=[.!?])(?=\s)|(?<=[.!?][\"'])(?=\s)")


@dataclass(frozen=True, kw_only=True)
class RecallDocument:
    """One document and its last question.

    `text` is the whole document; `prompt` the part of it that ends right before the last answer's digits, with a space;
    `answer` those digits; `distance` the words between the end of the fact and the answer; `answers` the spans
    (start, end), in characters, of every answer in `text`, the last one included.
    """

    text: str
    prompt: str
    answer: str
    distance: int
    answers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Fact:
    thing: str
    code: str
    place: int
    """Number of hay sentences before it."""


def recall_document(
    rng: random.Random,
    stories: Sequence[str],
    *,
    num_words: int,
    num_facts: int = 1,
    distance: int | None = None,
    num_questions: int = 1,
) -> RecallDocument:
    """Hide `num_facts` facts in about `num_words` words of stories and ask `num_questions` times, the last at the end.

    `distance` is the number of story words between the last question and the fact it asks for (None: anywhere);
    sentences stay whole, so read the item's own `distance` for what came out. Facts of one document differ in colour
    and in object. Hay stories should hold no digits of their own. The same `rng` state gives the same document.

    Raises:
        InputError: no words in `stories`, or a number outside its range.
    """
    _check(stories, num_words=num_words, num_facts=num_facts, distance=distance, num_questions=num_questions)
    hay = _hay(rng, stories, num_words)
    words_after = _words_after(hay)
    facts = _facts(rng, num_facts, len(hay))
    if distance is not None:
        place = min(range(len(words_after)), key=lambda place: abs(words_after[place] - distance))
        facts[0] = replace(facts[0], place=place)
    questions = [(len(hay), facts[0])]
    questions += [_extra_question(rng, facts, words_after) for _ in range(num_questions - 1)]
    return _assemble(hay, facts, questions)


def sentences(story: str) -> list[tuple[str, str]]:
    """Cut a story into (separator, sentence) pairs, never inside quoted speech; joined they give the stripped story."""
    pairs: list[tuple[str, str]] = []
    open_quote = False
    for part in _SENTENCE_END.split(story.strip()):
        body = part.lstrip()
        separator = part[: len(part) - len(body)]
        if open_quote:
            pairs[-1] = (pairs[-1][0], pairs[-1][1] + part)
        else:
            pairs.append((separator, body))
        open_quote ^= part.count('"') % 2 == 1
    return pairs


@lru_cache(maxsize=20_000)
def _counted(story: str) -> tuple[tuple[str, str, int], ...]:
    return tuple((separator, body, len(body.split())) for separator, body in sentences(story) if body)


def _hay(rng: random.Random, stories: Sequence[str], num_words: int) -> list[tuple[str, str, int]]:
    """Whole sentences of random stories, at least `num_words` words; a new story starts after a blank line."""
    hay: list[tuple[str, str, int]] = []
    total = 0
    while total < num_words:
        for index, (separator, body, words) in enumerate(_counted(rng.choice(stories))):
            hay.append((separator if index else "\n\n", body, words))
            total += words
            if total >= num_words:
                break
    return hay


def _words_after(hay: Sequence[tuple[str, str, int]]) -> list[int]:
    """For every place 0..len(hay): the story words that follow it."""
    after = [0]
    for _, _, words in reversed(hay):
        after.append(after[-1] + words)
    return after[::-1]


def _facts(rng: random.Random, num_facts: int, num_sentences: int) -> list[_Fact]:
    colours, objects = rng.sample(COLOURS, num_facts), rng.sample(OBJECTS, num_facts)
    codes = rng.sample(range(10**CODE_DIGITS), num_facts)
    return [
        _Fact(f"{colour} {thing}", f"{code:0{CODE_DIGITS}d}", rng.randrange(num_sentences))
        for colour, thing, code in zip(colours, objects, codes, strict=True)
    ]


def _extra_question(rng: random.Random, facts: Sequence[_Fact], words_after: Sequence[int]) -> tuple[int, _Fact]:
    """A fact and the place, between the fact and the end, where it is asked; near places are as likely as far ones."""
    fact = rng.choice(facts)
    words = words_after[fact.place]
    distance = math.exp(rng.uniform(math.log(NEAREST_QUESTION), math.log(max(words, NEAREST_QUESTION))))
    place = bisect_left(words_after, distance - words, key=lambda count: -count)
    return min(place, len(words_after) - 1), fact


def _assemble(
    hay: Sequence[tuple[str, str, int]], facts: Sequence[_Fact], questions: Sequence[tuple[int, _Fact]]
) -> RecallDocument:
    """Write sentences, facts and questions in order; at one place facts come first, the last question last."""
    text = ""
    facts_end: dict[str, int] = {}
    answers: list[tuple[int, int]] = []
    last = questions[0][1]
    ordered = [*sorted(questions[1:], key=lambda question: question[0]), questions[0]]
    for place in range(len(hay) + 1):
        for fact in facts:
            if fact.place == place:
                text += (" " if text else "") + STATEMENT.format(thing=fact.thing) + fact.code + "."
                facts_end[fact.thing] = len(text)
        while ordered and ordered[0][0] == place:
            asked = ordered.pop(0)[1]
            text += (" " if text else "") + (QUESTION + STATEMENT).format(thing=asked.thing) + asked.code
            answers.append((len(text) - CODE_DIGITS, len(text)))
            text += "."
        if place < len(hay):
            separator, sentence, _ = hay[place]
            text += (separator if text else "") + sentence
    prompt = text[: answers[-1][0]]
    words = len(prompt[facts_end[last.thing] :].split())
    return RecallDocument(text=text, prompt=prompt, answer=last.code, distance=words, answers=tuple(answers))


def _check(stories: Sequence[str], *, num_words: int, num_facts: int, distance: int | None, num_questions: int) -> None:
    most = min(len(COLOURS), len(OBJECTS))
    if not any(story.strip() for story in stories):
        raise InputError("recall documents need stories to hide facts in, and none of these holds a word: give some")
    if num_words < 1:
        raise InputError(f"num_words is {num_words}: a recall document needs at least 1 word of stories")
    if not 1 <= num_facts <= most:
        raise InputError(f"num_facts is {num_facts}: allowed are 1 to {most} facts in a document")
    if num_questions < 1:
        raise InputError(f"num_questions is {num_questions}: at least 1 question has to be asked")
    if distance is not None and not 0 <= distance <= num_words:
        raise InputError(f"distance is {distance}: allowed are 0 to num_words = {num_words} words")

"""Questions about facts hidden in long text, counted in tokens: needles, pass keys, many facts in one document.

A question is a prompt that holds its answer somewhere and asks for it at its end. Lengths are met as closely as whole
sentences allow (at the end, one that is too long is left out for a shorter one) and never exceeded; each question
has its own tokens and distance.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, cycle, islice
from typing import Any

from linearize.errors import InputError
from linearize.evaluation.needles import COLOURS, OBJECTS, QUESTION, STATEMENT
from linearize.evaluation.needles import sentences as cut_sentences
from linearize.evaluation.recall import SPARE_TOKENS, answer_tokens, prompt_tokens

NOISE = (
    "The sun was warm.", "The wind was soft.", "The river ran on and on.", "Birds sat in the old tree.",
    "And so the day went by.",
)  # fmt: skip
LONGEST_SENTENCE = 60
"""Words; a longer "sentence" (a list, an unclosed quote) is cut."""

FILLERS = 24
"""Sentences further on that are tried where the next one is too long for the tokens that are left."""

Sentence = tuple[str, str]
"""The separator from the sentence before, and the sentence."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a fact is stated and asked for; `{thing}` and `{answer}` are filled in."""

    statement: str
    question: str
    digits: int = 4
    things: tuple[str, ...] = ("",)


@dataclass(frozen=True, kw_only=True)
class HiddenFact:
    """A prompt that ends right before its answer.

    `group`: the length asked for, in tokens, or the number of facts; `depth`: the share of the text before the
    fact, as asked for; `tokens`: of the prompt; `distance`: tokens from the end of the fact to the end of the prompt.
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
PASS_KEY = Form(
    statement="The pass key is {answer}. Remember it. {answer} is the pass key.",
    question="What is the pass key? The pass key is",
    digits=5,
)
VALUES = Form(
    statement="One code of the {thing} is {answer}.",
    question="What are the codes of the {thing}, in the order of the text? The codes of the {thing} are",
    things=CODE.things,
)
PASS_KEY_TASK = "There is a pass key hidden in this text. Find it and remember it."


class Ruler:
    """Counts tokens; each sentence is tokenised once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._counts: dict[Sentence, int] = {}

    def count(self, sentence: Sentence) -> int:
        """Tokens of a sentence and its separator, counted alone."""
        if sentence not in self._counts:
            ids = self.tokenizer("".join(sentence), add_special_tokens=False, verbose=False)["input_ids"]
            self._counts[sentence] = len(ids)
        return self._counts[sentence]

    def prompt(self, text: str) -> int:
        """Tokens of a prompt, BOS included."""
        return len(prompt_tokens(self.tokenizer, text))


class Hay:
    """Texts to hide facts in, cut into sentences when needed; sentences that state codes of their own are left out.

    Raises InputError for texts without a word.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = [text for text in texts if text.strip()]
        self._sentences: dict[int, list[Sentence]] = {}
        if not any(self._of(i) for i in range(len(self.texts))):
            raise InputError("recall: the texts to hide facts in hold no sentence to use; give prose with --data")

    def draw(self, rng: random.Random, usable: Callable[[str], bool]) -> Iterator[Sentence]:
        """Sentences without end: from anywhere in a random text on, then whole texts in random order."""
        first = True
        while True:
            any_usable = False
            for index in rng.sample(range(len(self.texts)), len(self.texts)):
                sentences = self._of(index)
                start = rng.randrange(len(sentences)) if first and sentences else 0
                for number, (separator, body) in enumerate(sentences[start:]):
                    if usable(body):
                        first, any_usable = False, True
                        yield (separator if number else "\n\n", body)
            if not any_usable:
                raise InputError("recall: every sentence of the hay holds the answer itself; give other texts")

    def _of(self, index: int) -> list[Sentence]:
        if index not in self._sentences:
            sentences = [sentence for pair in cut_sentences(self.texts[index]) for sentence in _cut(*pair)]
            self._sentences[index] = [(gap, body) for gap, body in sentences if body and not _states_code(body)]
        return self._sentences[index]


def needle_question(ruler: Ruler, hay: Hay, rng: random.Random, *, length: int, depth: float) -> HiddenFact:
    """One code in `length` tokens of hay (fact, question and answer included), `depth` of the hay before it."""
    thing, answer = _facts(CODE, rng, 1)[0]
    sentences = hay.draw(rng, lambda body: answer not in body)
    statement = CODE.statement.format(thing=thing, answer=answer)
    return _hidden(ruler, sentences, [(depth, statement)], CODE.question.format(thing=thing), answer, length=length)


def multikey_question(ruler: Ruler, hay: Hay, rng: random.Random, *, length: int, keys: int) -> HiddenFact:
    """`keys` codes of different things anywhere in `length` tokens of hay, one of which is asked for."""
    facts = _facts(CODE, rng, keys)
    sentences = hay.draw(rng, lambda body: not any(answer in body for _, answer in facts))
    statements = [(rng.random(), CODE.statement.format(thing=thing, answer=answer)) for thing, answer in facts]
    thing, answer = facts[0]
    return _hidden(ruler, sentences, statements, CODE.question.format(thing=thing), answer, length=length)


def multivalue_question(ruler: Ruler, hay: Hay, rng: random.Random, *, length: int, values: int) -> HiddenFact:
    """`values` codes of one thing anywhere in `length` tokens of hay, all of which are asked for, in their order.

    Its `distance` is that of the first."""
    facts = _facts(VALUES, rng, values)
    thing, answers = facts[0][0], [answer for _, answer in facts]
    sentences = hay.draw(rng, lambda body: not any(answer in body for answer in answers))
    depths = sorted(rng.random() for _ in answers)
    statements = [
        (depth, VALUES.statement.format(thing=thing, answer=answer))
        for depth, answer in zip(depths, answers, strict=True)
    ]
    question = VALUES.question.format(thing=thing)
    return _hidden(ruler, sentences, statements, question, ", ".join(answers), length=length)


def passkey_question(ruler: Ruler, form: Form, rng: random.Random, *, length: int) -> HiddenFact:
    """A fact (a pass key, say) anywhere in `length` tokens of noise: the same few sentences again and again."""
    thing, answer = _facts(form, rng, 1)[0]
    sentences = cycle([(" ", sentence) for sentence in NOISE])
    before = PASS_KEY_TASK if form == PASS_KEY else ""
    statements = [(rng.random(), form.statement.format(thing=thing, answer=answer))]
    question = form.question.format(thing=thing)
    return _hidden(ruler, sentences, statements, question, answer, length=length, before=before)


def association_questions(
    ruler: Ruler, hay: Hay, rng: random.Random, *, keys: int, queries: int, hay_tokens: int
) -> list[HiddenFact]:
    """`keys` codes anywhere in about `hay_tokens` tokens of hay, `queries` of them asked one after the other.

    Each query is a question of its own; the earlier ones are answered before it. `keys`: at most `len(CODE.things)`.
    """
    facts = _facts(CODE, rng, keys)
    answers = [answer for _, answer in facts]
    sentences = _first(ruler, hay.draw(rng, lambda body: not any(a in body for a in answers)), hay_tokens)
    places = [rng.randrange(len(sentences) + 1) for _ in facts]
    text, ends = "", {}
    for place in range(len(sentences) + 1):
        for (thing, answer), at in zip(facts, places, strict=True):
            if at == place:
                text = _joined(text, " ", CODE.statement.format(thing=thing, answer=answer))
                ends[thing] = text
        text = _joined(text, *sentences[place]) if place < len(sentences) else text
    questions = []
    for thing, answer in rng.sample(facts, min(queries, keys)):
        text = _joined(text, " ", CODE.question.format(thing=thing))
        tokens = ruler.prompt(text)
        distance = tokens - ruler.prompt(ends[thing])
        questions.append(HiddenFact(prompt=text, answer=answer, group=keys, tokens=tokens, distance=distance))
        text = f"{text} {answer}."
    return questions


def _hidden(
    ruler: Ruler, source: Iterator[Sentence], statements: Sequence[tuple[float, str]], question: str, answer: str,
    *, length: int, before: str = "",
) -> HiddenFact:  # fmt: skip
    """As many sentences as fit, each statement between the two nearest to its depth, the question at the end; distance
    and depth are those of the first statement."""
    limit = length - SPARE_TOKENS - len(answer_tokens(ruler.tokenizer, question, answer))

    def written(hay: Sequence[Sentence]) -> tuple[str, str]:
        counts = [ruler.count(sentence) for sentence in hay]
        text, done, with_fact = before, 0, ""
        for number in sorted(range(len(statements)), key=lambda number: statements[number][0]):
            place = _border(counts, statements[number][0])
            text = _joined(_text(text, hay[done:place]), " ", statements[number][1])
            done, with_fact = place, text if number == 0 else with_fact
        return with_fact, _joined(_text(text, hay[done:]), " ", question)

    def tokens(hay: Sequence[Sentence]) -> int:
        return ruler.prompt(written(hay)[1])

    sentences = _first(ruler, source, limit)
    totals = list(accumulate(map(ruler.count, sentences), initial=tokens([])))
    number = max(0, bisect_right(totals, limit) - 1)
    while number < len(sentences) and tokens(sentences[: number + 1]) <= limit:
        number += 1
    while number and tokens(sentences[:number]) > limit:
        number -= 1
    hay, size = sentences[:number], tokens(sentences[:number])
    if size > limit:
        raise InputError(
            f"recall: {length} tokens are too few: the fact and its question alone take {size + length - limit}; "
            "give greater lengths"
        )
    for sentence in chain(sentences[number + 1 :], islice(source, FILLERS)):
        if ruler.count(sentence) <= limit - size and (longer := tokens([*hay, sentence])) <= limit:
            hay, size = [*hay, sentence], longer
    with_fact, prompt = written(hay)
    distance = size - ruler.prompt(with_fact)
    depth = statements[0][0]
    return HiddenFact(prompt=prompt, answer=answer, group=length, depth=depth, tokens=size, distance=distance)


def _first(ruler: Ruler, source: Iterator[Sentence], num_tokens: int) -> list[Sentence]:
    """Sentences of at least `num_tokens` tokens together, as counted one by one and as counted in one text."""
    sentences: list[Sentence] = []
    counted = 0
    while counted < num_tokens:
        while counted < num_tokens:
            sentences += islice(source, 1)
            counted += ruler.count(sentences[-1])
        counted = ruler.prompt(_text("", sentences))
    return sentences


def _border(counts: Sequence[int], depth: float) -> int:
    """The number of sentences before the fact whose tokens come nearest to the share `depth` of all."""
    before = [0, *accumulate(counts)]
    return min(range(len(before)), key=lambda n: abs(before[n] - depth * before[-1]))


def _text(before: str, sentences: Sequence[Sentence]) -> str:
    for separator, body in sentences:
        before = _joined(before, separator, body)
    return before


def _joined(text: str, separator: str, more: str) -> str:
    return text.rstrip() + (separator or " ") + more if text else more


def _facts(form: Form, rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Things, all different, and their answers, all different.

    Up to ten coloured things differ in colour and in object; more of them must share one or the other.
    """
    if form.things == CODE.things and count <= min(len(COLOURS), len(OBJECTS)):
        pairs = zip(rng.sample(COLOURS, count), rng.sample(OBJECTS, count), strict=True)
        things = [f"{colour} {thing}" for colour, thing in pairs]
    else:
        things = rng.sample(form.things, count)
    codes = rng.sample(range(10**form.digits), count)
    return [(thing, f"{code:0{form.digits}d}") for thing, code in zip(things, codes, strict=True)]


def _states_code(sentence: str) -> bool:
    return STATEMENT.partition(" {")[0].lower() in " ".join(sentence.lower().split())


def _cut(separator: str, body: str) -> Iterator[Sentence]:
    words = body.split()
    if len(words) <= LONGEST_SENTENCE:
        yield separator, body
        return
    for start in range(0, len(words), LONGEST_SENTENCE):
        yield (" " if start else separator), " ".join(words[start : start + LONGEST_SENTENCE])

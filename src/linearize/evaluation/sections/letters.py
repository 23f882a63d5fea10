"""Multiple choice by letter, each question in every order of its options: what a score of letters is worth.

A model that answers the same letter whatever stands behind it scores as if it guessed once the options are turned
around, and far better or worse in one order of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from linearize.decoding.loading import pad_token
from linearize.errors import InputError
from linearize.evaluation.context import (
    Cell,
    EvalContext,
    Finding,
    Numbers,
    Section,
    SectionView,
    Stat,
    Table,
    TooLittleTextError,
)
from linearize.evaluation.numbers import DifferenceNumbers, NumbersModel, Role, ShareNumbers
from linearize.evaluation.sections.cloze.items import ClozeItem, cut_items
from linearize.modeling.forward_call import positions_to_keep
from linearize.training.data.pseudo_labels import left_padded

LETTERS = "ABCDEFGH"
QUESTION, ANSWER = "Which word comes next?", "Answer:"
FEWEST = 8
BOUND = 0.5  # share of questions with one letter in every order from which on letters say little


class ModelLetters(NumbersModel):
    """`right`: mean share of right letters over questions and orders; `always`: questions right in every order;
    `same_letter`: questions answered by one letter in every order; `same_word`: by one word. `drop`: of a student with
    a teacher, teacher less student, paired by question."""

    role: Role
    right: float
    always: ShareNumbers
    same_letter: ShareNumbers
    same_word: ShareNumbers
    drop: DifferenceNumbers | None = None


class LettersNumbers(NumbersModel):
    """`items`: questions; `choices`: options of each, and orders in which it is asked."""

    items: int
    choices: int
    models: dict[str, ModelLetters]


class Letters(Section):
    """Last words of sentences as multiple choice by letter, each question once for every rotation of its options.

    `items`: questions, at most; `choices`: options; `max_words`: of the text before the word.
    """

    NAME: ClassVar[str] = "letters"
    TITLE: ClassVar[str] = "Letters of multiple choice"

    items: int = Field(default=64, ge=FEWEST)
    choices: int = Field(default=4, ge=2, le=len(LETTERS))
    max_words: int = Field(default=64, ge=1)

    def check(self, ctx: EvalContext) -> None:
        """Raises InputError for too little text, or a tokenizer without a token for each letter."""
        if (items := len(self._cut(ctx))) < FEWEST:
            raise TooLittleTextError(
                f"letters: {items} questions in the text, at least {FEWEST} are needed; give more text"
            )
        letter_tokens(ctx.tokenizer, self.choices)

    def run(self, ctx: EvalContext) -> Numbers:
        """Every model answers every question in every order."""
        items = self._cut(ctx)
        digest = hashlib.sha256(repr([(item.context, item.choices) for item in items]).encode()).hexdigest()
        chosen: dict[str, list[list[int]]] = {}
        for one in ctx.models:
            key = {
                "section": self.NAME,
                "model": one.fingerprint,
                "name": one.name,
                "items": digest,
                "batch": ctx.batch,
            }
            measure = partial(choose_letters, one.model, one.tokenizer, items, batch=ctx.batch)
            chosen[one.name] = ctx.results.result(key, measure)
            ctx.progress(f"letters: {one.name}", len(items), len(items))
        teacher = chosen[ctx.teacher.name] if ctx.teacher else None
        models = {one.name: letter_numbers(one.role, chosen[one.name], teacher) for one in ctx.models}
        return LettersNumbers(items=len(items), choices=self.choices, models=models).to_json()

    @classmethod
    def present(cls, numbers: Numbers) -> SectionView:
        return present(LettersNumbers.model_validate(numbers))

    @classmethod
    def headline(cls, numbers: Numbers) -> Mapping[str, Sequence[Stat]]:
        return {}

    def _cut(self, ctx: EvalContext) -> list[ClozeItem]:
        longest = min([ctx.length, *filter(None, (m.context for m in ctx.models))])
        return cut_items(
            ctx.texts, ctx.tokenizer, items=self.items, choices=self.choices, min_words=min(8, self.max_words),
            max_words=self.max_words, max_tokens=longest // 2, seed=ctx.seed,
        )  # fmt: skip


def question(item: ClozeItem, turn: int) -> str:
    """The prompt with the options turned by `turn` places: the right one is at letter `-turn` (modulo their number)."""
    options = item.choices[turn:] + item.choices[:turn]
    lines = [f"{letter}. {word}" for letter, word in zip(LETTERS, options, strict=False)]
    return "\n".join([f"{item.context} ...", "", QUESTION, *lines, ANSWER])


def letter_tokens(tokenizer: PreTrainedTokenizerBase, choices: int) -> list[int]:
    """The token of each letter behind `ANSWER`.

    Raises:
        InputError: a tokenizer that writes two letters by one token, or a letter by several.
    """
    before = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    ids = [tokenizer(f"{ANSWER} {letter}", add_special_tokens=False)["input_ids"] for letter in LETTERS[:choices]]
    last = [one[-1] for one in ids]
    if len(set(last)) < choices or any(len(one) > len(before) + 2 for one in ids):
        raise InputError("letters: this tokenizer has no token of its own for each letter; leave the section out")
    return last


@torch.inference_mode()
def choose_letters(
    model: Any, tokenizer: PreTrainedTokenizerBase, items: Sequence[ClozeItem], *, batch: int
) -> list[list[int]]:
    """For each question and each turn of its options the letter with the largest probability, counted from 0."""
    choices = len(items[0].choices)
    letters = torch.tensor(letter_tokens(tokenizer, choices), device=model.device)
    spaced = f"{ANSWER} A"
    joined = len(tokenizer(spaced, add_special_tokens=False)["input_ids"])
    apart = joined == len(tokenizer(ANSWER, add_special_tokens=False)["input_ids"]) + 2  # the space is its own token
    prompts = [
        tokenizer(question(item, turn) + (" " if apart else ""), verbose=False)["input_ids"]
        for item in items
        for turn in range(choices)
    ]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [0] * len(prompts)
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        ids, mask = left_padded([prompts[index] for index in some], pad_token(tokenizer), model.device)
        logits = model(
            input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=positions_to_keep(1, ids)
        ).logits[:, -1]
        for index, letter in zip(some, logits[:, letters].argmax(-1).tolist(), strict=True):
            answers[index] = letter
    return [answers[start : start + choices] for start in range(0, len(answers), choices)]


def letter_numbers(
    role: Role, chosen: Sequence[Sequence[int]], teacher: Sequence[Sequence[int]] | None
) -> ModelLetters:
    """Count a model's letters, by question and turn; a student's also against its teacher's."""
    words = [[(letter + turn) % len(letters) for turn, letter in enumerate(letters)] for letters in chosen]
    right = [_right(letters) for letters in chosen]
    drop = None
    if teacher is not None and role == "student":
        drop = DifferenceNumbers.of([_right(letters) for letters in teacher], right)
    return ModelLetters(
        role=role,
        right=sum(right) / len(right),
        always=ShareNumbers.of(share == 1 for share in right),
        same_letter=ShareNumbers.of(len(set(letters)) == 1 for letters in chosen),
        same_word=ShareNumbers.of(len(set(own)) == 1 for own in words),
        drop=drop,
    )


def _right(letters: Sequence[int]) -> float:
    return sum((letter + turn) % len(letters) == 0 for turn, letter in enumerate(letters)) / len(letters)


def present(numbers: LettersNumbers) -> SectionView:
    """The section as people read it."""
    findings, rows = [], list[dict[str, Cell]]()
    for name, model in numbers.models.items():
        row: dict[str, Cell] = {"model": name, "right letters": f"{model.right:.1%}", "right in every order": ""}
        row["right in every order"] = model.always.text
        row |= {"same letter": model.same_letter.text, "same word": model.same_word.text}
        if any(one.drop for one in numbers.models.values()):
            row["lost"] = model.drop.text if model.drop else ""
        rows.append(row)
        if model.same_letter.value >= BOUND:
            text = (
                f"it answers {model.same_letter.count} questions by one letter whatever stands behind it: scores of "
                "letters say little about it."
            )
            findings.append(Finding.on(name, model.role, "note", text))
    note = (
        f"Each question is asked {numbers.choices} times, its options turned by one place each time, so that every "
        f"letter is right once; chance is {1 / numbers.choices:.0%}. Same letter, same word: questions answered by one "
        "letter, or by one word, in every order. Lost: teacher less student on the same questions."
    )
    orders = f"answered by letter in {numbers.choices} orders"
    summary = f"The last word of {numbers.items} sentences as multiple choice, {orders}."
    return SectionView(summary=summary, findings=findings, tables=[Table(title="Letters", rows=rows, note=note)])

"""Multiple choice by letter: models that answer by letter, by word, or at random are told apart."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from test_cloze import TEXTS, context_of, cut
from torch import Tensor

from linearize.errors import InputError
from linearize.evaluation.sections.letters import (
    LETTERS,
    QUESTION,
    Letters,
    choose_letters,
    letter_numbers,
    letter_tokens,
    question,
)

TOKENIZER = byte_tokenizer()


class Answerer(torch.nn.Module):
    """Answers one letter, or the letter of a word that it knows to be right, by reading the prompt."""

    device = torch.device("cpu")
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=4096))

    def __init__(self, letter: str | None = None, words: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.letter, self.words = letter, words

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            text = TOKENIZER.decode(ids[mask.bool()])
            options = [line for line in text.split(f"{QUESTION}\n")[-1].splitlines()[:-1] if line]
            known = [line[0] for line in options if line[3:] in self.words]
            letter = self.letter or (known or ["A"])[0]
            rows.append(
                torch.nn.functional.one_hot(torch.tensor(letter_tokens(TOKENIZER, 8)[LETTERS.index(letter)]), 400)
            )
        return SimpleNamespace(logits=torch.stack(rows)[:, None].float())


def test_every_option_stands_at_every_letter_once() -> None:
    (item, *_) = cut(choices=3)
    prompts = [question(item, turn) for turn in range(3)]
    assert len(set(prompts)) == 3
    for turn, prompt in enumerate(prompts):
        lines = prompt.splitlines()
        assert lines[0].startswith(item.context) and lines[-1] == "Answer:"
        options = [line[3:] for line in lines if line[1:3] == ". "]
        assert sorted(options) == sorted(item.choices) and options.index(item.word) == -turn % 3


def test_answers_by_letter_and_by_word_are_counted_apart() -> None:
    items = cut(choices=3)
    fixed = choose_letters(Answerer("B"), TOKENIZER, items, batch=4)
    assert fixed == [[1, 1, 1]] * len(items)
    numbers = letter_numbers("teacher", fixed, None)
    assert numbers.right == pytest.approx(1 / 3) and numbers.same_letter.value == 1 and numbers.always.value == 0
    knowing = choose_letters(Answerer(words=(items[0].word,)), TOKENIZER, items[:1], batch=2)
    assert knowing == [[0, 2, 1]]
    own = letter_numbers("student", knowing * 4, fixed[:4])
    assert own.right == 1 and own.always.value == own.same_word.value == 1 and own.same_letter.value == 0
    assert own.drop is not None and own.drop.value == pytest.approx(-2 / 3)


def test_the_section_counts_and_says_what_letters_are_worth() -> None:
    section = Letters(items=9, choices=3, max_words=11)
    chosen = context_of({"teacher": Answerer("C"), "student": Answerer("A")}, length=400)
    section.check(chosen)
    numbers = json.loads(json.dumps(section.run(chosen)))
    shares = {name: (m["right"], m["same_letter"]["value"]) for name, m in numbers["models"].items()}
    assert shares == {"teacher": (pytest.approx(1 / 3), 1), "student": (pytest.approx(1 / 3), 1)}
    view = Letters.present(numbers)
    assert [finding.level for finding in view.findings] == ["note", "note"]
    assert [row["same letter"] for row in view.tables[0].rows] == ["100.0% (70.1 to 100.0)"] * 2
    with pytest.raises(InputError, match="questions in the text"):
        section.check(context_of({"teacher": Answerer("C")}, texts=TEXTS[:1], length=400))

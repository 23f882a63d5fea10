"""Recall documents: what is hidden, what is asked, and how far apart."""

from __future__ import annotations

import random
import re

import pytest

from linearize.errors import InputError
from linearize.evaluation.needles import CODE_DIGITS, RecallDocument, recall_document, sentences

STORIES = [
    'Tom had a red box. "Look! It is new. I like it," he said. He ran home.\nHis mom smiled! Was it late? Yes, it was.',
    "One day a bird sang. It sang all day long. The sun was hot and the bird was happy.\n\nThen it rained. The end.",
    "Lily found a blue hat in the park. She gave it to the dog. The dog wore it and everyone laughed very loudly.",
]
FACT = re.compile(r"The code of the (\w+ \w+) is (\d+)\.")


def _document(seed: int = 5, **settings: int) -> RecallDocument:
    return recall_document(random.Random(seed), STORIES, **{"num_words": 150, **settings})


@pytest.mark.parametrize("num_facts", [1, 3, 10])
@pytest.mark.parametrize("num_questions", [1, 7])
@pytest.mark.parametrize("seed", range(9))
def test_every_answer_is_the_code_stated_earlier(num_facts: int, num_questions: int, seed: int) -> None:
    item = _document(seed, num_facts=num_facts, num_questions=num_questions)
    stated: dict[str, str] = {}
    for thing, code in FACT.findall(item.text):
        assert stated.setdefault(thing, code) == code
    assert len(stated) == num_facts
    assert len(set(stated.values())) == num_facts
    assert len({thing.split()[0] for thing in stated}) == len({thing.split()[1] for thing in stated}) == num_facts
    assert len(item.answers) == num_questions == item.text.count("What is the code")
    for start, end in item.answers:
        asked = re.search(r"What is the code of the (\w+ \w+)\? The code of the \1 is $", item.text[:start])
        assert asked is not None
        assert item.text[start:end] == stated[asked[1]]
        assert f"The code of the {asked[1]} is {stated[asked[1]]}." in item.text[: asked.start()]


def test_prompt_ends_right_before_the_digits_of_the_last_question() -> None:
    item = _document(num_facts=3, num_questions=4)
    assert item.prompt.endswith(" is ")
    assert item.text == item.prompt + item.answer + "."
    assert re.fullmatch(rf"\d{{{CODE_DIGITS}}}", item.answer)
    assert item.answers[-1] == (len(item.prompt), len(item.prompt) + CODE_DIGITS)


@pytest.mark.parametrize("distance", [0, 37, 90, 149])
def test_distance_is_the_words_between_the_fact_and_the_answer(distance: int) -> None:
    item = _document(7, distance=distance)
    fact_end = item.text.index(f"{item.answer}.") + CODE_DIGITS + 1
    assert item.distance == len(item.prompt[fact_end:].split())
    asking = "What is the code of the red box? The code of the red box is".count(" ") + 1
    assert abs(item.distance - asking - distance) <= 6, "half of the longest sentence"


def test_hay_is_whole_stories_text_in_order() -> None:
    item = _document(3, num_facts=2, num_questions=3)
    question = r"(?: |^)What is the code of the \w+ \w+\? The code of the \w+ \w+ is \d{4}\."
    hay = re.sub(r"(?: |^)The code of the \w+ \w+ is \d{4}\.", "", re.sub(question, "", item.text))
    paragraphs = hay.split("\n\n")
    whole = [part for story in STORIES for part in story.split("\n\n")]
    assert 150 <= len(hay.split()) < 150 + 12
    assert len(paragraphs) > 3
    assert all(paragraph.strip() in whole for paragraph in paragraphs[:-1])
    assert any(part.startswith(paragraphs[-1].strip()) for part in whole)


def test_sentences_rejoin_and_never_open_inside_speech() -> None:
    for story in STORIES:
        pairs = sentences(f"\n {story} ")
        assert "".join(separator + body for separator, body in pairs) == story
        assert all(body.count('"') % 2 == 0 for _, body in pairs)
    assert [body for _, body in sentences(STORIES[0])][1] == '"Look! It is new. I like it," he said.'
    assert sentences(STORIES[1])[3] == ("\n\n", "Then it rained.")


def test_the_seed_decides() -> None:
    assert _document(11, num_facts=2) == _document(11, num_facts=2)
    assert _document(11, num_facts=2) != _document(12, num_facts=2)


def test_codes_keep_their_leading_zeros() -> None:
    answers = [_document(seed, num_words=5).answer for seed in range(200)]
    assert all(len(answer) == CODE_DIGITS for answer in answers)
    assert any(answer.startswith("0") for answer in answers)
    assert len(set(answers)) > 190


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_words": 0}, "num_words is 0"),
        ({"num_facts": 0}, "allowed are 1 to 10"),
        ({"num_facts": 11}, "num_facts is 11"),
        ({"num_questions": 0}, "at least 1 question"),
        ({"distance": 151}, "0 to num_words = 150"),
        ({"distance": -1}, "distance is -1"),
    ],
)
def test_numbers_outside_their_range_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        _document(**settings)


@pytest.mark.parametrize("stories", [[], ["", " \n"]])
def test_empty_hay_is_refused(stories: list[str]) -> None:
    with pytest.raises(InputError, match="need stories"):
        recall_document(random.Random(1), stories, num_words=9)


def test_a_blank_story_among_others_does_no_harm() -> None:
    item = recall_document(random.Random(2), ["  ", *STORIES], num_words=60)
    assert item.text == item.text.strip()
    assert len(item.text.split()) > 60

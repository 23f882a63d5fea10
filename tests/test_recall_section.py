"""The recall section: what is hidden where, who answers it, and what is said of it.

One token is one character here, so that every length and distance can be counted by hand.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from models import mixer, student_of, tiny
from torch import Tensor

import linearize.demo
from linearize.decoding.loading import load_any
from linearize.errors import InputError
from linearize.evaluation.context import EvalContext, EvalModel, Numbers
from linearize.evaluation.haystack import NOISE, Hay, Ruler, association_questions
from linearize.evaluation.numbers import ResultCache
from linearize.evaluation.recall import Generated, answer_greedily, full_forward
from linearize.evaluation.sections.recall import Recall
from linearize.metrics.intervals import wilson
from linearize.metrics.theme import styled
from linearize.modeling.cache import MixerCacheLayer

TOKENIZER = byte_tokenizer()
STORIES = [
    "Tom had a red box. He put it under the old tree near the river, and then he ran home to eat.\n\nIt was late.",
    "The code of the red hat is 1111. A bird sang all day long! The sun was hot. Was it happy? Yes, it was.",
    'Lily found a hat in the park. "It is mine," said the dog. They laughed.\nThen they all went home to sleep well.',
]
FACT = re.compile(r"The code of the (\w+ \w+) is (\d{4})\.")
SMALL = {"lengths": (260, 410), "depths": (0.1, 0.6, 1.0), "items": 3, "keys": (1, 3, 12), "passkey": "needle",
         "needles": 0, "values": 0}  # fmt: skip


class Reader(torch.nn.Module):
    """Answers from the last `reach` characters only; the cache and the full forward can be made to differ."""

    def __init__(self, reach: int, *, cached_reach: int | None = None, plan: Any = None) -> None:
        super().__init__()
        self.reach, self.cached_reach = reach, reach if cached_reach is None else cached_reach
        config = student_of(tiny(), plan).config if plan else SimpleNamespace(max_position_embeddings=300)
        self.config = config if plan else SimpleNamespace(get_text_config=lambda: config)
        self.device, self.dtype, self.calls = torch.device("cpu"), torch.float32, 0

    def next_character(self, text: str, reach: int) -> str:
        asked = re.search(r"The code of the (\w+ \w+) is( ?\d*)$", text)
        if asked is None:
            return "."
        known = dict(FACT.findall(text[-reach:]))
        return f" {known.get(asked[1], 'what')}."[len(asked[2])]

    def generate(self, *, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, **_: Any) -> Tensor:
        self.calls += 1
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            text = TOKENIZER.decode(ids[mask.bool()])
            for _ in range(max_new_tokens):
                text += self.next_character(text, self.cached_reach + len(text) - int(mask.sum()))
            rows.append([*ids.tolist(), *TOKENIZER(text[-max_new_tokens:])["input_ids"]])
        return torch.tensor(rows)

    def forward(self, input_ids: Tensor, use_cache: bool, logits_to_keep: int) -> Any:
        assert not use_cache and input_ids.shape[0] == 1
        text, start = TOKENIZER.decode(input_ids[0]), input_ids.shape[1] - logits_to_keep + 1
        best = [self.next_character(text[:end], self.reach + end - start) for end in range(start, len(text) + 1)]
        ids = TOKENIZER("".join(best))["input_ids"]
        return SimpleNamespace(logits=9 * torch.nn.functional.one_hot(torch.tensor([ids]), len(TOKENIZER)).float())


def eval_context(*models: Any, **changes: Any) -> EvalContext:
    names = ["teacher", "student", "other", "third"]
    eval_models = [
        EvalModel(name=n, role="student" if i else "teacher", path=n, model=m, tokenizer=TOKENIZER, fingerprint=n)
        for i, (n, m) in enumerate(zip(names, models, strict=False))
    ]
    return EvalContext(**{"models": tuple(eval_models), "texts": STORIES, "batch": 5, "seed": 3, **changes})


def measured(*models: Any, **changes: Any) -> Numbers:
    section = Recall(**{**SMALL, **changes})
    chosen = eval_context(*models)
    section.check(chosen)
    numbers: Numbers = json.loads(json.dumps(section.run(chosen)))
    return numbers


def back(prompt: str, answer: str) -> int:
    """Characters from the end of the fact to the end of the prompt."""
    return len(prompt) - prompt.rindex(f"is {answer}.") - len(f"is {answer}.")


def test_needles_stand_at_their_depth_in_texts_of_their_length() -> None:
    questions = Recall(**SMALL).questions(eval_context(Reader(9)))["needle"]
    assert len(questions) == 2 * 3 * 3
    for question in questions:
        assert question.group - 40 < question.tokens + len(" 1234") + 2 <= question.group
        assert question.tokens == len(question.prompt)
        assert question.distance == back(question.prompt, question.answer)
        ((thing, code),) = FACT.findall(question.prompt)
        assert code == question.answer and question.prompt.count(code) == 1
        asked = f"What is the code of the {thing}? The code of the {thing} is"
        assert question.prompt.endswith(asked)
        fact = f"The code of the {thing} is {code}."
        hay = question.prompt.removesuffix(asked).rstrip()
        before = hay.index(fact)
        assert abs(before - question.depth * (len(hay) - len(fact))) < 50, "half of the longest sentence"
        assert "1111" not in question.prompt, "another fact of the same form"
    assert {q.depth for q in questions} == {0.1, 0.6, 1.0}


def test_several_needles_and_several_codes_of_one_thing() -> None:
    several = {"lengths": (260, 460), "needles": 3, "values": 2, "items": 4}
    questions = Recall(**SMALL | several).questions(eval_context(Reader(9)))
    assert [q.group for q in questions["multikey"]] == [460] * 4  # 260 characters have no space for three
    assert [q.group for q in questions["multivalue"]] == [260] * 4 + [460] * 4
    places = []
    for question in questions["multikey"]:
        facts = FACT.findall(question.prompt)
        assert len(facts) == 3 == len({code for _, code in facts})
        asked = re.findall(r"The code of the (\w+ \w+) is$", question.prompt)[0]
        assert dict(facts)[asked] == question.answer
        assert question.distance == back(question.prompt, question.answer)
        assert question.tokens <= question.group
        places.append([thing for thing, _ in facts].index(asked))
    assert len(set(places)) > 1
    for question in questions["multivalue"]:
        facts = re.findall(r"One code of the (\w+ \w+) is (\d{4})\.", question.prompt)
        assert len(facts) == 2 and len({thing for thing, _ in facts}) == 1
        assert question.answer == ", ".join(code for _, code in facts)
        assert question.distance == back(question.prompt, facts[0][1])
    numbers = measured(Reader(10**6), Reader(9), **several)
    read = {name: model["multikey"]["successes"] for name, model in numbers["models"].items()}
    assert read == {"teacher": 4, "student": 0}
    shown = Recall.present(numbers)
    titles = [table.title for table in shown.tables]
    assert "One of several needles by length" in titles and "All codes of one thing by length" in titles
    assert {plot.name for plot in shown.plots} >= {"recall_multikey", "recall_multivalue"}
    with pytest.raises(InputError, match="at most 10"):
        Recall(needles=11).check(eval_context(Reader(9)))


def test_pass_keys_hide_in_noise_alone() -> None:
    for question in Recall(**SMALL | {"passkey": "passkey", "lengths": (399, 500)}).questions(eval_context(Reader(9)))[
        "passkey"
    ]:
        text = question.prompt
        fact = f"The pass key is {question.answer}. Remember it. {question.answer} is the pass key."
        assert text.count(fact) == 1 and text.count(NOISE[0]) > 1
        for part in (*NOISE, fact):
            text = text.replace(part, "")
        assert re.fullmatch(r"There is a pass key .* What is the pass key\? The pass key is", re.sub(r"\s+", " ", text))
        assert len(question.prompt) == question.tokens <= question.group
        assert question.distance == len(question.prompt.rpartition(f"{question.answer} is the pass key.")[2])


def test_queries_follow_each_other_and_the_earlier_ones_stand_answered() -> None:
    asked = association_questions(Ruler(TOKENIZER), Hay(STORIES), random.Random(4), keys=7, queries=4, hay_tokens=300)
    assert len(asked) == 4
    document = asked[0].prompt[: asked[0].prompt.index(" What is the code")]
    facts = dict(FACT.findall(document))
    assert len(facts) == len(set(facts.values())) == 7
    assert 300 < len(document) < 300 + 7 * 45 + 90
    for number, question in enumerate(asked):
        assert question.group == 7 and question.prompt.startswith(document)
        thing = re.search(r"The code of the (\w+ \w+) is$", question.prompt)
        assert thing is not None and facts[thing[1]] == question.answer
        assert question.distance == len(question.prompt) - document.index(f"{question.answer}.") - 5
        if number:
            assert question.prompt.startswith(f"{asked[number - 1].prompt} {asked[number - 1].answer}. What is")
    assert len({question.answer for question in asked}) == 4


def test_the_seed_decides_and_other_cells_change_nothing() -> None:
    few = Recall(**SMALL | {"lengths": (410,), "depths": (0.6,)}).questions(eval_context(Reader(9)))
    many = Recall(**SMALL).questions(eval_context(Reader(9)))
    assert few["needle"] == [q for q in many["needle"] if q.group == 410 and q.depth == 0.6]
    assert many["keys"] == Recall(**SMALL).questions(eval_context(Reader(9)))["keys"]
    other = Recall(**SMALL).questions(eval_context(Reader(9), seed=4))
    assert all(a.prompt != b.prompt for test in many for a, b in zip(many[test], other[test], strict=True))


def test_numbers_count_what_each_reader_can_see() -> None:
    numbers = measured(Reader(10_000), Reader(250))
    questions = Recall(**SMALL).questions(eval_context(Reader(9)))
    teacher, student = numbers["models"]["teacher"], numbers["models"]["student"]
    for test, items in questions.items():
        sees = [len(f"The code of the {_thing(q.prompt)} is 1234.") + q.distance <= 250 for q in items]
        assert 0 < sum(sees) < len(sees), "both kinds must occur"
        assert teacher[test]["successes"] == len(items)
        assert student[test]["successes"] == sum(sees) == student[test]["full_forward"]["successes"]
        assert (student[test]["low"], student[test]["high"]) == pytest.approx(wilson(sum(sees), len(sees)))
        assert student[test]["against_teacher"]["all"]["kept"]["successes"] == sum(sees)
        assert sum(cell["successes"] for cell in student[test]["cells"]) == sum(sees)
        answered = [text.startswith(f" {q.answer}.") for text, q in zip(student[test]["answers"], items, strict=True)]
        assert answered == sees
    assert [cell["n"] for cell in student["needle"]["cells"]] == [3] * 6
    assert [(cell["keys"], cell["n"], cell["chance"]) for cell in student["keys"]["cells"]] == [
        (1, 9, 1), (3, 9, 1 / 3), (12, 9, 1 / 12)
    ]  # fmt: skip
    assert [cell["beyond_context"] for cell in student["passkey"]["cells"]] == [False, True]
    assert student["cache"] == {"items": 18 + 18 + 27, "differ": 0, "ties": 0}


def _thing(prompt: str) -> str:
    return re.findall(r"The code of the (\w+ \w+) is$", prompt)[0]


def test_only_facts_beyond_the_window_count_where_there_is_one() -> None:
    plan = mixer("lolcats", window=101, window_shape="sliding")
    numbers = measured(Reader(10_000), Reader(102, plan=plan))["models"]["student"]
    assert numbers["window_reach"] in (101, 102)
    items = Recall(**SMALL).questions(eval_context(Reader(9)))["needle"]
    beyond = [q for q in items if q.distance >= numbers["window_reach"]]
    assert 0 < len(beyond) < len(items)
    against = numbers["needle"]["against_teacher"]
    assert against["beyond_window"]["student"] == {"n": len(beyond), "successes": 0} | {
        key: against["beyond_window"]["student"][key] for key in ("value", "low", "high")
    }
    assert against["all"]["student"]["successes"] > 0


def _levels(numbers: Numbers, title: str) -> list[str]:
    return [f.level for f in Recall.present(numbers).findings if title in f.text]


def test_findings_say_what_the_numbers_allow() -> None:
    plan = mixer("lolcats", window=64, window_shape="sliding")
    sighted = Reader(10_000)
    numbers = measured(sighted, Reader(60, plan=plan), sighted, Reader(260))
    assert _levels(numbers, "needle") == ["bad", "good", "note"]
    bad = next(f for f in Recall.present(numbers).findings if f.level == "bad")
    assert bad.student == "student" and "0 of" in bad.text and "beyond the window" in bad.text
    stats = Recall.headline(numbers)
    assert stats["student"][0].value == "0%" and stats["other"][0].value == "100%" and "teacher" not in stats
    blind = measured(Reader(3), sighted)
    assert _levels(blind, "says nothing") == ["note"] * 3
    assert not [f for f in Recall.present(blind).findings if "kept" in f.text]
    assert Recall.headline(blind)["student"][0].value == "-"


def test_lengths_that_the_teacher_cannot_do_do_not_count() -> None:
    numbers = measured(Reader(300), Reader(300), lengths=(260, 900), depths=(0.0,), items=5)
    against = numbers["models"]["student"]["needle"]["against_teacher"]
    assert against["groups"] == [260] and against["all"]["kept"]["n"] == 5
    (text,) = (f.text for f in Recall.present(numbers).findings if "needle" in f.text)
    assert "counted at lengths 260" in text


def test_kept_is_a_share_of_what_the_teacher_answers() -> None:
    models = measured(Reader(280), Reader(150), lengths=(410,), depths=(0.1, 0.6, 1.0))["models"]
    teacher, against = models["teacher"]["needle"], models["student"]["needle"]["against_teacher"]
    assert (teacher["successes"], teacher["n"], models["student"]["needle"]["successes"]) == (6, 9, 3)
    assert (against["all"]["kept"]["successes"], against["all"]["kept"]["n"]) == (3, 6)


def test_a_cache_that_reads_otherwise_than_the_full_forward_is_found() -> None:
    numbers = measured(Reader(10_000, cached_reach=150), Reader(10_000))
    teacher = numbers["models"]["teacher"]
    wrong = sum(teacher[test]["n"] - teacher[test]["successes"] for test in ("needle", "passkey", "keys"))
    assert 0 < wrong == teacher["cache"]["differ"]
    assert teacher["needle"]["full_forward"]["value"] == 1
    cache = [(f.level, f.student) for f in Recall.present(numbers).findings if "full forward" in f.text]
    assert cache == [("bad", None), ("good", "student")]


def test_near_ties_are_no_fault() -> None:
    class Tied(Reader):
        gap = 1e-5

        def forward(self, input_ids: Tensor, use_cache: bool, logits_to_keep: int) -> Any:
            logits = super().forward(input_ids, use_cache, logits_to_keep).logits
            logits[..., TOKENIZER("x")["input_ids"][0]] = 9 + self.gap
            return SimpleNamespace(logits=logits)

    item = Recall(**SMALL).questions(eval_context(Reader(9)))["needle"][0]
    for gap, agrees in ((1e-5, "tie"), (0.1, "no"), (-0.1, "yes")):
        model = Tied(10_000)
        model.gap = gap
        (answer,) = answer_greedily(model, TOKENIZER, [item])
        assert answer.correct
        assert full_forward(model, TOKENIZER, item, answer).agrees == agrees


def _random_student() -> Any:
    return student_of(tiny(vocab_size=258, bos_token_id=0, eos_token_id=1), mixer("lolcats", window=5, feature_dim=6))


def _differ(model: Any) -> tuple[int, set[str]]:
    numbers = measured(model, lengths=(150,), depths=(0.3,), items=2, keys=(2,))["models"]["teacher"]
    return numbers["cache"]["differ"], {text for test in ("needle", "keys") for text in numbers[test]["answers"]}


def test_a_healthy_student_decodes_what_its_full_forward_says(monkeypatch: pytest.MonkeyPatch) -> None:
    student = _random_student()
    differ, answers = _differ(student)
    assert differ == 0 and len(answers) > 3, "answers of a random model, not all the same"
    healthy = MixerCacheLayer.step

    def doubled(self: Any, *args: Any, **settings: Any) -> Tensor:
        """What was folded so far counts twice from the second token on."""
        y = healthy(self, *args, **settings)
        if self.state is not None and self.state.memory_BHFV is not None:
            self.state = dataclasses.replace(self.state, memory_BHFV=2 * self.state.memory_BHFV)
        return y

    monkeypatch.setattr(MixerCacheLayer, "step", doubled)
    assert _differ(student)[0] > 0


def test_generation_settings_of_the_model_do_not_answer() -> None:
    model = tiny(vocab_size=258, bos_token_id=0, eos_token_id=1)
    items = Recall(**SMALL).questions(eval_context(Reader(9)))["needle"][:3]
    plain = answer_greedily(model, TOKENIZER, items)
    model.generation_config.repetition_penalty = 9.0
    model.generation_config.no_repeat_ngram_size = 1
    assert answer_greedily(model, TOKENIZER, items) == plain
    assert all(isinstance(answer, Generated) and len(answer.tokens) <= 7 for answer in plain)


def test_an_interrupted_run_continues(tmp_path: Path) -> None:
    def run(model: Reader, seed: int = 3) -> Numbers:
        return Recall(**SMALL).run(eval_context(model, results=ResultCache(tmp_path), seed=seed))

    first = Reader(250)
    numbers = run(first)
    again = Reader(250)
    assert run(again) == numbers and first.calls > 0 and again.calls == 0
    assert run(again, seed=5) != numbers and again.calls == first.calls


@pytest.mark.parametrize("count", [1, 2, 4])
def test_everything_is_shown_for_any_number_of_models(count: int) -> None:
    from matplotlib.figure import Figure

    shown = Recall.present(measured(*[Reader(reach) for reach in (10_000, 250, 90, 400)][:count]))
    assert len([plot for plot in shown.plots if "needle" in plot.name]) == max(1, count - 1)
    assert len({plot.name for plot in shown.plots}) == len(shown.plots)
    with styled():
        for plot in shown.plots:
            figure = Figure(figsize=(plot.width, plot.height), layout="constrained")
            plot.draw(figure)
            figure.canvas.draw()
            if "needle" in plot.name:
                assert [axis.get_title(loc="left") for axis in figure.axes][:1] == ["teacher"]
                assert [axis.images[0].get_clim() for axis in figure.axes] == [(0, 1)] * min(count, 2)
    for table in shown.tables:
        assert table.rows and len({tuple(row) for row in table.rows}) == 1
    cells = shown.tables[1].rows
    assert len(cells) == 6 and cells[0]["teacher"] == "3 of 3"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": ()}, "give at least one"),
        ({"depths": (0.5, 1.2)}, "from 0 to 1"),
        ({"keys": (0, 2)}, "allowed are 1 to 100"),
    ],
)
def test_what_cannot_be_measured_is_refused_before(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Recall(**settings).check(eval_context(Reader(9)))


def test_lengths_and_texts_too_short_are_refused() -> None:
    with pytest.raises(InputError, match="40 tokens are too few"):
        Recall(lengths=(40,)).questions(eval_context(Reader(9)))
    with pytest.raises(InputError, match="no sentence to use"):
        Recall().check(eval_context(Reader(9), texts=()))
    with pytest.raises(InputError, match="no sentence to use"):
        Recall().check(eval_context(Reader(9), texts=["The code of the red hat is 1111."]))
    with pytest.raises(InputError, match="table of 256 positions"):
        Recall(lengths=(300,)).check(eval_context(tiny("gpt2")))


def test_the_embedded_teacher_finds_its_needles() -> None:
    model, tokenizer = load_any(Path(linearize.demo.__file__).parent / "teacher", device="cpu")
    eval_model = EvalModel(name="teacher", role="teacher", path="", model=model, tokenizer=tokenizer)
    stories = [story for story in STORIES if "code" not in story]
    section = Recall(lengths=(150, 260), depths=(0.2, 0.7), items=2, keys=(1,), passkey="needle")
    numbers = section.run(EvalContext(models=(eval_model,), texts=stories))["models"]["teacher"]
    assert numbers["needle"]["successes"] >= 7 and numbers["needle"]["n"] == 8
    assert numbers["cache"]["differ"] == 0

"""The teacher that ships inside the package: complete, small, readable, and able to recall from far back."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

import linearize.demo
from linearize.evaluation.needles import CODE_DIGITS, recall_document

FOLDER = Path(linearize.demo.__file__).parent / "teacher"
STORIES = [
    "Tom saw a big dog in the park. The dog was sad. Tom gave the dog a ball and they played all day.",
    "One day a bird sang in a tree. The sun was hot. The bird was happy and it sang to all of its friends.",
    "Lily and her mom went to the shop. They got milk and bread. Then they walked home and ate some soup.",
]


@pytest.fixture(scope="module")
def teacher() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    return model.eval(), AutoTokenizer.from_pretrained(FOLDER)


def test_the_folder_is_complete_small_and_readable_by_all() -> None:
    names = {"PROVENANCE.json", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    files = list(FOLDER.iterdir())
    assert names <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) <= 6_000_000
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in files)


def test_provenance_names_data_command_and_results() -> None:
    record = json.loads((FOLDER / "PROVENANCE.json").read_text(encoding="utf-8"))
    assert record["data"]["name"] == "TinyStories"
    assert all(len(file["sha256"]) == 64 and "/" not in file["file"] for file in record["data"]["files"])
    assert record["command"].startswith("python scripts/train_demo_teacher.py --data ")
    assert "/" not in record["command"].removeprefix("python scripts/")
    assert 1.0 < record["heldout_loss"] < 4.0
    assert {"one_fact", "one_to_four_facts"} == set(record["recall"])


def test_weights_compute_in_float32_and_the_vocabulary_fits(
    teacher: tuple[LlamaForCausalLM, PreTrainedTokenizerFast],
) -> None:
    model, tokenizer = teacher
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert len(tokenizer) == model.config.vocab_size
    text = 'Lily said, "I have 407 red hats!"\nThen she ran home.'
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("407", add_special_tokens=False)["input_ids"]) == ["4", "0", "7"]


def test_it_tells_stories_in_plain_words(teacher: tuple[LlamaForCausalLM, PreTrainedTokenizerFast]) -> None:
    model, tokenizer = teacher
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    story = tokenizer.decode(model.generate(ids, max_new_tokens=40, do_sample=False)[0], skip_special_tokens=True)
    assert story.startswith("Once upon a time, there was a")
    assert len(set(story.split())) > 15


@pytest.mark.parametrize("words", [60, 350])
def test_it_recalls_a_code_from_far_back(teacher: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], words: int) -> None:
    model, tokenizer = teacher
    rng, right = random.Random(words), 0
    for _ in range(6):
        item = recall_document(rng, STORIES, num_words=words, distance=words)
        ids = tokenizer(item.prompt + item.answer, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            best = model(ids).logits[0].argmax(-1)
        right += bool((best[-CODE_DIGITS - 1 : -1] == ids[0, -CODE_DIGITS:]).all())
    assert right >= 5

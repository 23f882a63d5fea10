"""The teacher's answers to prompts: batched equal to one by one, cached, and continued after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import CHAT, SIZE, byte_tokenizer
from models import tiny
from transformers import PreTrainedModel

from linearize.errors import InputError
from linearize.storage.journal import default_cache
from linearize.training.data.documents import Document
from linearize.training.data.loading import DataConfig, load_documents
from linearize.training.data.pseudo_labels import (
    FILE,
    PseudoConfig,
    prompt_of,
    pseudo_documents,
    pseudo_labeller,
)

CONTEXT = 40
PROMPTS = ["a", "What is it?", "b c", "of a length that leaves little space", "xyz", "Two words", "?"]


def teacher(seed: int = 5, family: str = "llama") -> PreTrainedModel:
    """A random one that ends some of its texts early."""
    model = tiny(family, vocab_size=SIZE, max_position_embeddings=CONTEXT, eos_token_id=1, bos_token_id=0, seed=seed)
    model.generation_config.eos_token_id = [1, *range(20, 60)]
    return model


def prompts(folder: Path, texts: list[str] = PROMPTS) -> str:
    (folder / "prompts.json").write_text(json.dumps([{"prompt": text} for text in texts]), encoding="utf-8")
    return str(folder / "prompts.json")


def answered(folder: Path, model: Any = None, **settings: Any) -> list[Document]:
    usual: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 9, "seed": 4, "batch": 3}
    config = PseudoConfig(**{**usual, **settings})
    return pseudo_documents(model or teacher(), byte_tokenizer(), prompts(folder), config, cache=folder / "cache")


def greedy_alone(model: PreTrainedModel, prompt: str, max_new_tokens: int) -> list[int]:
    """Prompt and answer, one forward over everything per token."""
    tokens = [0, *byte_tokenizer()(prompt)["input_ids"]]
    for _ in range(min(max_new_tokens, CONTEXT - len(tokens))):
        tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        if tokens[-1] in model.generation_config.eos_token_id:
            break
    return tokens


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_batched_greedy_answers_are_those_of_each_prompt_alone(tmp_path: Path, family: str) -> None:
    model = teacher(family=family)
    expected = [greedy_alone(model, prompt, 7) for prompt in PROMPTS]
    lengths = [len(tokens) - len(prompt) - 1 for tokens, prompt in zip(expected, PROMPTS, strict=True)]
    assert lengths[3] <= 5 and 7 in lengths and min(lengths) < 5  # the context, the limit and end tokens cut some
    for batch in (1, 3, 16):
        actual = answered(tmp_path, model, temperature=0, batch=batch, max_new_tokens=7)
        assert [document.tokens for document in actual] == expected


def test_sampled_answers_are_reproduced_by_their_seed_alone(tmp_path: Path) -> None:
    model = teacher().train()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    (tmp_path / "a").mkdir()
    first = answered(tmp_path / "a", model)
    assert torch.equal(torch.get_rng_state(), before) and model.training
    torch.rand(7)
    (tmp_path / "b").mkdir()
    assert answered(tmp_path / "b") == first
    for change in ({"seed": 5}, {"temperature": 0.3}, {"temperature": 0}):
        assert answered(tmp_path / "b", **change) != first
    assert answered(tmp_path / "b", teacher(seed=6)) != first
    assert len({tuple(document.tokens[-3:]) for document in first}) > 3


class Killed(Exception):  # noqa: N818 (not an error)
    """Stands for the end of the process."""


def test_a_killed_run_continues_and_yields_the_same_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "whole").mkdir()
    expected = answered(tmp_path / "whole")

    def run(progress: Any) -> list[Document]:
        config = PseudoConfig(temperature=1.0, max_new_tokens=9, seed=4, batch=3)
        spec, cache = prompts(tmp_path), tmp_path / "cache"
        return pseudo_documents(teacher(), byte_tokenizer(), spec, config, cache=cache, progress=progress)

    def kill(done: int, answers: int) -> None:
        if done == 6:
            raise Killed

    with pytest.raises(Killed):
        run(kill)
    (file,) = (tmp_path / "cache").glob(f"*/{FILE}")
    lines = file.read_text("utf-8").splitlines()
    assert len(lines) == 2, "one for each batch"
    file.write_text(lines[0] + "\n" + lines[1][:19], encoding="utf-8")  # as a kill while writing leaves it
    seen: list[tuple[int, int]] = []
    assert run(lambda *now: seen.append(now)) == expected
    assert seen == [(3, 7), (6, 7), (7, 7)]

    def nothing_is_written(*_: Any, **__: Any) -> None:
        raise AssertionError("the teacher was asked again")

    monkeypatch.setattr(PreTrainedModel, "generate", nothing_is_written, raising=False)
    seen.clear()
    assert run(lambda *now: seen.append(now)) == expected and seen == [(7, 7)]


ROWS = {
    "prompt": ({"prompt": "Is it?"}, "<user> Is it?\n<assistant> ", "Is it?"),
    "alpaca": (
        {"instruction": "Add", "input": "1 2", "output": "3"},
        "<user> Add\n\n1 2\n<assistant> ",
        "### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n",
    ),
    "messages": (
        {"messages": [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "no"}]},
        "<user> Is it?\n<assistant> ",
        None,
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_prompts_go_through_the_chat_template_if_there_is_one(name: str) -> None:
    row, chat, plain = ROWS[name]
    assert prompt_of(row, byte_tokenizer(chat=CHAT)) == chat
    if plain is None:
        with pytest.raises(InputError, match="has no chat template"):
            prompt_of(row, byte_tokenizer())
    else:
        assert prompt_of(row, byte_tokenizer()).endswith(plain)


def test_the_spec_in_data_and_the_answers_alone(tmp_path: Path) -> None:
    for answer_only in (False, True):
        config = DataConfig(
            pseudo_temperature=0, pseudo_max_new_tokens=9, pseudo_batch=2, answer_only=answer_only, pseudo_seed=7
        )
        answer = pseudo_labeller(teacher(), byte_tokenizer(), config, cache=tmp_path / "cache")
        spec = f"pseudo:{prompts(tmp_path)}"
        documents = load_documents([spec], byte_tokenizer(), answer=answer, answer_only=answer_only)
        assert [document.tokens for document in documents] == [greedy_alone(teacher(), p, 9) for p in PROMPTS]
        for document, prompt in zip(documents, PROMPTS, strict=True):
            size = 1 + len(prompt)
            assert document.loss_mask == [0 if answer_only else 1] * size + [1] * (len(document) - size)
    assert len(list((tmp_path / "cache").iterdir())) == 1  # answer_only is no part of what the answers depend on
    with pytest.raises(InputError, match="no teacher"):
        load_documents([spec], byte_tokenizer())


def test_the_cache_is_where_the_system_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache("kind") == tmp_path / "own" / "kind"
    monkeypatch.delenv("LINEARIZE_CACHE")
    assert default_cache("kind") == tmp_path / "linearize" / "kind"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache("kind") == Path.home() / ".cache" / "linearize" / "kind"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "a"}, "has the fields text; give one of"),
        ({"prompt": "  "}, "its prompt is empty"),
        ({"prompt": "a" * CONTEXT}, f"its prompt has {CONTEXT + 1} tokens, the teacher's context {CONTEXT}"),
        ({"prompt": 3}, "must be text"),
        ({"messages": [{"role": "assistant", "content": "no"}]}, "no question before the answer"),
        ([], "is a list"),
    ],
)
def test_bad_prompts_are_reported_in_one_line(tmp_path: Path, row: object, reason: str) -> None:
    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": "a"}, row]), encoding="utf-8")
    config = PseudoConfig(max_new_tokens=3)
    with pytest.raises(InputError, match=reason) as caught:
        spec = str(tmp_path / "prompts.json")
        pseudo_documents(teacher(), byte_tokenizer(chat=CHAT if "messages" in row else None), spec, config)
    assert "row 2" in str(caught.value) and "\n" not in str(caught.value)

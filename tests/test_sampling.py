"""Text sampled from the teacher: from its own distribution, reproducible, and finite."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from linearize.errors import InputError
from linearize.training.data.loading import DataConfig, Document
from linearize.training.data.sampling import sample_documents, self_sampler

VOCAB = ["<s>", "</s>", "<end>", "a", "b", "c", "d"]


def _tokenizer(bos: str | None = "<s>") -> PreTrainedTokenizerFast:
    base = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCAB)}, unk_token="a"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"eos_token": "</s>"} if bos is None else {"bos_token": bos, "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=base, **names)


def _teacher(probabilities: list[float], context: int = 50) -> LlamaForCausalLM:
    """A Llama whose next token has these probabilities (of `VOCAB`), whatever came before."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCAB),
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    model.lm_head = torch.nn.Linear(12, len(VOCAB))
    model.lm_head.weight.data.zero_()
    model.lm_head.bias.data = torch.tensor(probabilities).clamp_min(1e-30).log()
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=[2, 1], top_k=1, top_p=0.1)
    return model


USUAL = [0.0, 0.05, 0.1, 0.4, 0.2, 0.2, 0.05]


def _sample(teacher: LlamaForCausalLM, num_tokens: int = 300, **settings: object) -> list[Document]:
    usual = {"batch_size": 7, "max_new_tokens": 23, "seed": 5}
    return sample_documents(teacher, _tokenizer(), num_tokens, **{**usual, **settings})  # type: ignore[arg-type]


def test_documents_begin_with_bos_and_stop_at_any_end_token() -> None:
    documents = _sample(_teacher(USUAL), 900)
    assert sum(map(len, documents)) >= 900 > sum(map(len, documents[:-1]))
    assert all(d.tokens[0] == 0 and 2 <= len(d) <= 24 and d.loss_mask == [1] * len(d) for d in documents)
    assert all(token > 2 for document in documents for token in document.tokens[1:-1])
    last = {document.tokens[-1] for document in documents if len(document) < 24}
    assert last == {1, 2}
    assert any(document.tokens[-1] > 2 for document in documents if len(document) == 24)
    assert all(len(document) > 2 for document in documents)  # texts that end at once are left out


def test_the_teachers_own_distribution_is_sampled_not_its_truncated_one() -> None:
    tokens = [token for d in _sample(_teacher(USUAL), 3000, batch_size=151) for token in d.tokens if token > 2]
    shares = [tokens.count(token) / len(tokens) for token in (3, 4, 5, 6)]
    assert shares == pytest.approx([0.471, 0.235, 0.235, 0.059], abs=0.04)
    cold = [t for d in _sample(_teacher(USUAL), 2000, batch_size=151, temperature=0.5) for t in d.tokens if t > 2]
    assert cold.count(3) / len(cold) == pytest.approx(0.16 / 0.2425, abs=0.04)


def test_seeds_reproduce_and_nothing_else_is_touched() -> None:
    teacher = _teacher(USUAL).train()
    torch.manual_seed(77)
    before = torch.get_rng_state()
    first = _sample(teacher)
    assert torch.equal(torch.get_rng_state(), before)
    assert teacher.training
    assert teacher.generation_config.top_k == 1
    torch.rand(3)
    assert _sample(teacher) == first
    assert _sample(teacher, seed=6) != first
    assert next(teacher.parameters()).requires_grad


def test_a_prompt_begins_every_document() -> None:
    documents = _sample(_teacher(USUAL), prompt="d b")
    assert {tuple(document.tokens[:3]) for document in documents} == {(0, 6, 4)}


def test_a_tokenizer_without_bos_starts_from_eos_but_does_not_show_it() -> None:
    documents = sample_documents(_teacher(USUAL), _tokenizer(None), 200, batch_size=5, max_new_tokens=9)
    assert all(document.tokens[0] > 2 and len(document) <= 9 for document in documents)


def test_the_teachers_context_is_not_exceeded() -> None:
    endless = _teacher([0, 0, 0, 1, 1, 1, 1], context=13)
    assert {len(document) for document in _sample(endless, max_new_tokens=40)} == {13}
    with pytest.raises(InputError, match="13 tokens, the teacher's context 13"):
        _sample(endless, prompt="a " * 12)


def test_a_teacher_that_cannot_write_is_an_error_not_an_endless_loop() -> None:
    with pytest.raises(InputError, match="without writing a token"):
        _sample(_teacher([0, 1, 1, 0, 0, 0, 0]))


def test_temperature_must_be_positive() -> None:
    with pytest.raises(InputError, match="temperature 0"):
        _sample(_teacher(USUAL), temperature=0)


def test_the_settings_of_a_recipe_and_progress() -> None:
    seen: list[tuple[int, int]] = []
    config = DataConfig(self_tokens=150, self_seed=5, self_batch=7, length=23, self_prompt="c")
    documents = self_sampler(_teacher(USUAL), _tokenizer(), config, progress=lambda *now: seen.append(now))()
    assert documents == _sample(_teacher(USUAL), 150, prompt="c")
    assert seen[-1] == (150, 150) and [done for done, _ in seen] == sorted({done for done, _ in seen})

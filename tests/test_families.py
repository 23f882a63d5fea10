"""Every supported family equals its teacher where it must; any other is an error before anything changes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from models import COMMON, FAMILIES, LAYERS, LOCAL, left_padded, mixer, randomize, student_of, text, tiny
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

import linearize
from linearize.errors import InputError
from linearize.modeling import LinearizedForCausalLM

TOKENS = 23
HYBRID_WINDOW = 3
LIMITED = ("mistral", "phi3", "starcoder2")
TIED = ("llama", "gemma2", "gpt2", "qwen2")
REFUSED = {
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 2}, "s_aux"),
    "mamba": ({}, "linear_attention"),
    "stablelm": ({}, "do not pass keywords"),
    "bloom": ({}, "0 of its 3 layers"),
    "falcon": ({}, "could not be probed"),
    "doge": ({}, "attention_mask"),
    "falcon_h1": ({"mamba_d_ssm": 24, "mamba_n_heads": 3, "mamba_d_head": 8, "mamba_d_state": 5}, "hybrid"),
    "llama4_text": ({}, "chunked_attention"),
    "minimax": ({}, "linear_attention"),
    "bert": ({}, "looks ahead"),
}


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    assert expected.abs().max() > 0.1, "logits this flat would hide a difference"
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def padded_teacher(teacher: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return teacher(ids, attention_mask=mask, position_ids=positions).logits


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_plan_is_the_teacher_to_the_bit(family: str) -> None:
    teacher, ids = tiny(family), text(2, TOKENS)
    student = LinearizedForCausalLM.from_teacher(teacher, [None] * LAYERS)
    assert torch.equal(student(ids).logits, teacher(ids).logits)


@pytest.mark.parametrize(
    ("family", "attention"), [*((f, "eager") for f in FAMILIES), *((f, "sdpa") for f in ("llama", "qwen3", "smollm3"))]
)
def test_a_window_over_the_whole_text_is_the_teacher(family: str, attention: str) -> None:
    teacher, ids = tiny(family, attention=attention), text(2, TOKENS)
    student = student_of(teacher, mixer(window=TOKENS))
    close(student(ids).logits, teacher(ids).logits)
    rows, mask = left_padded(ids, [TOKENS, 14])
    live = mask[..., None]
    close(student(rows, attention_mask=mask).logits * live, padded_teacher(teacher, rows, mask) * live)


@pytest.mark.parametrize("family", LIMITED)
def test_a_family_with_limited_layers_is_converted_where_it_is_not_limited(family: str) -> None:
    ids = text(2, TOKENS)
    limited = tiny(family)
    kept = student_of(limited, mixer(window=LOCAL))
    assert kept.mixers() == {}
    assert torch.equal(kept(ids).logits, limited(ids).logits)
    assert len(student_of(limited, mixer(window=LOCAL - 1)).mixers()) == LAYERS
    full = tiny(family, sliding_window=None)
    student = student_of(full, mixer(window=TOKENS))
    assert len(student.mixers()) == LAYERS
    close(student(ids).logits, full(ids).logits)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "cohere2"])
def test_layers_limited_to_less_than_the_window_stay(family: str) -> None:
    student = student_of(tiny(family), mixer(window=LOCAL))
    assert [entry is None for entry in student.config.plan] == [True, False, True]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hybrid_saved_and_loaded_gives_the_same_logits_and_decodes(family: str, tmp_path: Path) -> None:
    teacher, ids = tiny(family, attention=None, tie_word_embeddings=family in TIED), text(2, TOKENS)
    student = student_of(teacher, [None, mixer(window=HYBRID_WINDOW), None])
    expected = student(ids).logits
    assert (expected - teacher(ids).logits).abs().max() > 0.05, "the mixer changes nothing: the test is blind"
    student.save_pretrained(tmp_path)
    for loaded in (linearize.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(loaded(ids).logits, expected)
    cache, parts = None, []
    for part in ids.split([7, 1, 6, 9], dim=1):
        out = student(part, past_key_values=cache, use_cache=True)
        cache, parts = out.past_key_values, [*parts, out.logits]
    close(torch.cat(parts, dim=1), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "smollm3", "gpt2"])
def test_packed_rows_equal_separate_documents(family: str) -> None:
    ids = text(2, TOKENS)
    student = student_of(tiny(family), mixer(window=HYBRID_WINDOW))
    positions = torch.cat([torch.arange(9), torch.arange(TOKENS - 9)]).expand(2, -1)
    apart = torch.cat([student(ids[:, :9]).logits, student(ids[:, 9:]).logits], dim=1)
    close(student(ids, position_ids=positions, use_cache=False).logits, apart)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_be_converted_is_refused_and_unchanged(family: str) -> None:
    changes, reason = REFUSED[family]
    attention = None if family in ("mamba", "minimax", "falcon_h1") else "eager"
    check_refusal(tiny(family, attention=attention, **{"hidden_size": 36, **changes}), reason)


def test_an_encoder_decoder_is_refused_and_unchanged() -> None:
    config = T5Config(vocab_size=61, d_model=30, d_kv=7, d_ff=44, num_layers=LAYERS, num_heads=5)
    model = T5ForConditionalGeneration(config).eval()
    randomize(model)
    check_refusal(model, "looks ahead", decoder_input_ids=text(2, 5))


def check_refusal(model: PreTrainedModel, reason: str, **inputs: Tensor) -> None:
    ids, calls = text(2, TOKENS), [mixer()] * LAYERS
    expected, modules = model(ids, **inputs).logits, dict(model.named_modules())
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=f"^{model.config.model_type} cannot be converted: .*{reason}"):
        LinearizedForCausalLM.from_teacher(model, calls)
    assert torch.equal(model(ids, **inputs).logits, expected)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_what_stands_in_the_config_is_found_under_its_usual_name() -> None:
    for family in ("llama", "gpt2"):
        config = student_of(tiny(family), mixer()).config
        assert (config.num_hidden_layers, config.vocab_size) == (LAYERS, COMMON["vocab_size"])
        with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
            _ = config.nonsense

"""`AutoModel.from_pretrained` on a student's folder: hidden states that the head turns into the student's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import left_padded, mixer, student_of, text, tiny
from transformers import AutoModel, AutoModelForCausalLM

from linearize.errors import InputError
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.cache_argument import cache_of

PLANS: dict[str, list[Any]] = {
    "llama": [mixer("lolcats"), None, mixer("gated_delta_net")],
    "gpt2": [mixer("lolcats"), mixer("gla"), mixer("lolcats")],
    "gemma2": [None, mixer("mamba2"), None],
}


@pytest.fixture(scope="module", params=sorted(PLANS))
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A student, what AutoModel reads from its folder, and the folder."""
    folder: Path = tmp_path_factory.mktemp("student")
    student = student_of(tiny(request.param, tie_word_embeddings=True), PLANS[request.param])
    student.save_pretrained(folder)
    return student, AutoModel.from_pretrained(folder, attn_implementation="eager").eval(), folder


def logits(student: LinearizedForCausalLM, hidden: torch.Tensor) -> torch.Tensor:
    """The head's, capped where the family does so."""
    head: Any = student.get_output_embeddings()
    result: torch.Tensor = head(hidden)
    cap = getattr(student.config, "final_logit_softcapping", None)
    return result if cap is None else cap * torch.tanh(result / cap)


@torch.no_grad()
def test_hidden_states_are_those_before_the_head(both: tuple[Any, Any, Path]) -> None:
    student, model, _ = both
    ids, mask = left_padded(text(2, 19), [19, 11])
    actual = model(ids, attention_mask=mask)
    expected = student(ids, attention_mask=mask).logits
    assert "logits" not in actual and actual.last_hidden_state.shape == (2, 19, student.config.hidden_size)
    torch.testing.assert_close(logits(student, actual.last_hidden_state)[mask == 1], expected[mask == 1])


@torch.no_grad()
def test_it_continues_from_its_cache(both: tuple[Any, Any, Path]) -> None:
    _, model, _ = both
    ids = text(2, 17)
    whole = model(ids).last_hidden_state
    first = model(ids[:, :9], use_cache=True)
    rest = model(ids[:, 9:], past_key_values=cache_of(first))
    torch.testing.assert_close(
        torch.cat([first.last_hidden_state, rest.last_hidden_state], 1), whole, atol=1e-5, rtol=1e-4
    )


def test_saving_it_keeps_the_whole_student(both: tuple[Any, Any, Path], tmp_path: Path) -> None:
    student, model, _ = both
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", attn_implementation="eager")
    ids = text(1, 8)
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, student(ids).logits)


def test_what_it_does_not_know_is_refused(both: tuple[Any, Any, Path]) -> None:
    _, model, _ = both
    assert not model.can_generate()
    with pytest.raises(InputError, match="padding_mask"):
        model(text(1, 5), padding_mask=torch.ones(1, 5))

"""A student whose vocabulary grows or shrinks: loss, saving, loading, and models that share its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import VOCABULARY, mixer, student_of, text, tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

import linearize

SIZES = [VOCABULARY + 7, VOCABULARY - 20]


def sizes_of(model: PreTrainedModel) -> set[int]:
    """Every place that says how many tokens a student knows."""
    config, models = model.config, [x for x in (model, model.lm) if hasattr(x, "vocab_size")]
    return {
        config.vocab_size, config.teacher["vocab_size"], config.get_text_config().vocab_size,
        model.lm.config.get_text_config().vocab_size, *(x.vocab_size for x in models),
        model.get_input_embeddings().weight.shape[0], model.get_output_embeddings().weight.shape[0],
    }  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "granite"])
def test_a_resized_student_has_a_loss_and_comes_back_whole(family: str, tied: bool, size: int, tmp_path: Path) -> None:
    teacher = tiny(family, attention=None, tie_word_embeddings=tied)
    student, ids = student_of(teacher, [mixer(), None, mixer("mamba2")]), text(2, 19) % size
    with torch.no_grad():
        before, expected = student(ids).logits, teacher(ids).logits
        embedding = student.resize_token_embeddings(size)
        assert embedding is student.get_input_embeddings() and sizes_of(student) == {size}
        out = student(ids, labels=ids)
        shared = min(size, VOCABULARY)
        torch.testing.assert_close(out.logits[..., :shared], before[..., :shared], rtol=0, atol=1e-5)
        targets = out.logits[:, :-1].reshape(-1, size).float()
        loss = torch.nn.functional.cross_entropy(targets, ids[:, 1:].flatten())
        torch.testing.assert_close(out.loss, loss)
        student.save_pretrained(tmp_path / "s")
        for loaded in (linearize.load(tmp_path / "s"), AutoModelForCausalLM.from_pretrained(tmp_path / "s")):
            assert sizes_of(loaded) == {size}
            again = loaded(ids, labels=ids)
            assert torch.equal(again.logits, out.logits) and torch.equal(again.loss, out.loss)
        assert torch.equal(teacher(ids).logits, expected), "the teacher was resized with its student"


def test_a_size_can_be_rounded_up_and_asked_for() -> None:
    student = student_of(tiny("llama"), mixer())
    assert student.resize_token_embeddings(pad_to_multiple_of=64).weight.shape[0] == 64
    assert sizes_of(student) == {64}
    assert student.resize_token_embeddings() is student.get_input_embeddings() and sizes_of(student) == {64}


def test_a_size_one_level_down_is_changed_there(tmp_path: Path) -> None:
    """As in families whose config describes the language model under `text_config`."""
    student = student_of(tiny("llama"), mixer())
    fields = dict(student.config.teacher)
    student.config.teacher = {"model_type": "with_images", "vocab_size": VOCABULARY, "text_config": fields}
    student.resize_token_embeddings(70)
    teacher = student.config.teacher
    assert (student.config.vocab_size, teacher["vocab_size"], teacher["text_config"]["vocab_size"]) == (70, 70, 70)
    assert fields["vocab_size"] == VOCABULARY, "a config that others may hold was changed"

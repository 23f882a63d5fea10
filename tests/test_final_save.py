"""The final save is tried before the first step: nothing is trained that could not be written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import mixer, student_of
from teacher_folder import write_teacher, write_text
from transformers import GenerationConfig, PreTrainedTokenizerFast

import linearize
from linearize.errors import InputError
from linearize.modeling.io.student_folder import check_saving, valid_generation_config
from linearize.modeling.io.teacher import load_teacher
from linearize.modeling.student import LinearizedForCausalLM
from linearize.training import loop

FEW: dict[str, Any] = {
    "plan.mixer.window": 4, "data.heldout": 3, "data.length": 48, "stages.0.batch": 2, "stages.1.batch": 2,
    "stages.0.tokens": 200, "stages.1.tokens": 200,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "teacher"
    path.mkdir()
    write_teacher(path)
    write_text(tmp_path / "text.txt")
    return path


def sampling_without_sampling(folder: Path) -> None:
    fields = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "eos_token_id": [1, 2], "max_length": 77}
    (folder / "generation_config.json").write_text(json.dumps(fields))


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_an_invalid_generation_config_is_saved_without_what_is_wrong(
    folder: Path, tmp_path: Path, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a transformers that refuses to write one, as versions up to 5.22 do."""
    sampling_without_sampling(folder)
    original = GenerationConfig.save_pretrained

    def strict(self: GenerationConfig, *args: Any, **named: Any) -> None:
        self.validate(strict=True)
        original(self, *args, **named)

    monkeypatch.setattr(GenerationConfig, "save_pretrained", strict)
    few = {**FEW, **({"stages.0.block": 1} if stream else {})}
    linearize.convert(
        folder, data=[tmp_path / "text.txt"], out=tmp_path / "out", overrides=few, device="cpu", stream=stream
    )
    written = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (written.eos_token_id, written.max_length) == ([1, 2], 77)
    assert (written.temperature, written.top_p) == (GenerationConfig().temperature, GenerationConfig().top_p)


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"temperature": 0.6, "do_sample": True}, {"temperature": 0.6, "do_sample": True}),
        ({"temperature": 0.6, "pad_token_id": 3}, {"pad_token_id": 3}),
        ({"early_stopping": True, "length_penalty": 0.3, "num_beams": 4, "top_k": 7},
         {"early_stopping": True, "length_penalty": 0.3, "num_beams": 4}),
        ({"early_stopping": True, "max_new_tokens": 5}, {"max_new_tokens": 5}),
    ],
)  # fmt: skip
def test_as_much_as_is_valid_stays(fields: dict[str, Any], kept: dict[str, Any]) -> None:
    default = GenerationConfig()
    made = valid_generation_config(GenerationConfig(**fields))
    made.validate(strict=True)
    assert {n: getattr(made, n) for n in fields} == {n: kept.get(n, getattr(default, n)) for n in fields}


FAULTS = {
    "tokenizer": (PreTrainedTokenizerFast, "save_pretrained"),
    "config": (linearize.LinearizeConfig, "save_pretrained"),
    "generation config": (GenerationConfig, "save_pretrained"),
    "shared memory": ("transformers.modeling_utils.remove_tied_weights_from_state_dict", None),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", FAULTS)
def test_what_cannot_be_written_is_found_before_the_first_step(
    folder: Path, tmp_path: Path, what: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stream and what == "shared memory":
        pytest.skip("a streamed student's weights are copied from the teacher's files one by one")

    def fail(*args: Any, **named: Any) -> None:
        raise ValueError(f"this {what} cannot be written")

    def run(*args: Any, **named: Any) -> None:
        raise AssertionError("trained")

    owner, name = FAULTS[what]
    monkeypatch.setattr(owner, fail) if name is None else monkeypatch.setattr(owner, name, fail)
    monkeypatch.setattr(loop._Loop, "run", run)
    few = {**FEW, **({"stages.0.block": 1} if stream else {})}
    with pytest.raises(InputError, match=f"could not be saved after its training.*this {what} cannot be written"):
        linearize.convert(
            folder, data=[tmp_path / "text.txt"], out=tmp_path / "out", overrides=few, device="cpu", stream=stream
        )
    assert not (tmp_path / "out").exists()


def test_a_student_that_would_not_load_again(folder: Path) -> None:
    """Its config describes weights of other sizes, and weights that it has not."""
    teacher, tokenizer = load_teacher(folder)
    student = student_of(teacher, mixer())
    random = torch.get_rng_state()
    check_saving(student, tokenizer)
    assert torch.equal(random, torch.get_rng_state())
    for field, value, message in (("intermediate_size", 43, "9 more|8 more"), ("attention_bias", True, "bias")):
        before = student.config.teacher[field]
        student.config.teacher[field] = value
        with pytest.raises(InputError, match=rf"could not be loaded after its training.*({message})"):
            check_saving(student, tokenizer)
        student.config.teacher[field] = before
    check_saving(student, tokenizer)


def test_two_layers_over_one_weight(folder: Path) -> None:
    teacher, tokenizer = load_teacher(folder)
    student = LinearizedForCausalLM.from_teacher(teacher, [mixer()] * 3)
    layers: Any = student.lm.model.layers
    layers[1].mlp.up_proj.weight = torch.nn.Parameter(layers[0].mlp.gate_proj.weight.data, requires_grad=False)
    with pytest.raises(InputError, match="could not be saved"):
        check_saving(student, tokenizer)

"""`linearize plan` counts weights that two modules share once: parameters, memory and disk."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from models import FAMILIES, tiny
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoConfig

from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.inspect import inspect_model
from linearize.modeling.io.assemble import student_on_meta
from linearize.planning import plan_conversion
from linearize.planning.report import print_plan
from linearize.planning.samples import build, read_config
from linearize.recipes.schema import Recipe
from linearize.training.memory_simulation import simulation, weight_bytes

STAGE = {"name": "attention_transfer", "tokens": 160, "lr": 1e-2, "batch": 2}
RECIPE = Recipe.from_data(
    {"plan": {"mixer": {"name": "lolcats", "window": 4, "feature_dim": 7}}, "data": {"length": 16}, "stages": [STAGE]}
)


def test_a_published_size() -> None:
    """SmolLM2-135M, whose head is its embedding."""
    config = AutoConfig.for_model(
        "llama", vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with simulation():
        assert sum(p.numel() for p in build(config, torch.bfloat16).parameters()) == 134_515_008


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_parameters_are_those_of_the_model(family: str, tied: bool, tmp_path: Path) -> None:
    model = tiny(family, tie_word_embeddings=tied)
    model.config.save_pretrained(tmp_path)
    with simulation():
        planned = build(read_config(tmp_path), torch.float32)
        assert sum(p.numel() for p in planned.parameters()) == model.num_parameters()
        assert weight_bytes(planned) == weight_bytes(model)


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "gemma2"))]
)
def test_memory_and_disk_of_a_tied_teacher(family: str, tmp_path: Path) -> None:
    teacher = tiny(family, tie_word_embeddings=True)
    teacher.save_pretrained(tmp_path / "teacher")
    plan = plan_conversion(tmp_path / "teacher", recipe=RECIPE)
    assert plan.parameters == inspect_model(tmp_path / "teacher")["parameters"] == teacher.num_parameters()
    printed = io.StringIO()
    print_plan(plan, Console(file=printed, width=500))
    assert f"{plan.parameters / 1e3:.3g}k parameters" in printed.getvalue()
    student = LinearizedForCausalLM.from_teacher(teacher, RECIPE.plan.resolve(3, [0.0] * 3))
    added = sum(p.numel() for p in student.mixer_parameters().values())
    assert plan.stages[0].trained_parameters == added > 0
    assert plan.stages[0].memory.weights == weight_bytes(teacher, student)
    buffers = weight_bytes(teacher) - 4 * teacher.num_parameters()  # rotary frequencies, which no file holds
    student.save_pretrained(tmp_path / "student")
    stored = sum(tensor.nbytes for tensor in load_file(tmp_path / "student" / "model.safetensors").values())
    assert plan.student_bytes - buffers == stored == 4 * student.num_parameters()
    assert plan.disk_bytes == plan.student_bytes + plan.stages[0].checkpoint_bytes
    bare = student_on_meta(student.config)  # what streamed conversions go by
    assert sum(p.nbytes for p in bare.parameters()) == stored

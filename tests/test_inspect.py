"""`linearize inspect`: sizes from the config alone, equal to those of a model that has run."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_evaluation_outputs import tiny_llama, tiny_tokenizer
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, GPTJConfig, GPTJForCausalLM

from linearize.cli.main import main
from linearize.errors import InputError
from linearize.mixers.lolcats import LolcatsConfig
from linearize.mixers.sliding_window import SlidingWindowConfig
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.inspect import inspect_model
from linearize.modeling.probe import probe

PLAN = [LolcatsConfig(window=5, feature_dim=7), None, SlidingWindowConfig(window=11)]
KV_BYTES = 3 * (10 + 10) * 4  # key/value heads, key and value dimensions, fp32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random teacher and a student with two kinds of mixers and a kept layer."""
    path = tmp_path_factory.mktemp("inspect")
    teacher = tiny_llama(1)
    teacher.save_pretrained(path / "teacher")
    LinearizedForCausalLM.from_teacher(teacher, PLAN).save_pretrained(path / "student")
    tiny_tokenizer().save_pretrained(path / "student")
    return path


def test_a_student_layer_by_layer(folder: Path) -> None:
    inspected = inspect_model(folder / "student", contexts=(100, 3000))
    assert (inspected["kind"], inspected["family"], inspected["num_layers"], inspected["num_converted"]) == (
        "student",
        "llama",
        3,
        2,
    )
    assert [layer["mixer"] for layer in inspected["layers"]] == ["lolcats", "softmax", "sliding_window"]
    assert [layer["window"] for layer in inspected["layers"]] == [5, None, 11]
    maps = 2 * 6 * 10 * 7  # W of queries and of keys, per head
    assert [layer["mixer_parameters"] for layer in inspected["layers"]] == [maps + 6, 0, 0]
    assert [layer["bytes_per_token"] for layer in inspected["layers"]] == [0, KV_BYTES, 0]
    model = LinearizedForCausalLM.from_pretrained(folder / "student")
    assert inspected["parameters"] == sum(p.numel() for p in model.parameters())


@torch.inference_mode()
def test_the_bytes_are_those_of_a_full_cache(folder: Path) -> None:
    """Terraced 5 keeps up to 9 slots: reached at a position that ends a block."""
    model = LinearizedForCausalLM.from_pretrained(folder / "student").eval()
    cache = model(input_ids=torch.randint(0, 60, (1, 49)), use_cache=True).past_key_values
    inspected = inspect_model(folder / "student", contexts=(49,))
    for layer in (0, 2):
        assert cache.layers[layer].num_bytes == inspected["layers"][layer]["state_bytes"]
    kept = cache.layers[1]
    assert (kept.keys.nbytes + kept.values.nbytes) == 49 * inspected["bytes_per_token"]
    (row,) = inspected["cache"]
    assert row["student_bytes"] == inspected["state_bytes"] + 49 * KV_BYTES
    assert row["teacher_bytes"] == 3 * 49 * KV_BYTES and row["ratio"] == pytest.approx(
        row["teacher_bytes"] / row["student_bytes"], abs=1e-3
    )


def test_a_teacher_is_all_softmax(folder: Path) -> None:
    inspected = inspect_model(folder / "teacher", contexts=(7,))
    assert inspected["kind"] == "teacher" and inspected["num_converted"] == inspected["mixer_parameters"] == 0
    assert {layer["mixer"] for layer in inspected["layers"]} == {"softmax"}
    assert inspected["cache"] == [{"context": 7, "teacher_bytes": 3 * 7 * KV_BYTES}]
    model = tiny_llama(1)
    block = sum(p.numel() for p in model.model.layers[1].parameters())
    assert inspected["layers"][1]["parameters"] == block


@torch.inference_mode()
def test_a_window_of_the_teacher_limits_its_cache(tmp_path: Path) -> None:
    config = Gemma2Config(
        vocab_size=37, hidden_size=24, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, sliding_window=13, max_position_embeddings=64,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    inspected = inspect_model(tmp_path, contexts=(5, 50))
    assert [layer["window"] for layer in inspected["layers"]] == [13, None]
    per_token = 2 * (6 + 6) * 4
    assert [row["teacher_bytes"] for row in inspected["cache"]] == [2 * 5 * per_token, (13 + 50) * per_token]


def test_a_family_without_the_attention_interface_is_recognised_by_its_config(tmp_path: Path) -> None:
    config = GPTJConfig(vocab_size=31, n_positions=32, n_embd=20, n_layer=3, n_head=5, rotary_dim=2)
    GPTJForCausalLM(config).save_pretrained(tmp_path)
    inspected = inspect_model(tmp_path, contexts=(9,))
    cache = DynamicCache()
    model = GPTJForCausalLM.from_pretrained(tmp_path).eval()
    model(input_ids=torch.randint(0, 31, (1, 9)), past_key_values=cache, use_cache=True)
    with pytest.raises(InputError):
        probe(model)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert inspected["cache"] == [{"context": 9, "teacher_bytes": held}]
    assert [layer["parameters"] for layer in inspected["layers"]] == [
        sum(p.numel() for p in block.parameters()) for block in model.transformer.h
    ]


def test_no_weights_are_read(folder: Path, tmp_path: Path) -> None:
    expected = inspect_model(folder / "student")
    shutil.copytree(folder / "student", tmp_path / "student")
    weights = tmp_path / "student" / "model.safetensors"
    header = json.dumps({"lm_head.weight": {"dtype": "no such", "shape": [3], "data_offsets": [0, 3]}}).encode()
    weights.write_bytes(struct.pack("<Q", len(header)) + header + b"abc")  # of the stated size, and unreadable
    with pytest.raises(SafetensorError):
        load_file(weights)
    inspected = inspect_model(tmp_path / "student")
    assert {k: v for k, v in inspected.items() if k != "model"} == {k: v for k, v in expected.items() if k != "model"}


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a model folder"):
        inspect_model(tmp_path / "none")
    shutil.copytree(folder / "student", tmp_path / "student")
    path = tmp_path / "student" / "config.json"
    config = json.loads(path.read_text())
    config["plan"][0]["name"] = "lolcat"
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="lolcat"):
        inspect_model(tmp_path / "student")


def test_the_command_prints_a_table_or_one_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder / "student"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == inspect_model(folder / "student")
    assert main(["inspect", str(folder / "student")]) == 0
    out = capsys.readouterr().out
    assert "sliding_window" in out and "softmax" in out and "65,536" in out

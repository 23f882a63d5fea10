"""A GGUF file as teacher, by its path or its folder: read by transformers, written as an ordinary student's folder."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny
from teacher_folder import write_text
from transformers import PreTrainedModel

import linearize
from linearize.decoding.generate import generate_text
from linearize.decoding.loading import load_any
from linearize.errors import InputError
from linearize.evaluation.loading import Placement, load_models
from linearize.modeling.inspect import inspect_model
from linearize.modeling.io.model_source import find_model
from linearize.modeling.io.streamed_teacher import StreamedTeacher
from linearize.modeling.io.teacher import load_teacher
from linearize.planning.samples import build, read_config
from linearize.training.stages.external_teacher import load_other_teacher

gguf: Any = pytest.importorskip("gguf", reason="needs gguf (pip install linearize[gguf])")
LETTERS = "abcdefghijklmnopqrstuvwxyzARN0123456789:.,>"
TOKENS = ["<s>", "</s>", *LETTERS, "Ġ", "Ċ", "th", "the"]  # as byte-level BPE writes a space and a line's end
LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(path: Path, kind: str = "F32") -> PreTrainedModel:
    """A tiny Llama as llama.cpp's converter writes it, its matrices in `kind`; returns the model that it holds."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    model = tiny("llama", head_dim=16, vocab_size=len(TOKENS), max_position_embeddings=64, **sizes, **special)
    config: Any = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))  # control, normal
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in model.state_dict().items():
        values = _paired(tensor, 4 if "q_proj" in name else 2) if "q_proj" in name or "k_proj" in name else tensor
        where, array = name.removesuffix(".weight"), values.numpy()
        if where not in OUTSIDE:
            _, _, layer, part = where.split(".", 3)
        own = OUTSIDE[where] if where in OUTSIDE else f"blk.{layer}.{LAYER[part]}"
        if kind == "F32" or tensor.dim() < 2:
            writer.add_tensor(f"{own}.weight", array)
        else:
            number = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(f"{own}.weight", gguf.quants.quantize(array, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _paired(weight_OI: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of q and k in the order of llama.cpp, whose rotary positions turn neighbours."""
    parts = weight_OI.reshape(heads, 2, weight_OI.shape[0] // heads // 2, weight_OI.shape[1])
    return parts.swapaxes(1, 2).reshape(weight_OI.shape).contiguous()


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_read_by_path_and_by_folder(tmp_path: Path, kind: str) -> None:
    """A file with plain numbers keeps them; in 8 bits each is near: half a step of its 32, and 127 times the rounding
    of their fp16 scale (2 ** -11)."""
    path = tmp_path / "tiny.gguf"
    exact = write_gguf(path, kind)
    ids = torch.arange(2, 30)[None]
    for name in (path, str(tmp_path)):
        model, tokenizer = load_any(name, device="cpu")
        if kind == "F32":
            with torch.no_grad():
                torch.testing.assert_close(model(ids).logits, exact(ids).logits)
        for name_of, weight in exact.named_parameters():
            error = (model.get_parameter(name_of) - weight).abs().unflatten(-1, (-1, 32))
            step = weight.abs().unflatten(-1, (-1, 32)).amax(-1, keepdim=True) / 127
            assert (error <= (0.57 if kind == "Q8_0" else 0.0) * step).all()
        assert "quantization_config" not in model.config.to_dict() and model.dtype == torch.float32
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
        assert tokenizer.decode(tokenizer("the cat sat")["input_ids"]) == "the cat sat"


def test_converted_to_an_ordinary_student(tmp_path: Path) -> None:
    path, text, out = tmp_path / "tiny.gguf", tmp_path / "text.txt", tmp_path / "student"
    model = write_gguf(path)
    write_text(text)
    few = {"plan.mixer.window": 4, "data.length": 48, "data.heldout": 3, "stages.0.batch": 2, "stages.1.batch": 2}
    few |= {"stages.0.tokens": 300, "stages.1.tokens": 300}
    linearize.convert(path, data=[text], out=out, overrides=few, device="cpu")
    assert (out / "model.safetensors").is_file() and not list(out.glob("*.gguf"))
    path.unlink()
    student, tokenizer = load_any(out, device="cpu")
    assert torch.equal(student.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())["teacher"]
    assert tokenizer("the cat")["input_ids"][:1] == [TOKENS.index("the")]


def test_wherever_a_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    count = sum(p.numel() for p in write_gguf(path).parameters())
    for name in (path, tmp_path):
        assert inspect_model(name)["parameters"] == count
        assert sum(p.numel() for p in build(read_config(name), torch.float32).parameters()) == count
    assert generate_text(path, "the cat", max_new_tokens=3, device="cpu")
    (contestant,) = load_models([str(path)], None, [], Placement(device="cpu"), [])
    first = contestant.fingerprint
    write_gguf(path, "Q8_0")
    assert load_models([str(path)], None, [], Placement(device="cpu"), [])[0].fingerprint != first
    student = linearize.LinearizedForCausalLM.from_teacher(load_teacher(path)[0], [None] * 3, teacher_name=str(path))
    assert load_other_teacher(str(path), student).device.type == "cpu"


def test_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    refused = {
        "is a GGUF file, which is read as a whole: leave out --stream": lambda: StreamedTeacher(
            str(path), device=torch.device("cpu")
        ),
        "is a GGUF file, not a student": lambda: linearize.load(path),
        "quantized by gguf already, so base_weights 4bit": lambda: load_teacher(path, base="4bit"),
        "no such file": lambda: load_teacher(tmp_path / "other.gguf"),
    }
    for message, call in refused.items():
        with pytest.raises(InputError, match=message):
            call()
    (tmp_path / "second.gguf").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=r"2 GGUF files \(second.gguf, tiny.gguf\): give the path of one"):
        find_model(tmp_path)
    part = path.rename(tmp_path / "big-00001-of-00003.gguf")
    with pytest.raises(InputError, match="one of 3 parts"):
        find_model(part)
    path.write_bytes(b"no model")
    with pytest.raises(InputError, match="does not begin as a GGUF file"):
        find_model(path)
    path.write_bytes((tmp_path / "second.gguf").read_bytes())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs gguf, which is not installed: pip install linearize\[gguf\]"):
        find_model(path)

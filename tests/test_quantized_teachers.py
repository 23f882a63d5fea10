"""Teachers whose own files hold weights of bitsandbytes: converted as plain numbers, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from teacher_folder import write_teacher, write_text
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import linearize
from linearize.errors import InputError
from linearize.metrics.report import read_report
from linearize.modeling.io.model_source import find_model, read_config
from linearize.modeling.io.quantized import has_quantized
from linearize.modeling.io.quantized_teacher import check_readable
from linearize.modeling.io.teacher import load_teacher

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
BITS: dict[str, dict[str, Any]] = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "8bit": {"load_in_8bit": True},
}
FEW: dict[str, Any] = {
    "plan.mixer.window": 4, "data.heldout": 3, "data.length": 48, "stages.0.batch": 2, "stages.1.batch": 2,
    "stages.0.tokens": 400, "stages.1.tokens": 400,
}  # fmt: skip


def quantized(tmp_path: Path, bits: str, family: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Path:
    """A folder as `save_pretrained` of a quantized model writes it."""
    plain, folder = tmp_path / "plain", tmp_path / bits
    plain.mkdir()
    write_teacher(plain, family, dtype=dtype)
    config = BitsAndBytesConfig(**BITS[bits])
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype="auto").save_pretrained(folder)
    for file in plain.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    assert json.loads((folder / "config.json").read_text())["quantization_config"]
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])  # without and with biases, and weights turned
@pytest.mark.parametrize("bits", BITS)
def test_read_as_plain_numbers(tmp_path: Path, bits: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # where a CPU has AVX512-BF16, bitsandbytes' own layers compute in bf16 and refuse widths that 32 does not divide
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    folder = quantized(tmp_path, bits, family, torch.float32)
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")(ids).logits
        whole, _ = load_teacher(tmp_path / "plain")
        read, _ = load_teacher(folder)
        logits, exact = read(ids).logits, whole(ids).logits
    assert not has_quantized(read) and "quantization_config" not in read.config.to_dict()
    assert {name: (p.shape, p.dtype) for name, p in read.named_parameters()} == {
        name: (p.shape, p.dtype) for name, p in whole.named_parameters()
    }
    assert [type(m) for m in read.modules()] == [type(m) for m in whole.modules()]
    if bits == "8bit":  # products in 8 bits round the inputs too, and the weights were cast to fp16
        for name, weight in whole.named_parameters():
            step = weight.abs().amax(0 if family == "gpt2" else -1, keepdim=True) / 127
            assert ((read.get_parameter(name) - weight).abs() <= 0.6 * step).all()
        return
    assert (logits - expected).abs().max() < 1e-3 * (expected - exact).abs().max()


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_converted_through_all_stages(tmp_path: Path, bits: str) -> None:
    """In bf16 on a CPU, with the LoRA stage, and loaded again."""
    folder, text, out = quantized(tmp_path, bits), tmp_path / "text.txt", tmp_path / "student"
    write_text(text)
    student = linearize.convert(folder, data=[text], out=out, overrides=FEW, device="cpu")
    assert "quantization_config" not in student.config.teacher and not has_quantized(student)
    report = read_report(out)
    assert abs(report.student_loss - report.teacher_loss) < 1.0
    teacher, _ = load_teacher(folder)
    assert torch.equal(student.lm.model.embed_tokens.weight, teacher.model.embed_tokens.weight)


def test_refused_before_any_work(tmp_path: Path) -> None:
    folder, text = quantized(tmp_path, "4bit"), tmp_path / "text.txt"
    write_text(text)
    few = {**FEW, "stages.0.block": 1, "stages.1.tokens": 0}
    with pytest.raises(InputError, match="quantized by bitsandbytes, and --stream reads plain numbers"):
        linearize.convert(folder, data=[text], out=tmp_path / "student", overrides=few, device="cpu", stream=True)
    with pytest.raises(InputError, match="quantized by bitsandbytes already, so base_weights 4bit"):
        load_teacher(folder, base="4bit")
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    source = find_model(folder)
    with pytest.raises(InputError, match="quantized by gptq, which cannot be made plain here"):
        check_readable(source, read_config(source))
    with pytest.raises(InputError, match="quantized by gptq"):
        load_teacher(folder)

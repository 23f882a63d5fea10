"""Teachers' folders as people have them: tensors that nobody reads, adapters, wrappers' names, pad ids, nulls."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny
from safetensors.torch import load_file, save_file
from teacher_folder import TOKENS, write_teacher, write_text
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import linearize
from linearize.decoding.loading import load_any
from linearize.errors import InputError
from linearize.modeling.inspect import inspect_model
from linearize.modeling.io.streamed_teacher import StreamedTeacher
from linearize.modeling.io.teacher import load_teacher
from linearize.modeling.probe import body_sizes, probe
from linearize.planning.samples import build, read_config

WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"
CPU = torch.device("cpu")
Tensors = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "teacher"
    path.mkdir()
    write_teacher(path)
    return path


def change_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    tensors = change(load_file(folder / WEIGHTS))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def in_float8(tensors: Tensors, *, scales: bool) -> Tensors:
    """The layers' matrices in 8 bits, as static quantizers write them."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        made[name] = tensor
        if tensor.dim() == 2 and "layers" in name:
            scale = tensor.abs().max() / 448
            made[name] = (tensor / scale).to(torch.float8_e4m3fn)
            made |= {f"{name}_scale": scale} if scales else {}
    return made


def in_int8(tensors: Tensors) -> Tensors:
    scale = tensors[UP].abs().amax(1) / 127
    return {**tensors, UP: (tensors[UP] / scale[:, None]).round().to(torch.int8)}


REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "float8 with scales": (lambda t: in_float8(t, scales=True), r"21 such.*scales beside them \(.*weight_scale\)"),
    "float8 alone": (lambda t: in_float8(t, scales=False), "F8_E4M3.*no scales beside them"),
    "int8": (in_int8, rf"I8 \({re.escape(UP)}; 1 such"),
    "scales left over": (lambda t: {**t, f"{UP}_scale_inv": torch.ones(1)}, r"1 scales of quantized.*_scale_inv"),
    "a layer more": (lambda t: {**t, UP.replace(".1.", ".3."): t[UP].clone()}, r"1 tensors that .*layers\.3\."),
    "a value head": (lambda t: {**t, "v_head.summary.weight": torch.ones(3)}, r"v_head\.summary\.weight"),
    "DataParallel": (lambda t: {f"module.{k}": v for k, v in t.items()}, "'module.' in it"),
    "compiled": (lambda t: {f"_orig_mod.{k}": v for k, v in t.items()}, "'_orig_mod.' in it"),
    "compiled layers": (
        lambda t: {re.sub(r"(layers\.\d+\.)", r"\1_orig_mod.", k): v for k, v in t.items()}, "'_orig_mod.' in it",
    ),
    "compiled base model": (
        lambda t: {f"_orig_mod.{k.removeprefix('model.')}" if "lm_head" not in k else k: v for k, v in t.items()},
        "'_orig_mod.' in it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_tensors_that_nobody_reads_are_refused(folder: Path, case: str) -> None:
    change, message = REFUSED[case]
    change_tensors(folder, change)
    for load in (load_any, load_teacher, lambda path: StreamedTeacher(str(path), device=CPU)):
        with pytest.raises(InputError, match=message) as caught:
            load(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_printed_program_takes_a_wrappers_name_out(folder: Path, tmp_path: Path) -> None:
    before = load_teacher(folder)[0].state_dict()
    change_tensors(folder, REFUSED["compiled layers"][0])
    with pytest.raises(InputError) as caught:
        load_teacher(folder)
    command = shlex.split(str(caught.value).partition("take it out: ")[2])
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True, capture_output=True)
    for file in folder.glob("tokenizer*"):
        (tmp_path / "FIXED" / file.name).write_bytes(file.read_bytes())
    after = load_teacher(tmp_path / "FIXED")[0].state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_harmless_tensors_are_left_out(folder: Path) -> None:
    """Layers that predict further tokens, and what is computed from the config."""
    expected = load_teacher(folder)[0].state_dict()
    more = {"model.layers.3.eh_proj.weight": torch.ones(2, 2), "mtp.fc.weight": torch.ones(2, 2)}
    more |= {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(5)}
    change_tensors(folder, lambda tensors: {**tensors, **more})
    with pytest.raises(InputError, match=r"layers\.3\."):
        load_teacher(folder)
    change_config(folder, num_nextn_predict_layers=1)
    loaded = load_teacher(folder)[0].state_dict()
    assert all(torch.equal(expected[name], loaded[name]) for name in expected) and expected.keys() == loaded.keys()
    StreamedTeacher(str(folder), device=CPU)


def test_streams_compare_shapes(folder: Path) -> None:
    change_tensors(folder, lambda tensors: {**tensors, UP: tensors[UP][:-1]})
    with pytest.raises(InputError, match=r"up_proj\.weight of shape \(43, 30\)"):
        StreamedTeacher(str(folder), device=CPU)


def add_adapter(folder: Path, base: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj", "o_proj"])
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)


@pytest.mark.slow
def test_an_adapter_is_refused_alone_and_beside_weights(folder: Path, tmp_path: Path) -> None:
    add_adapter(tmp_path / "alone", folder)
    with pytest.raises(InputError, match=r"alone is an adapter, not a model: merge it first \(python -c") as caught:
        load_any(tmp_path / "alone")
    command = shlex.split(re.search(r"\((python -c .*)\)$", str(caught.value))[1])  # type: ignore[index]
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True, capture_output=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "MERGED").state_dict()
    plain = load_teacher(folder)[0].state_dict()
    changed = {name for name in plain if not torch.equal(plain[name], merged[name])}
    assert merged.keys() == plain.keys() and len(changed) == 3 * 2

    add_adapter(folder, folder)
    text = tmp_path / "text.txt"
    write_text(text)
    for use in (
        load_any,
        inspect_model,
        lambda path: StreamedTeacher(str(path), device=CPU),
        lambda path: linearize.convert(path, data=[text], out=tmp_path / "out"),
    ):
        with pytest.raises(InputError, match="next to the weights of a model"):
            use(folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pad", [len(TOKENS), 999, -1])
def test_a_pad_id_without_embedding_becomes_eos(folder: Path, tmp_path: Path, pad: int) -> None:
    change_config(folder, pad_token_id=pad)
    for name in ("generation_config.json", "tokenizer_config.json"):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": pad}))
    model, tokenizer = load_teacher(folder)
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.eos_token_id == 1
    assert inspect_model(folder)["parameters"] == sum(p.numel() for p in model.parameters())
    planned = build(read_config(folder), torch.float32)
    assert planned.config.pad_token_id == 1
    StreamedTeacher(str(folder), device=CPU)


def test_a_pad_token_added_to_the_tokenizer_alone(folder: Path, tmp_path: Path) -> None:
    """Rows of unequal length are padded in training and in generation: the id must have an embedding."""
    _, tokenizer = load_teacher(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    assert tokenizer.pad_token_id == len(TOKENS)
    model, tokenizer = load_teacher(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    rows = tokenizer(["the cat sat", "a red"], padding=True, padding_side="left", return_tensors="pt")
    assert model.generate(**rows, max_new_tokens=3).shape[0] == 2
    write_text(tmp_path / "text.txt")
    few = {"plan.mixer.window": 4, "data.length": 48, "data.heldout": 3, "stages.0.batch": 2, "stages.1.batch": 2}
    few |= {"stages.0.tokens": 200, "stages.1.tokens": 200}
    linearize.convert(folder, data=[tmp_path / "text.txt"], out=tmp_path / "student", overrides=few, device="cpu")
    assert load_any(tmp_path / "student")[1].pad_token_id == 1


def test_null_norms() -> None:
    """Some families leave one of two names empty; a layer's epsilon may be missing altogether."""
    config = AutoConfig.for_model("cohere", layer_norm_eps=None)
    assert body_sizes(config)["norm_eps"] == 1e-6
    config.rms_norm_eps = None
    config.layer_norm_eps = 3e-4
    assert body_sizes(config)["norm_eps"] == 3e-4


def test_a_null_that_a_family_forbids_is_one_line(folder: Path) -> None:
    change_config(folder, rms_norm_eps=None)
    for look in (load_any, inspect_model, read_config, lambda path: StreamedTeacher(str(path), device=CPU)):
        with pytest.raises(InputError, match="rms_norm_eps") as caught:
            look(folder)
        assert "\n" not in str(caught.value)


def test_sizes_of_a_probed_model_stay(folder: Path) -> None:
    model: PreTrainedModel = tiny("llama", rms_norm_eps=2e-5)
    assert probe(model)[0].shape.norm_eps == 2e-5

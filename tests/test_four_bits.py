"""Weights in 4 bits: their values, what shares them, and where they are an error."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from teacher_folder import write_teacher
from torch import nn

from linearize.errors import InputError
from linearize.mixers.lolcats import LolcatsConfig
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.io.assemble import whole_student
from linearize.modeling.io.integrity import model_fingerprint
from linearize.modeling.io.nf4 import nf4_config
from linearize.modeling.io.quantized import (
    has_quantized,
    is_quantized,
    parts_of,
    whole_weight,
    with_weight,
)
from linearize.modeling.io.teacher import load_teacher
from linearize.modeling.probe import probe
from linearize.training.blockwise.run import release_memory
from linearize.training.memory_simulation import tensor_bytes
from linearize.training.stages.lowrank import add_adapters

functional: Any = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
FAMILIES = ["llama", "qwen2", "gpt2"]  # without and with biases, and weights the other way round
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in made.items():
        write_teacher(folder, family)
    return made


def student_of(folder: Path) -> tuple[Any, LinearizedForCausalLM]:
    teacher, _ = load_teacher(folder, dtype=torch.float32, base="4bit")
    plan = [LolcatsConfig(window=5, feature_dim=7)] * 3
    return teacher, LinearizedForCausalLM.from_teacher(teacher, plan, teacher_name=str(folder))


def all_bytes(*models: nn.Module) -> int:
    weights = [weight for model in models for weight in model.parameters()]
    return tensor_bytes(part for weight in weights for part in (parts_of(weight).values() or [weight]))


def test_numbers_are_near(folders: dict[str, Path]) -> None:
    small, full = (load_teacher(folders["llama"], dtype=torch.float32, base=base)[0] for base in ("4bit", "full"))
    assert has_quantized(small) and not has_quantized(full)
    rounded = 0
    for name, weight in full.named_parameters():
        held = small.get_parameter(name)
        if not is_quantized(held):
            assert torch.equal(held, weight)
            continue
        rounded += 1
        numbers = whole_weight(held)
        assert numbers.shape == weight.shape and numbers.dtype == weight.dtype
        most = torch.stack([part.abs().max() for part in weight.flatten().split(64)])
        error = torch.stack([part.abs().max() for part in (numbers - weight).flatten().split(64)])
        assert (error <= 0.2 * most).all() and error.max() > 0.02 * most.max()  # half of nf4's widest gap: 0.152
    assert rounded == 3 * 7


def test_gradients_are_those_of_the_rounded_weight(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)  # a CPU where codes would be repacked
    teacher, student = student_of(folders["qwen2"])
    layer = student.lm.model.layers[1].self_attn.q_proj
    with torch.no_grad():
        layer(torch.randn(3, layer.in_features))  # a pass without gradients leaves the codes as they are
    x = torch.randn(3, layer.in_features, requires_grad=True)
    gradient = torch.randn(3, layer.out_features)
    numbers = whole_weight(teacher.model.layers[1].self_attn.q_proj.weight)
    assert layer.bias.abs().max() > 0.01
    torch.testing.assert_close(layer(x), x @ numbers.T + layer.bias)
    (layer(x) * gradient).sum().backward()
    torch.testing.assert_close(x.grad, gradient @ numbers)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_shares_the_codes(family: str, folders: dict[str, Path]) -> None:
    teacher, student = student_of(folders[family])
    assert all_bytes(teacher, student) == all_bytes(teacher) + tensor_bytes(student.mixer_parameters().values())
    states = [[id(m.weight.quant_state) for m in model.modules() if is_quantized(getattr(m, "weight", torch.ones(1)))]
              for model in (teacher, student)]  # fmt: skip
    own = [id(m.quant_state) for m in student.modules() if getattr(m, "quant_state", None) is not None]
    assert states[0] == states[1] == own and len(own) >= 3 * 4
    whole = load_teacher(folders[family])[0]
    assert [site.shape for site in probe(teacher)] == [site.shape for site in probe(whole)]


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_added_to_the_whole_weight(family: str, folders: dict[str, Path]) -> None:
    teacher, student = student_of(folders[family])
    ids = torch.arange(2, 21)[None]
    adapters = add_adapters(student, rank=2, alpha=3, dropout=0.0, targets=["o"])
    (name, layer), *_ = sorted(adapters.layers.items())
    assert adapters.layers and {p.dtype for p in adapters.parameters().values()} == {torch.float32}
    for parameter in adapters.parameters().values():
        nn.init.normal_(parameter, std=0.2)
    change = layer.get_delta_weight("default").detach()
    before = student(ids).logits
    adapters.remove(keep=False)
    torch.testing.assert_close(student(ids).logits, before, atol=1e-4, rtol=1e-4)
    assert not is_quantized(student.get_submodule(name).weight) and has_quantized(teacher)
    saved = whole_student(student)
    assert not has_quantized(saved)
    original = load_teacher(folders[family])[0].get_parameter(name.removeprefix("lm.") + ".weight")
    gained = saved.get_submodule(name).weight - original
    torch.testing.assert_close(gained.T if family == "gpt2" else gained, change, atol=1e-5, rtol=1e-4)


def test_the_fingerprint_knows_scales_and_codes(folders: dict[str, Path]) -> None:
    teacher, _ = load_teacher(folders["llama"], dtype=torch.float32, base="4bit")
    weight = teacher.model.layers[2].mlp.up_proj.weight
    seen = {model_fingerprint(teacher)}
    assert seen == {model_fingerprint(load_teacher(folders["llama"], dtype=torch.float32, base="4bit")[0])}
    for part in parts_of(weight).values():
        part.view(-1).view(torch.uint8)[-1] += 1
        seen.add(model_fingerprint(teacher))
    assert len(seen) == 1 + len(parts_of(weight)) == 7


def test_a_new_weight_needs_a_plain_layer() -> None:
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(5, 3, quant_type="nf4").to("cpu")
    weight_OI, x = torch.randn(3, 5), torch.randn(2, 5)
    made = with_weight(layer, weight_OI)
    assert type(made) is nn.Linear
    torch.testing.assert_close(made(x), x @ weight_OI.T + layer.bias)
    plain = nn.Linear(5, 3)
    assert with_weight(plain, weight_OI) is plain and torch.equal(plain.weight, weight_OI)


def test_a_device_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nf4_config(torch.float32, CPU).bnb_4bit_quant_type == "nf4"
    with pytest.raises(InputError, match=r"cannot hold weights in 4 bits on meta .* give another --device"):
        nf4_config(torch.float32, torch.device("meta"))
    monkeypatch.setattr(functional, "dequantize_4bit", lambda codes, state: torch.zeros(state.shape))
    with pytest.raises(InputError, match="rounds wrongly in 4 bits on cpu"):
        nf4_config(torch.float32, CPU)


@pytest.mark.slow
def test_loading_never_holds_the_whole_model(folders: dict[str, Path], tmp_path: Path) -> None:
    """In a process of its own, whose heap no other test has used."""
    wide = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8}
    write_teacher(tmp_path, "llama", num_key_value_heads=8, head_dim=64, **wide)
    file_bytes = (tmp_path / "model.safetensors").stat().st_size
    command = [sys.executable, __file__, str(folders["llama"]), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # the helpers of the tests too
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert file_bytes > 150e6 and 0.1 < int(done.stdout) / file_bytes < 0.5


def rise_while_loading(small: str, large: str) -> int:
    """Bytes that the process itself grows by (no file pages) at most, watched while a checkpoint is read."""
    load_teacher(small, base="4bit")  # the libraries themselves
    release_memory()
    start, seen, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(anonymous())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        model, _ = load_teacher(large, base="4bit")
    finally:
        done.set()
        watcher.join()
    assert has_quantized(model)
    return max(seen) - start


def anonymous() -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    print(rise_while_loading(*sys.argv[1:]))

"""Students whose weights are offloaded by accelerate (CPU memory, disk) between the calls of their modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import mixer, student_of, text, tiny
from torch import Tensor

from linearize.errors import InputError
from linearize.mixers import MIXERS
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.static.step import StaticStep

accelerate = pytest.importorskip("accelerate")
CPU = torch.device("cpu")
PARTS = ("embed_tokens", "norm", "rotary_emb", "layers.0", "layers.1", "layers.2")
REST = dict.fromkeys([*(f"lm.model.{part}" for part in PARTS), "lm.lm_head"], "cpu")
Place = Callable[[LinearizedForCausalLM, Path], object]
PLACES: dict[str, Place] = {
    "cpu_offload": lambda student, _: accelerate.cpu_offload(student, execution_device=CPU),
    "disk_offload": lambda student, folder: accelerate.disk_offload(student, folder, execution_device=CPU),
    "device_map": lambda student, folder: accelerate.dispatch_model(
        student,
        {**REST, "lm.model.layers.0": "disk", "lm.model.layers.1": "disk"},
        main_device=CPU, offload_dir=folder, force_hooks=True,
    ),
}  # fmt: skip


def made(name: str) -> LinearizedForCausalLM:
    torch.manual_seed(0)
    return student_of(tiny("llama", attention="sdpa"), [mixer(name), None, mixer(name)])


def answers(student: LinearizedForCausalLM) -> list[Tensor]:
    """Logits at once, in parts through a cache, after tokens that were dropped again, and greedy texts."""
    ids = text(2, 19)
    with torch.no_grad():
        results, cache = [student(ids, use_cache=False).logits], None
        for part in ids.split([7, 1, 11], dim=1):
            out = student(part, past_key_values=cache, use_cache=True)
            cache, results = out.past_key_values, [*results, out.logits]
        cache.layers[0].activate_past_recording(), cache.layers[2].activate_past_recording()
        student(ids[:, :5], past_key_values=cache)
        cache.crop(-3)
        results.append(student(ids[:, 5:9], past_key_values=cache).logits)
    options = {"max_new_tokens": 6, "do_sample": False}
    results.append(student.generate(ids, **options))
    results.append(student.generate(ids, use_cache=False, **options))
    results.append(student.generate(ids[:1], **options))
    return results


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("place", PLACES)
def test_an_offloaded_student_computes_what_it_did(name: str, place: str, tmp_path: Path) -> None:
    expected = answers(made(name))
    student = made(name)
    PLACES[place](student, tmp_path)
    own = [parameter for key, parameter in student.named_parameters() if key.startswith("lm.model.layers.0.")]
    assert own and all(parameter.is_meta for parameter in own), "nothing was offloaded: the test is blind"
    for actual, target in zip(answers(student), expected, strict=True):
        assert torch.equal(actual, target)


@pytest.mark.parametrize("name", MIXERS)
def test_a_student_is_loaded_with_layers_left_on_disk(name: str, tmp_path: Path) -> None:
    student = made(name)
    student.save_pretrained(tmp_path / "student")
    loaded = LinearizedForCausalLM.from_pretrained(
        tmp_path / "student", device_map={**REST, "lm.model.layers.0": "disk"}, offload_folder=tmp_path / "offload"
    )
    assert any(parameter.is_meta for parameter in loaded.parameters()), "nothing was offloaded: the test is blind"
    for actual, expected in zip(answers(loaded), answers(student), strict=True):
        assert torch.equal(actual, expected)


def test_adapters_are_not_lost_on_offloaded_weights(tmp_path: Path) -> None:
    peft, safetensors = pytest.importorskip("peft"), pytest.importorskip("safetensors.torch")
    made("lolcats").save_pretrained(tmp_path)
    peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    name = "base_model.model.lm.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 30), f"{name}.lora_B.weight": torch.ones(60, 2)}
    safetensors.save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(InputError, match="offloaded"):
        LinearizedForCausalLM.from_pretrained(
            tmp_path, device_map={**REST, "lm.model.layers.0": "disk"}, offload_folder=tmp_path / "offload"
        )


def test_a_static_step_of_an_offloaded_student_is_refused() -> None:
    student = made("lolcats")
    accelerate.cpu_offload(student, execution_device=CPU)
    with pytest.raises(InputError, match="offloaded"):
        StaticStep(student, batch=2)

"""Surgery is all or nothing, shares the teacher's tensors, and puts each mixer of the plan into its own layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, LAYERS, mixer, student_of, text, tiny
from transformers import AutoConfig, AutoModelForCausalLM

import linearize
from linearize.errors import InputError
from linearize.mixers import AttentionShape, MixerConfig
from linearize.modeling import LinearizedForCausalLM, probe
from linearize.modeling.attention import ATTENTION


def implementations(model: torch.nn.Module) -> list[str]:
    return [config._attn_implementation for config in probe.attention_configs(model)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3"])
def test_probing_changes_nothing_and_finds_the_sizes(family: str, training: bool) -> None:
    teacher = tiny(family, attention="sdpa").train(training)
    before, names = implementations(teacher), set(dict(teacher.named_modules()))
    sites = probe.probe(teacher)
    assert implementations(teacher) == before == ["sdpa"] * len(before)
    assert teacher.training == training and set(dict(teacher.named_modules())) == names
    sizes = {"deepseek_v3": (6, 6, 10, 5)}.get(family, (6, 3, 10, 10))
    heads, kv_heads, head_dim, value_dim = sizes
    theta = 1e6 if family == "gemma3_text" else 1e4
    width = teacher.config.hidden_size
    shape = AttentionShape(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        model_dim=width,
        rope_theta=theta,
    )
    assert {site.shape for site in sites} == {shape}
    assert [site.name for site in sites] == [f"model.layers.{i}.self_attn" for i in range(LAYERS)]
    limits = [5, None, 5] if family == "gemma3_text" else [None] * LAYERS
    assert [site.sliding_window for site in sites] == limits


def test_different_mixers_sit_in_different_layers() -> None:
    plan: list[MixerConfig | None] = [mixer("sliding_window", num_sinks=1), None, mixer(window=3, feature_map="t2r")]
    student = student_of(tiny("llama"), plan)
    assert {layer: result.config for layer, result in student.mixers().items()} == {0: plan[0], 2: plan[2]}
    assert {name.split(".")[3] for name in student.mixer_parameters()} == {"2"}
    assert student.config.mixers() == plan


def test_teacher_and_student_hold_the_same_tensors() -> None:
    teacher, ids = tiny("llama"), text(2, 23)
    expected = teacher(ids).logits
    student = student_of(teacher, mixer(window=3))
    held = {name: value.data_ptr() for name, value in student.lm.named_parameters()}
    assert all(held[name] == value.data_ptr() for name, value in teacher.named_parameters())
    assert torch.equal(teacher(ids).logits, expected)
    assert set(implementations(teacher)) == {"eager"} and ATTENTION in implementations(student.lm)
    assert not [name for name, _ in teacher.named_modules() if "mixer" in name]


def test_a_student_of_a_student_and_two_students_of_one_teacher() -> None:
    teacher, ids = tiny("llama"), text(2, 23)
    one, other = student_of(teacher, mixer(window=3)), student_of(teacher, mixer(window=3))
    expected = other(ids).logits
    with torch.no_grad():
        for parameter in one.mixer_parameters().values():
            parameter.add_(1)
    assert torch.equal(other(ids).logits, expected)
    assert not torch.equal(one(ids).logits, expected)


def test_a_plan_of_another_length_is_refused() -> None:
    with pytest.raises(InputError, match="the plan has 4 layers, llama has 3"):
        LinearizedForCausalLM.from_teacher(tiny("llama"), [mixer()] * 4)


def test_surgery_that_fails_half_way_leaves_the_teacher_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, ids, built = tiny("llama"), text(2, 23), []
    expected, names = teacher(ids).logits, set(dict(teacher.named_modules()))
    original: Any = type(mixer()).build

    def build(config: MixerConfig, shape: AttentionShape) -> Any:
        if len(built) == 2:
            raise RuntimeError("no memory")
        built.append(config)
        return original(config, shape)

    monkeypatch.setattr(type(mixer()), "build", build)
    with pytest.raises(RuntimeError, match="no memory"):
        LinearizedForCausalLM.from_teacher(teacher, [mixer()] * LAYERS)
    assert len(built) == 2
    assert torch.equal(teacher(ids).logits, expected) and set(dict(teacher.named_modules())) == names


def test_new_parameters_of_a_bf16_teacher_stay_fp32_on_disk_and_back(tmp_path: Path) -> None:
    tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path / "teacher")
    teacher, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", dtype="auto").eval(), text(2, 23)
    student = student_of(teacher, mixer(window=3))
    student.save_pretrained(tmp_path / "student")
    loaded = linearize.load(tmp_path / "student")
    for model in (student, loaded):
        assert {p.dtype for p in model.mixer_parameters().values()} == {torch.float32}
        assert {p.dtype for n, p in model.named_parameters() if ".mixer." not in n} == {torch.bfloat16}
    assert torch.equal(loaded(ids).logits, student(ids).logits)


def test_the_language_model_inside_a_model_with_images(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    sizes = {"vocab_size": 61, "hidden_size": 30, "intermediate_size": 44, "num_hidden_layers": LAYERS, "head_dim": 10,
             "num_attention_heads": 6, "num_key_value_heads": 3, "sliding_window": 5, "layer_types": kinds}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = AutoConfig.for_model("gemma3", text_config=sizes, vision_config=vision, mm_tokens_per_image=4,
                                  image_token_index=60, boi_token_index=59, eoi_token_index=58)  # fmt: skip
    torch.manual_seed(0)
    teacher, ids = AutoModelForCausalLM.from_config(config).eval(), text(2, 23) % 50 + 3
    exact = student_of(teacher, mixer(window=23))
    assert list(exact.mixers()) == [1]
    torch.testing.assert_close(exact(ids).logits, teacher(ids).logits, rtol=0, atol=2e-5)
    student = student_of(teacher, [None, mixer(window=3), None])
    student.save_pretrained(tmp_path)
    assert torch.equal(linearize.load(tmp_path)(ids).logits, student(ids).logits)
    greedy = student.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(greedy, student.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False))


def test_the_list_of_families_is_long_enough() -> None:
    needed = "llama mistral qwen2 qwen3 phi3 gemma2 gemma3_text olmo2 smollm3 granite bitnet mixtral qwen3_moe"
    assert set(needed.split()) <= set(FAMILIES)

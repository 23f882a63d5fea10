"""Mixers in the place of attention modules: surgery, later conversion, saving, what the teacher shows of itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import VOCABULARY, mixer, randomize_mixers, student_of, text, tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import linearize
from linearize.errors import InputError
from linearize.mixers import MIXERS
from linearize.mixers.layer_mixer import LayerMixerConfig
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.attention import MixerLayer
from linearize.modeling.attention_capture import attention_samples, calibrate
from linearize.modeling.projections import attention_weights

LAYER_MIXERS = sorted(name for name, config in MIXERS.items() if issubclass(config, LayerMixerConfig))
every_layer_mixer = pytest.mark.parametrize("name", LAYER_MIXERS)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(ids).logits
    return output


@every_layer_mixer
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "gpt_neox", "olmo2", "phi3"])
def test_a_hybrid_of_every_family_decodes_as_it_prefills(name: str, family: str) -> None:
    teacher = tiny(family).double()
    before = logits(teacher, text(2, 19))
    student = student_of(teacher, [mixer(name), None, mixer(name)])
    ids = text(2, 19)
    whole, cache, parts = logits(student, ids), None, []
    for part in ids.split([7, 1, 1, 10], dim=1):
        with torch.no_grad():
            out = student(part, past_key_values=cache, use_cache=True)
        cache, parts = out.past_key_values, [*parts, out.logits]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=2e-4)  # eager softmax rounds to fp32
    assert torch.equal(logits(teacher, ids), before)


@every_layer_mixer
def test_generate_runs_with_beams_and_assistants(name: str) -> None:
    student = student_of(tiny("llama", attention="sdpa"), [mixer(name), None, mixer(name)])
    ids = text(2, 9)
    beams = student.generate(ids, max_new_tokens=7, num_beams=3, do_sample=False)
    assert beams.shape == (2, 16)
    alone = student.generate(ids[:1], max_new_tokens=12, do_sample=False)
    guessed = student.generate(ids[:1], max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(alone, guessed)


@every_layer_mixer
def test_saved_in_bf16_what_must_stay_in_fp32_does(name: str, tmp_path: Path) -> None:
    teacher = tiny("llama", attention="sdpa")
    for parameter in teacher.parameters():  # not its buffers: a rotary table in bf16 would be another model
        parameter.data = parameter.data.bfloat16()
    student = student_of(teacher, [mixer(name), None, mixer(name)])
    student.save_pretrained(tmp_path / "s")
    loaded = linearize.load(tmp_path / "s")
    own, restored = dict(student.named_parameters()), dict(loaded.named_parameters())
    assert own.keys() == restored.keys()
    for key, value in own.items():
        assert restored[key].dtype == value.dtype and torch.equal(restored[key], value), key
    kinds = {x.dtype for x in student.mixer_parameters().values()}
    assert torch.bfloat16 in kinds
    assert torch.equal(logits(loaded, text(2, 9)), logits(student, text(2, 9)))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "s")
    assert isinstance(again, LinearizedForCausalLM)


@every_layer_mixer
def test_layers_converted_later_start_from_the_weights_of_then(name: str) -> None:
    teacher = tiny("llama", attention="sdpa")
    torch.manual_seed(3)
    student = LinearizedForCausalLM.from_teacher(teacher, [mixer(name), None, None])
    with torch.no_grad():  # a stage has moved the kept layer
        moved = student.lm.model.layers[2].self_attn
        moved.q_proj.weight = nn.Parameter(moved.q_proj.weight + 0.25)
    q_weight = attention_weights(moved, student.config.attention_shapes()[2]).q
    student.convert_layers({2: mixer(name)})
    assert sorted(student.mixers()) == [0, 2] and isinstance(student.lm.model.layers[2].self_attn, MixerLayer)
    own = [x for x in student.mixers()[2].parameters() if x.dim() == 2 and x.shape[1] == q_weight.shape[1]]
    assert any(torch.equal(x[i : i + len(q_weight)], q_weight) for x in own for i in range(len(x) - len(q_weight) + 1))
    assert student.config.layer_types == ["linearize_mixer", "full_attention", "linearize_mixer"]
    assert logits(student, text(1, 9)).shape == (1, 9, VOCABULARY)


def test_converting_step_by_step_is_converting_at_once() -> None:
    teacher, plan = tiny("llama", attention="sdpa"), [mixer(), None, mixer("sliding_window")]
    at_once = LinearizedForCausalLM.from_teacher(teacher, plan)
    stepwise = LinearizedForCausalLM.from_teacher(teacher, [plan[0], None, None])
    assert not torch.equal(logits(stepwise, text(2, 31)), logits(at_once, text(2, 31)))
    stepwise.convert_layers({2: plan[2]})
    assert stepwise.config.plan == at_once.config.plan
    assert torch.equal(logits(stepwise, text(2, 31)), logits(at_once, text(2, 31)))
    for layer in (0, 3, -1):
        with pytest.raises(InputError, match=rf"layer {layer} cannot be converted.* are \[1\]"):
            stepwise.convert_layers({1: mixer(), layer: mixer()})
    assert sorted(stepwise.mixers()) == [0, 2]


@every_layer_mixer
def test_a_single_branch_of_a_layer_mixer_is_refused(name: str) -> None:
    student = student_of(tiny("llama", attention="sdpa"), [None, mixer(name), None])
    with pytest.raises(InputError, match=f"layer 1 holds {name}"):
        student(text(1, 5), branch="window")


def test_attention_that_no_layer_mixer_can_start_from_is_refused_and_left_alone() -> None:
    teacher = tiny("deepseek_v3", attention="sdpa")
    before = logits(teacher, text(1, 9))
    with pytest.raises(InputError, match=r"no query, key and value projections.*lolcats"):
        LinearizedForCausalLM.from_teacher(teacher, [None, mixer("mamba2"), None])
    assert torch.equal(logits(teacher, text(1, 9)), before)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_samples_are_what_the_teachers_attention_did(family: str) -> None:
    teacher, ids = tiny(family), text(2, 23)
    positions = torch.cat([torch.arange(9), torch.arange(14)])[None].expand(2, -1)
    before = [m.config._attn_implementation for m in teacher.modules() if hasattr(m, "config")]
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    for i, block in enumerate(teacher.model.layers):
        block.self_attn.register_forward_hook(
            lambda _m, args, kwargs, out, i=i: seen.update({i: (kwargs["hidden_states"], out[0])}), with_kwargs=True
        )
    samples = attention_samples(teacher, [{"input_ids": ids, "position_ids": positions}], [0, 2])
    assert sorted(samples) == [0, 2] and [len(x) for x in samples.values()] == [1, 1]
    assert [m.config._attn_implementation for m in teacher.modules() if hasattr(m, "config")] == before
    teacher(ids[:, 9:], use_cache=False)  # the second document alone
    for layer, (sample,) in samples.items():
        hidden, output = seen[layer]
        torch.testing.assert_close(sample.output_BTM[:, 9:], output, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sample.hidden_BTM[:, 9:], hidden, rtol=1e-4, atol=1e-5)
        attention = teacher.model.layers[layer].self_attn
        torch.testing.assert_close(attention.o_proj(sample.y_BHTV.transpose(1, 2).flatten(2)), sample.output_BTM)
        assert sample.layout.position_BT is not None and sample.window == (
            5 if family == "gemma2" and layer != 1 else None
        )


def test_only_mixers_that_ask_for_it_are_calibrated() -> None:
    teacher = tiny("llama", attention="sdpa")
    asks, copies = mixer("gated_delta_net", initialise="calibrate"), mixer("gated_delta_net")
    torch.manual_seed(0)
    student = LinearizedForCausalLM.from_teacher(teacher, [asks, copies, asks])
    before = {name: x.clone() for name, x in student.named_parameters()}
    calibrate(student, teacher, [{"input_ids": text(2, 40)}], layers=[0, 1])
    moved = {name.split(".")[3] for name, x in student.named_parameters() if not torch.equal(x, before[name])}
    assert moved == {"0"}
    with pytest.raises(InputError, match="retention cannot be calibrated"):
        calibrate(
            student_of(teacher, mixer("retention", initialise="calibrate")), teacher, [{"input_ids": text(2, 40)}]
        )


def test_randomised_mixers_are_no_longer_where_they_started() -> None:
    """Guards the tests above: what `student_of` gives is away from the start."""
    student = LinearizedForCausalLM.from_teacher(tiny("llama"), [mixer("mamba2"), None, None])
    before = {name: x.clone() for name, x in student.mixer_parameters().items()}
    randomize_mixers(student)
    assert all(not torch.equal(x, before[name]) for name, x in student.mixer_parameters().items())

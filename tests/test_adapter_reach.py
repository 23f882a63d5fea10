"""Adapters of peft on a student: which layers they reach, and that they are saved, loaded and merged without loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import mixer, student_of, text, tiny
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model

import linearize
from linearize.errors import InputError
from linearize.mixers import MIXERS
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.adapter_reach import adapter_reach
from linearize.training.stages.lowrank import LowRankConfig

OWN_NAMES = {"mamba", "mamba2", "gated_delta_net"}  # mixers without a layer called q_proj


def hybrid(name: str, family: str = "llama") -> LinearizedForCausalLM:
    """Layers 0 and 2 converted, layer 1 kept."""
    return student_of(tiny(family, attention="sdpa"), [mixer(name), None, mixer(name)])


def adapted(student: LinearizedForCausalLM, targets: Any) -> Any:
    return get_peft_model(
        student, LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    ).eval()


@pytest.mark.parametrize("name", MIXERS)
def test_all_linear_reaches_every_layer_and_its_mixer(name: str) -> None:
    reach = adapter_reach(adapted(hybrid(name), "all-linear"))
    assert reach.reached == (0, 2) and list(reach.kept) == [1]
    for names in (*reach.converted.values(), *reach.kept.values()):
        assert "mlp.down_proj" in names and any(each.startswith("self_attn.") for each in names)
    assert str(reach) == "adapters reach 2 of 2 converted layers and 1 of 1 kept ones"


@pytest.mark.parametrize("name", MIXERS)
def test_targets_of_the_kept_layers_alone_are_an_error(name: str) -> None:
    model = adapted(hybrid(name), ["q_proj", "v_proj"])
    if name not in OWN_NAMES:
        assert adapter_reach(model).reached == (0, 2)
        return
    with pytest.raises(InputError, match="q_proj, v_proj reach none of the 2 converted layers") as caught:
        adapter_reach(model)
    message = str(caught.value)
    assert "\n" not in message and "out_proj" in message and "lora" not in message and "base_layer" not in message


@pytest.mark.parametrize(
    ("family", "target"), [("gpt2", "c_attn"), ("gpt_neox", "query_key_value"), ("phi3", "o_proj")]
)
def test_other_families_name_their_layers_in_their_own_way(family: str, target: str) -> None:
    reach = adapter_reach(adapted(hybrid("lolcats", family), [target]))
    assert reach.reached == (0, 2)
    assert all(names == (names[0],) and names[0].endswith(f".{target}") for names in reach.converted.values())


def test_some_layers_may_be_left_out_and_are_named() -> None:
    targets = ["lm.model.layers.2.self_attn.q_proj", "lm.model.layers.1.mlp.up_proj"]
    reach = adapter_reach(adapted(hybrid("lolcats"), targets))
    assert (reach.reached, reach.converted[0], reach.kept[1]) == ((2,), (), ("mlp.up_proj",))
    assert str(reach) == "adapters reach 1 of 2 converted layers and 1 of 1 kept ones; not layers 0"


def test_what_is_no_student_or_has_no_adapter_is_an_error() -> None:
    with pytest.raises(InputError, match="holds no student"):
        adapter_reach(adapted(tiny("llama"), ["q_proj"]))
    with pytest.raises(InputError, match="no module reach none"):
        adapter_reach(hybrid("lolcats"))


@pytest.mark.parametrize("name", sorted(OWN_NAMES))
def test_our_own_stage_refuses_adapters_that_reach_no_converted_layer(name: str) -> None:
    student, teacher = hybrid(name), tiny("llama")
    stage = LowRankConfig(tokens=100, lr=1e-3)
    with pytest.raises(InputError, match="reach none of the 2 converted layers"):
        stage.check(student, teacher)
    for allowed in ({"targets": ("all",)}, {"targets": ("q", "down_proj")}, {"train_mixers": True}):
        LowRankConfig(tokens=100, lr=1e-3, **allowed).check(student, teacher)  # type: ignore[arg-type]
    stage.check(hybrid("lolcats"), teacher)


@pytest.mark.parametrize("name", ["lolcats", "mamba2", "gated_delta_net"])
def test_adapters_are_saved_loaded_and_merged(name: str, tmp_path: Path) -> None:
    hybrid(name).save_pretrained(tmp_path / "student")
    ids = text(2, 9)
    model = adapted(linearize.load(tmp_path / "student"), "all-linear")
    with torch.no_grad():
        bare, expected = linearize.load(tmp_path / "student")(ids).logits, model(ids).logits
    assert (bare - expected).abs().max() > 0.1
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(linearize.load(tmp_path / "student"), tmp_path / "adapter")
    by_itself = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    attached = linearize.load(tmp_path / "student")
    attached.load_adapter(str(tmp_path / "adapter"))
    for loaded in (again, by_itself, attached):
        assert adapter_reach(loaded).reached == (0, 2)
        with torch.no_grad():
            torch.testing.assert_close(loaded.eval()(ids).logits, expected, rtol=1e-5, atol=1e-5)
    merged = again.merge_and_unload()
    assert isinstance(merged, LinearizedForCausalLM)
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(linearize.load(tmp_path / "merged")(ids).logits, expected, rtol=1e-4, atol=1e-4)

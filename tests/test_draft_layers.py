"""A model with some of its layers: exactly these, with everything that belongs to them, saved and loaded alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, LAYERS, mixer, student_of, text, tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import linearize
from linearize.errors import InputError
from linearize.mixers import MixerConfig
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.truncate import block_name, truncate

CASES = [  # families whose layers differ among themselves, and some where all are alike
    ("llama", [0, 2]), ("llama", [1]), ("llama", [0, 1, 2]), ("mistral", [1, 2]), ("gemma2", [1, 2]),
    ("gemma3_text", [0, 1]), ("gemma3_text", [1]), ("cohere2", [1, 2]), ("smollm3", [1, 2]), ("smollm3", [0, 2]),
    ("granite", [0, 2]), ("qwen3_moe", [2]), ("gpt2", [0, 2]), ("gpt_neox", [1, 2]),
]  # fmt: skip


def logits(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(ids, **inputs).logits
    return result


def by_hand(model: PreTrainedModel, sites: list[str], layers: list[int], ids: Tensor) -> Tensor:
    """The whole model's logits with all other layers handing on what they are given."""

    def skip(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    others = [model.get_submodule(block_name(site)) for i, site in enumerate(sites) if i not in layers]
    hooks = [block.register_forward_hook(skip, with_kwargs=True) for block in others]
    try:
        return logits(model, ids)
    finally:
        for hook in hooks:
            hook.remove()


def sites_of(model: PreTrainedModel) -> list[str]:
    sites = LinearizedForCausalLM.from_teacher(model, [None] * LAYERS).config.attention
    return [f"lm.{site}" for site in sites] if isinstance(model, LinearizedForCausalLM) else sites


@pytest.mark.parametrize(("family", "layers"), CASES)
def test_a_teacher_with_these_layers_alone(family: str, layers: list[int], tmp_path: Path) -> None:
    model, ids = tiny(family), text(2, 13)
    before = logits(model, ids)
    draft = truncate(model, layers)
    expected = by_hand(model, sites_of(model), layers, ids)
    actual = logits(draft, ids)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)
    assert len(layers) == LAYERS or (actual - before).abs().max() > 0.05
    assert torch.equal(logits(model, ids), before) and model.config.num_hidden_layers == LAYERS
    assert draft.config.num_hidden_layers == len(layers)
    assert {p.data_ptr() for p in draft.parameters()} <= {p.data_ptr() for p in model.parameters()}, "tensors copied"
    draft.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert torch.equal(logits(loaded, ids), actual)


def test_what_the_config_says_by_layer_is_cut_alike() -> None:
    gemma, smol = tiny("gemma3_text"), tiny("smollm3")
    assert truncate(gemma, [0, 1]).config.layer_types == ["sliding_attention", "full_attention"]
    assert truncate(gemma, [1]).config.layer_types == ["full_attention"]
    assert truncate(smol, [1, 2]).config.no_rope_layers == [0, 1]
    assert truncate(tiny("qwen3_moe", mlp_only_layers=[0, 2]), [1, 2]).config.mlp_only_layers == [1]
    assert (len(gemma.config.layer_types), smol.config.no_rope_layers) == (LAYERS, [1, 0, 1])


def test_layers_that_no_config_describes_are_refused() -> None:
    model = tiny("deepseek_v3")  # its first two layers have no experts
    with pytest.raises(InputError, match=r"layer 2 would be another kind of layer in a draft of layers \[0, 2\]"):
        truncate(model, [0, 2])
    assert truncate(model, [0, 1]).config.num_hidden_layers == 2


PLANS: dict[str, list[MixerConfig | None]] = {
    "hybrid": [mixer("lolcats"), None, mixer("mamba2")],
    "linear": [mixer("gla"), mixer("lolcats", window=3), mixer("gated_delta_net")],
}


@pytest.mark.parametrize("layers", [[0], [1, 2], [0, 2]])
@pytest.mark.parametrize("plan", PLANS)
def test_a_students_draft_keeps_its_mixers(plan: str, layers: list[int], tmp_path: Path) -> None:
    student, ids = student_of(tiny("smollm3"), PLANS[plan]), text(2, 17)
    before = logits(student, ids)
    draft: Any = truncate(student, layers)
    result = logits(draft, ids)
    sites = [f"lm.{site}" for site in student.config.attention]
    torch.testing.assert_close(result, by_hand(student, sites, layers, ids), atol=2e-5, rtol=0)
    assert torch.equal(logits(student, ids), before) and (result - before).abs().max() > 0.05
    assert draft.config.plan == [student.config.plan[layer] for layer in layers]
    assert draft.config.shapes == [student.config.shapes[layer] for layer in layers]
    assert draft.config.attention == student.config.attention[: len(layers)]
    assert draft.config.teacher["no_rope_layers"] == [[1, 0, 1][layer] for layer in layers]
    assert draft.config.num_hidden_layers == len(layers) and student.config.num_hidden_layers == LAYERS
    assert set(draft.mixers()) == {new for new, layer in enumerate(layers) if PLANS[plan][layer] is not None}
    draft.save_pretrained(tmp_path)
    loaded: Any = linearize.load(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(logits(loaded, ids), result, atol=1e-6, rtol=0)
    assert sorted(loaded._keep_in_fp32_modules_strict) == sorted(draft._keep_in_fp32_modules_strict)


def test_a_students_draft_decodes_with_its_own_states() -> None:
    draft: Any = truncate(student_of(tiny("llama"), PLANS["hybrid"]), [0, 2])
    ids = text(1, 23)
    whole = logits(draft, ids)
    with torch.no_grad():
        first = draft(ids[:, :9], use_cache=True)
        rest = [draft(ids[:, t : t + 1], past_key_values=first.past_key_values).logits for t in range(9, 23)]
    assert len(first.past_key_values.layers) == 2
    torch.testing.assert_close(torch.cat([first.logits, *rest], 1), whole, atol=3e-5, rtol=0)


def test_tied_embeddings_stay_tied() -> None:
    draft = truncate(tiny("llama", tie_word_embeddings=True), [1])
    assert draft.get_output_embeddings().weight is draft.get_input_embeddings().weight
    assert set(FAMILIES) >= {family for family, _ in CASES}

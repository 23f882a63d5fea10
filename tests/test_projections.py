"""Projections of every family: the weights that a layer mixer starts from, and the keys of a gate."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import FAMILIES, LAYERS, mixer, student_of, text, tiny
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from linearize.errors import InputError
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.probe import probe, routed
from linearize.modeling.projections import attention_weights, key_projection
from linearize.training.stages.lowrank import add_adapters

CAPTURE = "tests_capture_qkv"
HEAD = {"head_dim": 10}
MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "n_group": 1, "topk_group": 1}
BART = {
    "d_model": 36, "decoder_layers": LAYERS, "decoder_attention_heads": 6, "decoder_ffn_dim": 44, "is_decoder": True,
    "is_encoder_decoder": False,
}  # fmt: skip
WIDE = {"hidden_size": 36}
MORE: dict[str, dict[str, Any]] = {
    "apertus": WIDE, "arcee": HEAD, "bart": BART, "biogpt": WIDE, "cohere": WIDE, "cwm": {**HEAD, "sliding_window": 5},
    "dots1": {**WIDE, **HEAD, **MOE, "n_shared_experts": 1}, "ernie4_5": HEAD, "exaone4": WIDE, "gemma": HEAD,
    "glm": HEAD, "glm4_moe": {**WIDE, **HEAD, **MOE}, "gpt-sw3": WIDE, "gpt_bigcode": {**WIDE, "multi_query": True},
    "granitemoe": WIDE, "hunyuan_v1_dense": HEAD, "hyperclovax": WIDE, "jais2": WIDE,
    "ministral": {**HEAD, "sliding_window": 5}, "nanochat": WIDE, "olmo": WIDE, "olmo3": WIDE, "olmoe": WIDE,
    "persimmon": {"hidden_size": 48, "qk_layernorm": True}, "phi": {"hidden_size": 48}, "phimoe": WIDE,
    "qwen2_moe": WIDE, "seed_oss": HEAD, "vaultgemma": HEAD,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES if family != "deepseek_v3"},  # no such projections: refused
    **{family: (family, changes) for family, changes in MORE.items()},
    "gpt_bigcode by head": ("gpt_bigcode", {**WIDE, "multi_query": False}),
    "llama biased": ("llama", {"attention_bias": True}),
    "gpt2 by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
}
FUSED = ("phi3", "gpt_neox", "gpt2", "gpt_bigcode", "gpt_bigcode by head")


def teacher_of(case: str, **changes: Any) -> PreTrainedModel:
    family, own = CASES[case]
    return tiny(family, **{**own, **changes})


def _capture(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *,
    captured: dict[nn.Module, tuple[Tensor, ...]], **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    captured[module] = (query, key, value)
    return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2), None


AttentionInterface.register(CAPTURE, _capture)


@torch.no_grad()
def at_the_first_token(teacher: PreTrainedModel, name: str) -> tuple[Tensor, list[Tensor]]:
    """The input of an attention module at position 0, and the q, k, v `[3, heads D]` that its attention sees there,
    where rotary positions change nothing; its norms (of q and k) are taken out."""
    module, captured, hidden = teacher.get_submodule(name), {}, []
    for part in module.modules():
        if "norm" in type(part).__name__.lower():
            part.forward = lambda x, *_args, **_kwargs: x
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: hidden.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with routed(teacher, CAPTURE):
        teacher(text(3, 1), use_cache=False, captured=captured)
    hook.remove()
    return hidden[0][:, 0], [x[:, :, 0].flatten(1) for x in captured[module]]


@pytest.mark.parametrize("case", CASES)
def test_a_layer_mixer_starts_from_what_the_teachers_attention_sees(case: str) -> None:
    teacher = teacher_of(case)
    for site in probe(teacher):
        assert site.readable
        weights = attention_weights(teacher.get_submodule(site.name), site.shape)
        hidden, seen = at_the_first_token(teacher, site.name)
        starts = (weights.q, weights.q_bias), (weights.k, weights.k_bias), (weights.v, weights.v_bias)
        for letter, (weight, bias), actual in zip("qkv", starts, seen, strict=True):
            projected = nn.functional.linear(hidden, weight, bias)
            factor = (projected * actual).sum() / projected.square().sum()  # a family's scale of the scores
            assert factor > 0.1 and (letter == "q" or abs(factor - 1) < 1e-4)
            torch.testing.assert_close(factor * projected, actual, rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_key_projection_gives_the_keys_of_the_start(case: str) -> None:
    teacher = teacher_of(case)
    site = probe(teacher)[1]
    module, hidden = teacher.get_submodule(site.name), torch.randn(2, 7, site.shape.model_dim)
    weights = attention_weights(module, site.shape)
    expected = nn.functional.linear(hidden, weights.k, weights.k_bias).unflatten(-1, (site.shape.num_kv_heads, -1))
    torch.testing.assert_close(key_projection(module, hidden, site.shape), expected.transpose(1, 2), rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", [case for case in FUSED if case != "gpt2"])
def test_adapters_on_a_fused_projection_are_what_they_merge_to(case: str) -> None:
    student, ids = student_of(teacher_of(case, sliding_window=None), mixer("gla")), text(2, 19)
    with torch.no_grad():
        before = student(ids).logits
        adapters = add_adapters(student, rank=3, alpha=6, dropout=0.0, targets=["q"])
        for name, parameter in adapters.parameters().items():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1), std=0.3)
        adapted = student(ids).logits
        adapters.remove(keep=False)
        merged = student(ids).logits
    assert (merged - before).abs().max() > 0.1, "the adapters change nothing: the test is blind"
    torch.testing.assert_close(adapted, merged, rtol=0, atol=3e-5)


@pytest.mark.parametrize("case", FUSED)
def test_gradients_reach_the_key_rows_of_a_fused_projection(case: str) -> None:
    torch.manual_seed(2)
    student, ids = student_of(teacher_of(case, sliding_window=None), mixer("gla")).double(), text(2, 19)
    module: Any = student.lm.get_submodule(student.config.attention[0])
    weight = next(getattr(module, name).weight for name in ("qkv_proj", "c_attn", "query_key_value")
                  if hasattr(module, name))  # fmt: skip
    weight.requires_grad_(True)
    direction = torch.randn_like(weight)
    direction_out = torch.randn(student(ids).logits.shape, dtype=torch.float64)

    def loss() -> Tensor:
        return (student(ids, use_cache=False).logits * direction_out).sum()

    loss().backward()
    along, losses = float((weight.grad * direction).sum()), []
    with torch.no_grad():
        for step in (1e-4, -1e-4):
            weight.add_(step * direction)
            losses.append(float(loss()))
            weight.sub_(step * direction)
    assert along == pytest.approx((losses[0] - losses[1]) / 2e-4, rel=1e-3)  # norms in fp32


def weights_of(module: nn.Module, shape: Any) -> list[Tensor]:
    weights = attention_weights(module, shape)
    return [x.clone() for x in (weights.q, weights.k, weights.v, weights.o)]


@pytest.mark.parametrize("case", ["llama", "phi3", "gpt_neox"])
def test_a_start_from_projections_with_adapters_has_their_product(case: str) -> None:
    peft = pytest.importorskip("peft")
    teacher = teacher_of(case)
    site = probe(teacher)[1]
    plain = weights_of(teacher.get_submodule(site.name), site.shape)
    config = peft.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(teacher, config)
    with torch.no_grad():
        read = weights_of(teacher.get_submodule(site.name), site.shape)
    merged = weights_of(adapted.merge_and_unload().get_submodule(site.name), site.shape)
    for before, actual, expected in zip(plain, read, merged, strict=True):
        assert (expected - before).abs().max() > 0.05, "the adapters change nothing: the test is blind"
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_a_layer_in_a_form_of_its_own_is_read_by_calling_it() -> None:
    class Rounded(nn.Module):
        """A weight in 8 bits and its scale, as checkpoints in float8 are."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            scale = linear.weight.detach().abs().amax() / 448
            self.weight = nn.Parameter((linear.weight.detach() / scale).to(torch.float8_e4m3fn), requires_grad=False)
            self.weight_scale, self.bias = nn.Parameter(scale, requires_grad=False), None

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.weight.to(x.dtype) * self.weight_scale).T

    teacher = tiny("llama")
    site = probe(teacher)[1]
    module: Any = teacher.get_submodule(site.name)
    plain = weights_of(module, site.shape)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(module, name, Rounded(getattr(module, name)))
    for actual, exact in zip(weights_of(module, site.shape), plain, strict=True):
        assert 0 < (actual - exact).abs().max() < 0.1 * exact.abs().max()
    module.k_proj.forward = lambda x: x.nonsense
    with pytest.raises(InputError, match="a projection of type Rounded cannot be read"):
        attention_weights(module, site.shape)


def test_an_offloaded_teacher_is_refused_and_unchanged() -> None:
    accelerate = pytest.importorskip("accelerate")
    teacher, ids = tiny("llama"), text(2, 9)
    expected = teacher(ids).logits
    accelerate.cpu_offload(teacher, execution_device=torch.device("cpu"))
    for plan in (mixer("mamba2"), mixer("lolcats")):
        with pytest.raises(InputError, match="offloaded"):
            LinearizedForCausalLM.from_teacher(teacher, [plan] * LAYERS)
    assert torch.equal(teacher(ids).logits, expected)


def test_a_copy_of_a_student_reads_its_own_projections() -> None:
    """The keys come from the module that is called, not from the one that was converted."""
    student, ids = student_of(tiny("phi3", sliding_window=None), mixer("gla")), text(1, 9)
    other, expected = copy.deepcopy(student), student(ids).logits
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "qkv_proj" in name:
                parameter.zero_()
    assert torch.equal(student(ids).logits, expected) and not torch.equal(other(ids).logits, expected)


class Shuffled(nn.Module):
    """A projection whose outputs are in an order that is known to nobody."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).roll(7, -1)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_projections_that_attention_sees_otherwise_are_no_start(name: str) -> None:
    """As in code of unknown families: the same names, another layout."""
    teacher = tiny("llama")
    attention = type(teacher.model.layers[1].self_attn)

    class Other(attention):
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            plain = getattr(self, name)
            setattr(self, name, Shuffled(plain))
            try:
                return super().forward(hidden_states, *args, **kwargs)
            finally:
                setattr(self, name, plain)

    teacher.model.layers[1].self_attn.__class__ = Other
    for dtype in (torch.bfloat16, torch.float32):
        assert [site.readable for site in probe(copy.deepcopy(teacher).to(dtype))] == [True, False, True]
    for plan in ("mamba2", "retention", "gla"):
        with pytest.raises(InputError, match=f"{plan} cannot start from layer 1 of llama"):
            LinearizedForCausalLM.from_teacher(teacher, [mixer(plan)] * LAYERS)
    for plan in (mixer("lolcats"), mixer("mamba2", initialise="random")):
        assert len(LinearizedForCausalLM.from_teacher(teacher, [plan] * LAYERS).mixers()) == LAYERS

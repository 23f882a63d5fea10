"""Tiny models with random weights (norms too), sizes odd and unequal where the family allows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from linearize.mixers import MIXERS, MixerConfig
from linearize.modeling import LinearizedForCausalLM

VOCABULARY = 61
LAYERS = 3
LOCAL = 5  # tokens that a limited layer of a teacher sees: shorter than any text in the tests
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 30, "intermediate_size": 44, "num_hidden_layers": LAYERS,
    "num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 256, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
HEAD = {"head_dim": 10}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 20}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": HEAD,
    "mistral": {**HEAD, "sliding_window": LOCAL},
    "ministral3": {**HEAD},
    "qwen2": {"hidden_size": 36},
    "qwen3": HEAD,
    "phi3": {"hidden_size": 36, "sliding_window": LOCAL},
    "gemma2": {**HEAD, "sliding_window": LOCAL, "layer_types": SLIDING, "query_pre_attn_scalar": 7},
    "gemma3_text": {**HEAD, "sliding_window": LOCAL, "layer_types": SLIDING, "query_pre_attn_scalar": 7},
    "olmo2": {"hidden_size": 36},
    "smollm3": {"hidden_size": 36, "no_rope_layers": [1, 0, 1]},
    "granite": {
        "hidden_size": 36, "attention_multiplier": 0.3, "residual_multiplier": 0.7, "embedding_multiplier": 1.3,
        "logits_scaling": 1.7,
    },
    "bitnet": {"hidden_size": 36},
    "mixtral": {"hidden_size": 36, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {"hidden_size": 36, "head_dim": 8, "num_experts": 3, **EXPERTS},
    "glm4": {**HEAD, "partial_rotary_factor": 0.5},
    "starcoder2": {"hidden_size": 36, "sliding_window": LOCAL},
    "cohere2": {"hidden_size": 36, "sliding_window": LOCAL, "layer_types": SLIDING},
    "gpt_neox": {"hidden_size": 36},
    "gpt2": {"hidden_size": 36},
    "opt": {"hidden_size": 36, "word_embed_proj_dim": 36},
    "deepseek_v3": {
        "hidden_size": 36, "num_key_value_heads": 6, "q_lora_rank": 8, "kv_lora_rank": 9, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6, "v_head_dim": 5, "head_dim": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 2, **EXPERTS,
    },
}  # fmt: skip


def tiny(family: str = "llama", *, seed: int = 5, attention: str | None = "eager", **changes: Any) -> PreTrainedModel:
    """A causal LM of a family; every parameter is random, norms around one."""
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES.get(family, {}), **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
        randomize(model)
    return model.eval()


def randomize(model: nn.Module) -> None:
    """Every parameter drawn anew; vectors (norms, biases) vary around what they were."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() < 2:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * 1.3 / parameter.shape[-1] ** 0.5)


def randomize_mixers(student: LinearizedForCausalLM, seed: int = 7) -> LinearizedForCausalLM:
    """New parameters of the student away from their start, so that both branches and all heads differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.mixer_parameters().values():
            scale = 0.5 / parameter.shape[-1] ** 0.5 if parameter.dim() == 2 else 0.5  # two dimensions: a projection
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return student


def mixer(name: str = "lolcats", **settings: Any) -> MixerConfig:
    """A mixer's config with a short window."""
    defaults = {"lolcats": {"window": 4, "feature_dim": 7}, "sliding_window": {"window": 5}, "gla": {"window": 5}}
    return MIXERS[name](**{**defaults.get(name, {}), **settings})


def student_of(teacher: PreTrainedModel, plan: Sequence[MixerConfig | None] | MixerConfig) -> LinearizedForCausalLM:
    """The student with its mixers away from their start; one mixer alone goes into all layers."""
    layers = teacher.config.get_text_config().num_hidden_layers
    plan = [plan] * layers if isinstance(plan, MixerConfig) else plan
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return randomize_mixers(LinearizedForCausalLM.from_teacher(teacher, plan))


def text(rows: int, tokens: int, seed: int = 11) -> Tensor:
    """Random token ids without the special ones, `[rows, tokens]`."""
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded(ids: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The last `lengths[b]` tokens of each row behind padding, and the mask."""
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, ids.shape[1] - length :] = 1
    return ids * mask, mask

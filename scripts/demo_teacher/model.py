"""The teacher's shape, dropout added from outside (Llama has none on its residual branches), and averaged weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from demo_teacher.text import BOS_ID, EOS_ID, PAD_ID

HEAD_DIM = 32
INIT_STD = 0.04


def build_model(*, vocab_size: int, width: int, layers: int, mlp: int, kv_heads: int, context: int) -> LlamaForCausalLM:
    """A Llama with heads of 32, grouped keys and values, RoPE and tied embeddings; weights from torch's seed."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_DIM,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=INIT_STD,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    return LlamaForCausalLM(config)


def add_dropout(model: LlamaForCausalLM, rate: float) -> None:
    """Drop outputs of the embedding, of each attention and of each MLP while the model is in training mode."""

    def drop(module: nn.Module, _inputs: Any, output: Any) -> Any:
        if not module.training:
            return output
        if isinstance(output, tuple):
            return (F.dropout(output[0], rate), *output[1:])
        return F.dropout(output, rate)

    for module in [
        model.model.embed_tokens,
        *(part for layer in model.model.layers for part in (layer.self_attn, layer.mlp)),
    ]:
        module.register_forward_hook(drop)


class AveragedModel:
    """Exponential moving average of a model's weights, as a model of its own for evaluation and saving."""

    def __init__(self, model: LlamaForCausalLM, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model: LlamaForCausalLM) -> None:
        """Move towards `model`; the first updates move faster, so that the start is forgotten."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)

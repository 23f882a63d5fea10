"""Retention (SUPRA): its equations, decays and rotary positions, and its start from a teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from linearize.mixers import AttentionShape, retention
from linearize.mixers.gates import rotate
from linearize.mixers.layer_mixer import AttentionWeights
from linearize.mixers.retention import Retention, RetentionConfig, log_decays
from linearize.ops.layout import Layout

B, T, M, H, G, D, V = 2, 37, 22, 6, 3, 4, 7
SHAPE = AttentionShape(num_heads=H, num_kv_heads=G, head_dim=D, value_dim=V, model_dim=M, rope_theta=100.0)


def build(**settings: Any) -> Retention:
    torch.manual_seed(1)
    mixer = RetentionConfig(**settings).build(SHAPE).double()
    assert isinstance(mixer, Retention)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return mixer


def hidden(tokens: int = T) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(B, tokens, M, dtype=torch.float64)


def test_rotary_positions_are_llamas() -> None:
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=24, num_attention_heads=3, rope_parameters={"rope_type": "default", "rope_theta": 50}
    )
    position = torch.tensor([[0, 1, 2, 0, 1], [-1, -1, 0, 1, 2]])
    q = torch.randn(2, 3, 5, 8)
    cos, sin = LlamaRotaryEmbedding(config)(q, position.clamp(min=0))
    expected, _ = apply_rotary_pos_emb(q, q, cos, sin)
    torch.testing.assert_close(rotate(q, Layout(position_BT=position), 50.0), expected)
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(90_000, 90_005)[None])
    expected, _ = apply_rotary_pos_emb(q, q, cos, sin)
    torch.testing.assert_close(rotate(q, Layout(90_000), 50.0), expected, rtol=0, atol=0.03)  # theirs: angles in fp32


def test_decays_are_retnets_or_alibis() -> None:
    torch.testing.assert_close(log_decays("retnet", 3).exp(), 1 - 2.0 ** -torch.tensor([5.0, 6, 7]).double())
    torch.testing.assert_close(log_decays("alibi", 8), -(0.5 ** torch.arange(1, 9).double()))


@torch.no_grad()
@pytest.mark.parametrize("decay", ["retnet", "alibi"])
def test_the_layer_is_its_equations(decay: str) -> None:
    mixer, x = build(decay=decay), hidden()
    q, k, v = mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)
    q, k, v = q.view(B, T, H, D), k.view(B, T, G, D)[:, :, [0, 0, 1, 1, 2, 2]], v.view(B, T, G, V)
    v = v[:, :, [0, 0, 1, 1, 2, 2]]
    q, k = (F.relu(torch.einsum("bthd,hdf->bthf", y, mixer.map_weight) + mixer.map_bias) for y in (q, k))
    q, k = (rotate(y.transpose(1, 2), Layout(), 100.0) for y in (q, k))
    distance = torch.arange(T)[:, None] - torch.arange(T)
    gamma = log_decays(mixer.config.decay, H).exp()[:, None, None]
    weights = (q @ k.mT) * D**-0.5 * torch.where(distance >= 0, gamma ** distance.clamp(min=0), 0)
    torch.testing.assert_close(mixer.matrix(x, layout=Layout()), weights, rtol=0, atol=1e-11)
    y = (weights @ v.transpose(1, 2)).transpose(1, 2)
    y = F.group_norm(y.reshape(B * T, H * V), H).view(B, T, H * V)
    got, state = mixer(x, layout=Layout())
    torch.testing.assert_close(got, mixer.out_proj(y), rtol=0, atol=1e-9)
    kept = torch.einsum(
        "bhtd,htn,bhtv->bhdv", k, gamma ** (T - 1 - torch.arange(T).double())[:, None], v.transpose(1, 2)
    )
    torch.testing.assert_close(state.memory, kept * D**-0.5, rtol=0, atol=1e-10)
    torch.testing.assert_close(mixer.advance(*mixer.project(x), layout=Layout()).memory, state.memory)
    assert state.map_batch(lambda part: part[:1].float()).num_bytes == mixer.cost(2).state_bytes


@torch.no_grad()
def test_documents_padding_and_cuts() -> None:
    mixer, x = build(), hidden()
    position = torch.stack(
        [
            torch.cat([torch.arange(20), torch.arange(T - 20)]),
            torch.cat([torch.full((6,), -1), torch.arange(T - 6)]),
        ]
    )
    y, _ = mixer(x, layout=Layout(position_BT=position))
    apart = [mixer(part, layout=Layout())[0] for part in (x[:1, :20], x[:1, 20:], x[1:, 6:])]
    torch.testing.assert_close(y[:1], torch.cat(apart[:2], 1), rtol=0, atol=1e-9)
    torch.testing.assert_close(y[1:, 6:], apart[2], rtol=0, atol=1e-9)
    first, state = mixer(x[:, :11], layout=Layout(position_BT=position[:, :11]))
    rest, _ = mixer(x[:, 11:], layout=Layout(position_BT=position[:, 11:]), state=state)
    torch.testing.assert_close(torch.cat([first, rest], 1)[1, 6:], y[1, 6:], rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.cat([first, rest], 1)[0], y[0], rtol=0, atol=1e-9)


def test_it_starts_from_the_teachers_projections_with_the_identity_map() -> None:
    sizes = {"q": (H * D, M), "k": (G * D, M), "v": (G * V, M), "o": (M, H * V)}
    weights = {name: torch.randn(size) for name, size in sizes.items()}
    mixer = RetentionConfig().build(SHAPE)
    mixer.start_from(AttentionWeights(**weights))
    assert isinstance(mixer, Retention)
    own = {"q": mixer.q_proj, "k": mixer.k_proj, "v": mixer.v_proj, "o": mixer.out_proj}
    for name, linear in own.items():
        torch.testing.assert_close(linear.weight, weights[name], rtol=0, atol=0)
    q = torch.randn(1, 3, H * D)
    origin = Layout(position_BT=torch.zeros(1, 3, dtype=torch.long))
    torch.testing.assert_close(mixer._mapped(q, origin), F.relu(q.view(1, 3, H, D).transpose(1, 2)))


def test_gradients_reach_every_parameter() -> None:
    mixer = build()
    (mixer(hidden(), layout=Layout())[0] * torch.randn(B, T, M)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in mixer.parameters())


def test_decays_are_made_once_for_all_layers_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made, make = [], retention.log_decays
    monkeypatch.setattr(retention, "log_decays", lambda *args: made.append(args) or make(*args))
    layers, layout = [build(), build(), build(decay="alibi")], Layout()
    args = hidden(5)
    for layer in layers:
        layer(args, layout=layout)
    assert [kind for kind, *_ in made] == ["retnet", "alibi"]

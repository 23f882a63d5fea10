"""The gated_delta_net mixer against transformers' Qwen3.5 layer, and what `start_from`, `matrix` and the state promise.

The contract that it shares with all mixers is in `test_mixer_contract.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3_5TextConfig
from transformers.cache_utils import DynamicCache
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from linearize.mixers import MIXERS, AttentionShape
from linearize.mixers.gated_delta_net import GatedDeltaNet, GatedDeltaNetConfig
from linearize.mixers.layer_mixer import AttentionWeights
from linearize.ops.layout import Layout

B, H, G, D, V, M, T = 2, 6, 3, 5, 7, 37, 139


def shape(**changes: Any) -> AttentionShape:
    sizes = {"num_heads": H, "num_kv_heads": G, "head_dim": D, "value_dim": V, "model_dim": M, "norm_eps": 3e-5}
    return AttentionShape(**{**sizes, **changes})


def build(config: GatedDeltaNetConfig | None = None, **changes: Any) -> GatedDeltaNet:
    """A mixer in which every parameter is random."""
    torch.manual_seed(1)
    mixer = (config or GatedDeltaNetConfig()).build(shape(**changes))
    assert isinstance(mixer, GatedDeltaNet)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def hidden(tokens: int = T, seed: int = 2) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(B, tokens, M)


def qwen_layer(mixer: GatedDeltaNet) -> tuple[Qwen3_5GatedDeltaNet, Qwen3_5TextConfig]:
    """transformers' layer with the mixer's weights, key/value rows repeated for their query heads."""
    config = Qwen3_5TextConfig(
        hidden_size=M, linear_num_value_heads=H, linear_num_key_heads=H, linear_key_head_dim=D,
        linear_value_head_dim=V, num_hidden_layers=1, layer_types=["linear_attention"], rms_norm_eps=3e-5,
    )  # fmt: skip
    layer = Qwen3_5GatedDeltaNet(config, 0)
    q, k, v = mixer.qkv_proj.weight.split(mixer.rows)
    k, v = (x.unflatten(0, (G, -1)).repeat_interleave(H // G, dim=0).flatten(0, 1) for x in (k, v))
    weights = {
        "in_proj_qkv.weight": torch.cat([q, k, v]),
        "conv1d.weight": mixer.conv_weight[:, None],
        "in_proj_b.weight": mixer.beta_proj.weight,
        "in_proj_a.weight": mixer.decay_proj.weight,
        "in_proj_z.weight": mixer.gate_proj.weight,
        "dt_bias": mixer.dt_bias,
        "A_log": mixer.A_log,
        "norm.weight": mixer.norm_weight,
        "out_proj.weight": mixer.out_proj.weight,
    }
    layer.load_state_dict({name: x.detach() for name, x in weights.items()}, strict=True)
    return layer, config


@torch.no_grad()
def test_it_is_transformers_layer_in_prefill_and_token_by_token() -> None:
    mixer, x = build(), hidden()
    layer, config = qwen_layer(mixer)
    y, end = mixer(x, layout=Layout())
    assert (y - layer(x)).norm() < 1e-5 * y.norm()
    cache, state = DynamicCache(config=config), None
    for t in range(9):
        expected = layer(x[:, t : t + 1], cache_params=cache)
        actual, state = mixer(x[:, t : t + 1], layout=Layout(t), state=state)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(actual, y[:, t : t + 1], rtol=1e-4, atol=1e-5)
    assert end is not None and end.memory.dtype == torch.float32 and end.memory.shape == (B, H, D, V)


@pytest.mark.parametrize("repeat", ["before", "after"])
def test_the_projections_start_from_the_teachers(repeat: Any) -> None:
    mixer = GatedDeltaNetConfig(repeat=repeat).build(shape())
    assert isinstance(mixer, GatedDeltaNet)
    torch.manual_seed(3)
    rows = {"q": H * D, "k": G * D, "v": G * V}
    weights = AttentionWeights(**{name: torch.randn(n, M) for name, n in rows.items()}, o=torch.randn(M, H * V))
    before = {name: x.clone() for name, x in mixer.named_parameters()}
    mixer.start_from(weights)
    assert torch.equal(mixer.qkv_proj.weight, torch.cat([weights.q, weights.k, weights.v]))
    assert torch.equal(mixer.out_proj.weight, weights.o)
    changed = {name for name, x in mixer.named_parameters() if not torch.equal(x, before[name])}
    assert changed == {"qkv_proj.weight", "out_proj.weight"}


@torch.no_grad()
@pytest.mark.parametrize("repeat", ["before", "after"])
def test_the_matrix_times_the_values_is_the_mixing(repeat: Any) -> None:
    mixer, x = build(GatedDeltaNetConfig(repeat=repeat)).double(), hidden().double()
    position = torch.stack([torch.arange(T), torch.cat([torch.arange(80), torch.arange(T - 80)])])
    layout = Layout(position_BT=position)
    matrix = mixer.matrix(x, layout=layout)
    v = mixer.inputs(mixer.project(x), layout)[1][2]
    mixed, *_ = mixer.recall(*mixer.project(x), layout=layout)
    torch.testing.assert_close((matrix @ v).transpose(1, 2), mixed, rtol=0, atol=1e-12)
    assert matrix.shape == (B, H, T, T) and not matrix.triu(1).any()
    assert not matrix[1, :, 80:, :80].any() and matrix[0, :, 80:, :80].abs().max() > 1e-3


@torch.no_grad()
def test_repeating_after_the_convolution_is_repeating_before_with_equal_taps() -> None:
    after = build(GatedDeltaNetConfig(repeat="after"))
    before = GatedDeltaNetConfig().build(shape())
    weights = dict(after.state_dict())
    q, k, v = weights["conv_weight"].split(after.channels)
    k, v = (x.unflatten(0, (G, -1)).repeat_interleave(H // G, dim=0).flatten(0, 1) for x in (k, v))
    before.load_state_dict(weights | {"conv_weight": torch.cat([q, k, v])})
    x = hidden()
    torch.testing.assert_close(before(x, layout=Layout())[0], after(x, layout=Layout())[0])


@torch.no_grad()
def test_advance_gives_the_state_of_forward_and_the_cost_states_its_size() -> None:
    mixer, x = build(), hidden()
    _, half = mixer(x[:, :50], layout=Layout())
    _, end = mixer(x[:, 50:], layout=Layout(50), state=half)
    replayed = mixer.advance(*mixer.project(x[:, 50:]), layout=Layout(50), state=half)
    torch.testing.assert_close(replayed.memory, end.memory)
    torch.testing.assert_close(replayed.taps, end.taps)
    assert end.num_bytes == B * mixer.cost(4).state_bytes


def test_a_half_precision_model_keeps_decays_in_fp32_and_stays_close() -> None:
    mixer, x = build(), hidden()
    exact, _ = mixer(x, layout=Layout())
    mixer.bfloat16()
    for name in mixer.fp32_parameters or ():
        parameter = getattr(mixer, name)
        parameter.data = parameter.data.float()
    y, state = mixer(x.bfloat16(), layout=Layout())
    assert y.dtype == torch.bfloat16 and state.memory.dtype == torch.float32
    assert (y.float() - exact).norm() < 0.05 * exact.norm()


def test_every_parameter_learns() -> None:
    mixer = build()
    mixer(hidden(), layout=Layout())[0].square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-6, name


def test_it_is_in_the_table_and_refuses_unknown_settings() -> None:
    assert MIXERS["gated_delta_net"] is GatedDeltaNetConfig
    with pytest.raises(ValueError, match="conv_tap"):
        GatedDeltaNetConfig(conv_tap=4)  # type: ignore[call-arg]

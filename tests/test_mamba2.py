"""Mamba-2 started from attention: equal to transformers' layer, started as published, packed without leaks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import recurrent_speed
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GraniteMoeHybridConfig
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer

from linearize.errors import InputError
from linearize.mixers import AttentionShape
from linearize.mixers.gates import (
    copy_projection,
    gate_then_norm,
    inverse_softplus,
    l2_norm,
    norm_then_gate,
    repeat_heads,
)
from linearize.mixers.layer_mixer import AttentionWeights
from linearize.mixers.mamba2 import Mamba2, Mamba2Config
from linearize.ops.layout import Layout

B, T, M, H, G, D, V = 2, 41, 26, 6, 2, 5, 7
SHAPE = AttentionShape(num_heads=H, num_kv_heads=G, head_dim=D, value_dim=V, model_dim=M, norm_eps=1e-5)


def build(shape: AttentionShape = SHAPE, **settings: Any) -> Mamba2:
    """A mixer in fp64 with all weights random, the norm's too."""
    torch.manual_seed(3)
    mixer = Mamba2Config(**settings).build(shape).double()
    assert isinstance(mixer, Mamba2)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def hidden(tokens: int = T, width: int = M, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(4)
    return torch.randn(B, tokens, width, dtype=dtype)


def granite() -> tuple[nn.Module, GraniteMoeHybridConfig]:
    """transformers' layer with 4 heads of 6 = groups of state 6, width 12, random weights, fp32."""
    torch.manual_seed(5)
    config = GraniteMoeHybridConfig(
        hidden_size=12,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        mamba_n_heads=4,
        mamba_n_groups=4,
        mamba_d_state=6,
        mamba_d_head=6,
        mamba_expand=2,
        mamba_chunk_size=16,
        rms_norm_eps=1e-4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    layer = GraniteMoeHybridMambaLayer(config, 0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return layer.eval(), config


def of_granite(layer: nn.Module, repeat: str) -> Mamba2:
    shape = AttentionShape(num_heads=4, num_kv_heads=4, head_dim=6, value_dim=6, model_dim=12, norm_eps=1e-4)
    mixer = Mamba2Config(repeat=repeat).build(shape)
    tensors = layer.state_dict()
    renamed = {"conv_weight": tensors.pop("conv1d.weight")[:, 0], "conv_bias": tensors.pop("conv1d.bias")}
    mixer.load_state_dict({**renamed, "norm_weight": tensors.pop("norm.weight"), **tensors})
    assert isinstance(mixer, Mamba2)
    return mixer


@torch.no_grad()
@pytest.mark.parametrize("repeat", ["before", "after"])
def test_equal_to_transformers_granite_layer(repeat: str) -> None:
    layer, config = granite()
    mixer, x = of_granite(layer, repeat), hidden(53, 12, torch.float32)
    expected = layer(x)
    y, state = mixer(x, layout=Layout())
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    cache = DynamicCache(config=config)
    layer(x[:, :40], cache_params=cache)
    _, state = mixer(x[:, :40], layout=Layout())
    for t in range(40, 53):
        expected = layer(x[:, t : t + 1], cache_params=cache)
        y, state = mixer(x[:, t : t + 1], layout=Layout(t), state=state)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(state.memory.mT, cache.layers[0].recurrent_states[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"repeat": "after", "conv_taps": 3}], ids=["before", "after"])
def test_the_layer_is_its_equations(settings: dict[str, Any]) -> None:
    """2408.15237, algorithm 1, one token at a time, with other sizes for values than for keys."""
    mixer, x_BTM = build(**settings), hidden(9)
    gate, x, B_, C, dt = mixer.in_proj(x_BTM).split([H * V, G * V, G * D, H * D, H], -1)
    if mixer.config.repeat == "before":
        x, B_ = (repeat_heads(part, G, H) for part in (x, B_))
    taps = mixer.config.conv_taps
    mixed = F.pad(torch.cat([x, B_, C], -1), (0, 0, taps - 1, 0))
    mixed = sum(mixer.conv_weight[:, j] * mixed[:, j : j + 9] for j in range(taps)) + mixer.conv_bias
    copies = H if mixer.config.repeat == "before" else G
    x, B_, C = F.silu(mixed).split([copies * V, copies * D, H * D], -1)
    x, B_ = repeat_heads(x, copies, H).unflatten(-1, (H, V)), repeat_heads(B_, copies, H).unflatten(-1, (H, D))
    C, dt = C.unflatten(-1, (H, D)), F.softplus(dt + mixer.dt_bias)
    state, rows = torch.zeros(B, H, D, V, dtype=x.dtype), []
    for t in range(9):
        decay = (-dt[:, t] * mixer.A_log.exp()).exp()[..., None, None]
        state = decay * state + dt[:, t, :, None, None] * B_[:, t, :, :, None] * x[:, t, :, None]
        y = torch.einsum("bhdv,bhd->bhv", state, C[:, t]) + mixer.D[:, None] * x[:, t]
        y = y * F.silu(gate[:, t].unflatten(-1, (H, V)))
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        rows.append(mixer.out_proj(y.flatten(1) * mixer.norm_weight))
    y, after = mixer(x_BTM, layout=Layout())
    torch.testing.assert_close(y, torch.stack(rows, 1), rtol=0, atol=1e-11)
    torch.testing.assert_close(after.memory, state, rtol=0, atol=1e-11)


@pytest.mark.parametrize("biased", [False, True])
def test_it_starts_from_the_teachers_projections(biased: bool) -> None:
    torch.manual_seed(6)
    sizes = {"q": (H * D, M), "k": (G * D, M), "v": (G * V, M), "o": (M, H * V)}
    made = {name: torch.randn(size) for name, size in sizes.items()}
    biases = {f"{name}_bias": torch.randn(size[0]) for name, size in sizes.items()}
    mixer = Mamba2Config().build(SHAPE)
    assert isinstance(mixer, Mamba2)
    if biased:
        mixer.in_proj.bias = nn.Parameter(torch.ones(mixer.in_proj.out_features))
        mixer.out_proj.bias = nn.Parameter(torch.ones(M))
    before = mixer.in_proj.weight.detach().clone()
    mixer.start_from(AttentionWeights(**made, **(biases if biased else {})))
    gate, x, B_, C, dt = mixer.in_proj.weight.split([H * V, G * V, G * D, H * D, H])
    for actual, expected in ((x, "v"), (B_, "k"), (C, "q"), (mixer.out_proj.weight, "o")):
        torch.testing.assert_close(actual, made[expected], rtol=0, atol=0)
    torch.testing.assert_close(gate, before[: H * V], rtol=0, atol=0)
    torch.testing.assert_close(dt, before[-H:], rtol=0, atol=0)
    if biased:
        parts = mixer.in_proj.bias.split([H * V, G * V, G * D, H * D, H])
        expected = [torch.zeros(H * V), *(biases[f"{n}_bias"] for n in "vkq"), torch.zeros(H)]
        for actual, target in zip(parts, expected, strict=True):
            torch.testing.assert_close(actual, target, rtol=0, atol=0)


def test_a_bias_without_a_place_is_refused() -> None:
    linear = nn.Linear(3, 4, bias=False)
    copy_projection(linear, (1, torch.ones(2, 3), torch.zeros(2)))
    assert linear.weight[1:3].eq(1).all()
    with pytest.raises(InputError, match="biases"):
        copy_projection(linear, (1, torch.ones(2, 3), torch.ones(2)))


def test_the_published_start() -> None:
    torch.manual_seed(7)
    shape = AttentionShape(num_heads=400, num_kv_heads=400, head_dim=2, value_dim=2, model_dim=3)
    mixer = Mamba2Config(dt_min=0.01, dt_max=0.3).build(shape)
    dt, A = F.softplus(mixer.dt_bias), mixer.A_log.exp()
    assert 0.01 <= dt.min() < 0.012 and 0.28 < dt.max() <= 0.3001
    assert abs(dt.log().mean() - (math.log(0.01) + math.log(0.3)) / 2) < 0.15  # log-uniform
    assert 1 <= A.min() < 1.2 and 15.8 < A.max() <= 16 and abs(A.mean() - 8.5) < 0.7
    assert mixer.D.eq(1).all() and mixer.norm_weight.eq(1).all()
    assert 0.49 < mixer.conv_weight.abs().max() <= 0.5 and 0.45 < mixer.conv_bias.abs().max() <= 0.5
    assert mixer.fp32_parameters == ("A_log", "dt_bias", "D")
    with pytest.raises(ValidationError, match="dt_min"):
        Mamba2Config(dt_min=0.2)


@torch.no_grad()
@pytest.mark.parametrize("repeat", ["before", "after"])
def test_documents_and_padding_are_apart_and_the_state_continues(repeat: str) -> None:
    mixer, x = build(repeat=repeat), hidden()
    position = torch.stack(
        [
            torch.cat([torch.arange(17), torch.arange(1), torch.arange(T - 18)]),
            torch.cat([torch.full((9,), -1), torch.arange(T - 9)]),
        ]
    )
    y, state = mixer(x, layout=Layout(position_BT=position))
    for row, lengths in ((0, [17, 1, T - 18]), (1, [9, T - 9])):
        parts = x[row : row + 1].split(lengths, dim=1)
        ends = [mixer(part, layout=Layout()) for part in parts]
        expected = torch.cat([part[0] for part, _ in ends])[9 * row :]
        torch.testing.assert_close(y[row, 9 * row :], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(state.memory[row], ends[-1][1].memory[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(state.taps[row], ends[-1][1].taps[0], rtol=0, atol=1e-12)
    advanced = mixer.advance(*mixer.project(x), layout=Layout(position_BT=position))
    torch.testing.assert_close(advanced.memory, state.memory, rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_matrix_times_x_is_what_the_gate_gets() -> None:
    mixer, h = build(), hidden(20)
    matrix = mixer.matrix(h, layout=Layout())
    gate, (_, _, x, _), _ = mixer.inputs(mixer.project(h), Layout())
    y = (matrix @ x.transpose(1, 2)).transpose(1, 2)
    weight = mixer.norm_weight.unflatten(0, (H, V))
    y = mixer.out_proj(gate_then_norm(y, gate.unflatten(-1, (H, V)), weight, 1e-5).flatten(2))
    torch.testing.assert_close(y, mixer(h, layout=Layout())[0], rtol=0, atol=1e-11)


def test_gradients_reach_every_parameter_and_equal_the_recurrences() -> None:
    from linearize.ops.recurrent.decay_linear import use_backend

    mixer, x = build(), hidden(70).requires_grad_()
    leaves, results = [x, *mixer.parameters()], []
    d_y = torch.randn(B, 70, M, dtype=x.dtype)
    for backend in ("chunked", "reference"):
        with use_backend(backend):
            results.append(torch.autograd.grad(mixer(x, layout=Layout(), need_state=False)[0], leaves, d_y))
    for a, b in zip(*results, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_bf16_weights_keep_wide_gates_and_state() -> None:
    mixer, x = build(), hidden().bfloat16()
    exact, _ = mixer(hidden(), layout=Layout())
    mixer.bfloat16()
    for name in mixer.fp32_parameters:
        setattr(mixer, name, nn.Parameter(getattr(mixer, name).float()))
    y, state = mixer(x, layout=Layout())
    assert y.dtype == torch.bfloat16 and state.memory.dtype == torch.float32 and state.taps.dtype == torch.bfloat16
    assert (y - exact).abs().max() < 0.03 * exact.abs().max()
    cost, element = mixer.cost(2), state.map_batch(lambda part: part[:1])
    assert element.num_bytes == cost.state_bytes and cost.bytes_per_token == 0


def test_norms_and_gates() -> None:
    torch.manual_seed(8)
    y, gate, weight = torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.randn(5)
    silu = gate * torch.sigmoid(gate)
    first = y * silu
    first = weight * first / (first.pow(2).mean(-1, keepdim=True) + 0.1).sqrt()
    torch.testing.assert_close(gate_then_norm(y, gate, weight, 0.1), first)
    second = weight * y / (y.pow(2).mean(-1, keepdim=True) + 0.1).sqrt() * silu
    torch.testing.assert_close(norm_then_gate(y, gate, weight, 0.1), second)
    torch.testing.assert_close(l2_norm(y, 0.2), y / (y.pow(2).sum(-1, keepdim=True) + 0.2).sqrt())
    torch.testing.assert_close(F.softplus(inverse_softplus(weight.exp())), weight.exp())


def test_the_speed_comparison_is_between_layers_that_compute_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "speed.json"
    small = ["--tokens", "70", "--mamba-tokens", "20", "--width", "12", "--heads", "3", "--dim", "8", "--threads", "1"]
    recurrent_speed.main([*small, "--repeats", "1", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [(row["mixer"], row["part"]) for row in rows] == [
        ("mamba2", "layer"),
        ("mamba2", "core"),
        ("gated_delta_net", "layer"),
        ("gated_delta_net", "core"),
        ("mamba", "layer"),
    ]
    assert all(row["speedup"] > 0 and row["tokens_per_second"]["ours"] > 0 for row in rows)
    assert rows[0]["largest_difference"] < 1e-5 and rows[2]["largest_difference"] < 1e-5
    assert capsys.readouterr().out.startswith("mixer")
    with pytest.raises(InputError, match="known: gated_delta_net, mamba, mamba2"):
        recurrent_speed.main([*small, "--mixers", "mamba3"])

"""The Mamba layer against a loop over tokens and channels, and against the attention that it starts from."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from linearize.errors import InputError
from linearize.mixers.base import AttentionShape
from linearize.mixers.layer_mixer import AttentionWeights
from linearize.mixers.mamba import Mamba, MambaConfig
from linearize.ops.layout import Layout

B, H, G, D, N, M, T = 2, 6, 3, 10, 5, 23, 19
SHAPE = AttentionShape(num_heads=H, num_kv_heads=G, head_dim=D, value_dim=D, model_dim=M)
RANDN: dict[str, Any] = {"dtype": torch.float64}
CONFIGS = [MambaConfig(state_dim=N), MambaConfig(state_dim=N, repeat="after", conv_taps=3, step_rank=4)]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.repeat)


def build(config: MambaConfig, shape: AttentionShape = SHAPE) -> Mamba:
    torch.manual_seed(1)
    mixer = Mamba(config, shape).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return mixer


def weights() -> AttentionWeights:
    torch.manual_seed(2)
    rows = [torch.randn(n * D, M, **RANDN) / M**0.5 for n in (H, G, G)]
    return AttentionWeights(*rows, torch.randn(M, H * D, **RANDN))


def one_document(mixer: Mamba, hidden_TM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The layer as written in the paper, channel by channel; also every channel's own mixing matrix and its head."""
    config, tokens = mixer.config, len(hidden_TM)
    sizes = (H * D, G * D, G * D, H * D)
    z, x, b, c = (hidden_TM @ mixer.in_proj.weight.T).split(sizes, dim=1)
    dt = F.softplus(mixer.dt_proj(mixer.dt_in(hidden_TM)) + mixer.dt_bias)
    kv_of = [(e // D) // (H // G) * D + e % D for e in range(H * D)]
    if config.repeat == "before":
        x = x[:, kv_of]
    taps = mixer.conv_weight.shape[1]
    x = F.conv1d(F.pad(x.T, (taps - 1, 0)), mixer.conv_weight[:, None], mixer.conv_bias, groups=x.shape[1]).T
    x = F.silu(x)
    if config.repeat == "after":
        x = x[:, kv_of]
    y, matrices = torch.empty(tokens, H * D, **RANDN), torch.zeros(H * D, tokens, tokens, **RANDN)
    for e in range(H * D):
        own = range(e - e % N, e - e % N + N)
        for i in range(tokens):
            for j in range(i + 1):
                decay = -mixer.A_log[e].exp() * dt[j + 1 : i + 1, e].sum()
                matrices[e, i, j] = dt[j, e] * (c[i, own] * b[j, [kv_of[n] for n in own]] * decay.exp()).sum()
            matrices[e, i, i] += mixer.D[e]
        y[:, e] = matrices[e] @ x[:, e] * F.silu(z[:, e])
    return mixer.out_proj(y), matrices, x


@each_config
@torch.no_grad()
def test_it_is_the_equation_in_every_document(config: MambaConfig) -> None:
    mixer, hidden = build(config), torch.randn(B, T, M, **RANDN)
    lengths = [[7, 1, 11], [12]]
    position = torch.stack(
        [torch.cat([torch.arange(n) for n in lengths[0]]), torch.cat([torch.full((7,), -1), torch.arange(12)])]
    )
    y, state = mixer(hidden, layout=Layout(position_BT=position))
    assert state.memory.shape == (B, H * D, N)
    start = 0
    for length in lengths[0]:
        expected, _, _ = one_document(mixer, hidden[0, start : start + length])
        torch.testing.assert_close(y[0, start : start + length], expected, rtol=0, atol=1e-10)
        start += length
    torch.testing.assert_close(y[1, 7:], one_document(mixer, hidden[1, 7:])[0], rtol=0, atol=1e-10)


@each_config
@torch.no_grad()
def test_the_matrix_is_the_mean_of_the_channels_own(config: MambaConfig) -> None:
    mixer, hidden = build(config), torch.randn(1, 9, M, **RANDN)
    layout = Layout(position_BT=torch.tensor([[-1, -1, 0, 1, 2, 3, 0, 1, 2]]))
    matrix = mixer.matrix(hidden, layout=layout)
    assert matrix.shape == (1, H, 9, 9)
    for part in (slice(2, 6), slice(6, 9)):
        _, own, _ = one_document(mixer, hidden[0, part])
        torch.testing.assert_close(matrix[0, :, part, part], own.unflatten(0, (H, D)).mean(1), rtol=0, atol=1e-11)
    assert (matrix[0, :, 6:, :6] == 0).all()


@each_config
def test_it_copies_each_projection_to_its_own_rows(config: MambaConfig) -> None:
    attention = weights()
    mixer, before = build(config), build(config)
    mixer.start_from(attention)
    z, x, b, c = mixer.in_proj.weight.split((H * D, G * D, G * D, H * D))
    for rows, teacher in ((x, attention.v), (b, attention.k), (c, attention.q), (mixer.out_proj.weight, attention.o)):
        assert torch.equal(rows, teacher)
    assert torch.equal(z, before.in_proj.weight[: H * D])
    for name in ("conv_weight", "dt_bias", "A_log", "D", "dt_in.weight", "dt_proj.weight"):
        assert torch.equal(mixer.get_parameter(name), before.get_parameter(name)), name
    anew = build(config.model_copy(update={"initialise": "random"}))
    anew.start_from(attention)
    assert all(torch.equal(x, y) for x, y in zip(anew.parameters(), before.parameters(), strict=True))


@torch.no_grad()
def test_without_decay_it_is_linear_attention_of_the_teacher_by_sub_heads() -> None:
    """Heads meet: q, k, v of one attention head are C, B, x of one layer head, and its columns of o follow."""
    attention, hidden = weights(), torch.randn(1, T, M, **RANDN)
    mixer = build(MambaConfig(state_dim=N))
    mixer.start_from(attention)
    mixer.A_log.fill_(-60)
    for parameter in (mixer.D, mixer.conv_bias, mixer.conv_weight, mixer.dt_proj.weight):
        parameter.zero_()
    mixer.conv_weight[:, -1] = 1
    mixer.dt_bias.fill_(math.log(math.e - 1))
    y, _ = mixer(hidden, layout=Layout())
    q, k, v = (hidden[0] @ w.T for w in (attention.q, attention.k, attention.v))
    gate = F.silu(hidden[0] @ mixer.in_proj.weight[: H * D].T)
    heads = []
    for head in range(H):
        of_group = slice(head // (H // G) * D, head // (H // G) * D + D)
        q_h, k_h, v_h = q[:, head * D : head * D + D], k[:, of_group], F.silu(v[:, of_group])
        parts = [(q_h[:, s : s + N] @ k_h[:, s : s + N].T).tril() @ v_h[:, s : s + N] for s in range(0, D, N)]
        heads.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(y[0], (torch.cat(heads, dim=1) * gate) @ attention.o.T, rtol=0, atol=1e-10)


def test_it_starts_as_published() -> None:
    torch.manual_seed(0)
    mixer = Mamba(MambaConfig(), AttentionShape(num_heads=12, num_kv_heads=4, head_dim=48, value_dim=48, model_dim=50))
    assert mixer.A_log.shape == (12 * 48, 16) and mixer.dt_in.weight.shape == (4, 50)
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(12 * 48, -1))
    assert (mixer.D == 1).all()
    step = F.softplus(mixer.dt_bias).log10()
    assert -3.001 < step.min() < -2.9 and -1.1 < step.max() < -0.999
    assert abs(step.median() + 2) < 0.15 and abs(step.mean() + 2) < 0.1


def test_every_parameter_learns_and_stays_in_its_dtype() -> None:
    mixer = Mamba(MambaConfig(), SHAPE)
    for name, parameter in mixer.named_parameters():
        if name not in Mamba.fp32_parameters:
            parameter.data = parameter.data.bfloat16()
    y, state = mixer(torch.randn(B, T, M, dtype=torch.bfloat16), layout=Layout())
    assert y.dtype == torch.bfloat16 and state.memory.dtype == torch.float32 and state.taps.dtype == torch.bfloat16
    y.float().square().sum().backward()
    silent = [name for name, p in mixer.named_parameters() if p.grad is None or not bool(p.grad.abs().max() > 0)]
    assert silent == []


@each_config
@torch.no_grad()
def test_advance_gives_the_state_of_forward(config: MambaConfig) -> None:
    mixer, hidden = build(config), torch.randn(B, T, M, **RANDN)
    _, end = mixer(hidden, layout=Layout())
    _, middle = mixer(hidden[:, :8], layout=Layout())
    after = mixer.advance(*mixer.project(hidden[:, 8:]), layout=Layout(8), state=middle)
    torch.testing.assert_close(after.memory, end.memory, rtol=0, atol=1e-12)
    torch.testing.assert_close(after.taps, end.taps, rtol=0, atol=1e-12)
    assert mixer(hidden, layout=Layout(), need_state=False)[1] is None
    assert end.num_bytes == B * mixer.cost(8).state_bytes


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match=r"values have 7 dimensions and its keys 10.* use mamba2"):
        MambaConfig().build(replace(SHAPE, value_dim=7))
    with pytest.raises(InputError, match=r"state_dim 4 does not divide the head dimension 10.*1, 2, 5, 10"):
        MambaConfig(state_dim=4).build(SHAPE)
    wide = replace(SHAPE, head_dim=24, value_dim=24)
    with pytest.raises(InputError, match=r"default state_dim 16 does not divide the head dimension 24"):
        MambaConfig().build(wide)
    assert MambaConfig(state_dim=12).build(wide).state_dim == 12  # type: ignore[attr-defined]
    with pytest.raises(ValidationError):
        MambaConfig(window=4)  # type: ignore[call-arg]

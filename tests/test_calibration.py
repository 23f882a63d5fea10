"""Calibrated starts: planted parameters are recovered from the attention; a calibrated layer is near its teacher."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.mixers import MIXERS, AttentionShape, LayerMixer
from linearize.mixers.calibration import attention_profile, fit_rate, head_scale, inverse_silu, ridge
from linearize.mixers.layer_mixer import AttentionSample, AttentionWeights
from linearize.ops.layout import Layout

B, H, G, D, V, M, T = 2, 6, 3, 4, 5, 23, 150
CALIBRATED = ["gated_delta_net", "mamba2"]
SHAPE = AttentionShape(num_heads=H, num_kv_heads=G, head_dim=D, value_dim=V, model_dim=M, norm_eps=1e-5)


def profile_sample(score_HTT: Tensor, *, layout: Layout | None = None, window: int | None = None) -> AttentionSample:
    """A sample whose attention scores are given: queries hold their own row of them, keys are unit vectors."""
    heads, tokens = score_HTT.shape[:2]
    empty = torch.zeros(1, tokens, M)
    eye = torch.eye(tokens)[None, None]
    v = torch.ones(1, 1, tokens, V)
    return AttentionSample(
        empty, empty, score_HTT[None], eye, v, torch.zeros(1, heads, tokens, V), 1.0, layout or Layout(), window
    )


def test_the_rate_and_concentration_of_attention_that_decays_are_found() -> None:
    rates = torch.tensor([0.02, 0.3, 1.7])
    away = (torch.arange(T)[:, None] - torch.arange(T)).float()
    profile = attention_profile([profile_sample(-rates[:, None, None] * away)])
    torch.testing.assert_close(profile.rate_H, rates.double(), rtol=1e-4, atol=0)
    expected = []
    for rate in rates.tolist():
        laws = [[math.exp(-rate * d) for d in range(n)] for n in range(2, T + 1)]
        expected.append(sum(sum(w * w for w in law) / sum(law) ** 2 for law in laws) / len(laws))
    torch.testing.assert_close(profile.concentration_H, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=0)


def test_documents_padding_and_windows_are_not_looked_across() -> None:
    away = (torch.arange(T)[:, None] - torch.arange(T)).float()
    scores = torch.stack([-0.1 * away, 0.05 * away])  # the second head looks as far back as it may
    position = torch.cat([torch.full((30,), -1), torch.arange(80), torch.arange(T - 110)])[None]
    whole = attention_profile([profile_sample(scores, layout=Layout(position_BT=position))])
    parts = attention_profile([profile_sample(scores[:, a:b, a:b]) for a, b in ((30, 110), (110, T))])
    torch.testing.assert_close(whole.rate_H, parts.rate_H)
    torch.testing.assert_close(whole.concentration_H, parts.concentration_H)
    narrow = attention_profile([profile_sample(scores, window=7)])
    wide = attention_profile([profile_sample(scores)])
    assert (narrow.concentration_H > wide.concentration_H).all() and wide.rate_H[1] < 1e-3


def test_tokens_without_a_value_do_not_count_as_remembered() -> None:
    away = (torch.arange(T)[:, None] - torch.arange(T)).float()
    scores = -0.2 * away[None]
    scores[:, :, 0] = 3.0  # a sink
    sample = profile_sample(scores)
    with_value = attention_profile([sample]).rate_H
    sample.v_BGTV[:, :, 0] = 0
    assert with_value < 0.05 and attention_profile([sample]).rate_H > 0.15


def test_fit_rate_inverts_the_mean_distance() -> None:
    count = torch.zeros(41, dtype=torch.float64)
    count[3], count[40] = 5, 2
    rates = torch.tensor([0.001, 0.07, 3.0], dtype=torch.float64)
    total = []
    for rate in rates:
        weights = [(torch.exp(-rate * torch.arange(n)), number) for n, number in ((3, 5), (40, 2))]
        total.append(sum((w * torch.arange(len(w))).sum() / w.sum() * number for w, number in weights))
    torch.testing.assert_close(fit_rate(torch.stack(total), count), rates, rtol=1e-8, atol=0)


def test_the_small_fits() -> None:
    torch.manual_seed(0)
    z = torch.linspace(0.01, 9, 50, dtype=torch.float64)
    torch.testing.assert_close(inverse_silu(F.silu(z)), z)
    x, w = torch.randn(400, M, dtype=torch.float64), torch.randn(3, M, dtype=torch.float64)
    torch.testing.assert_close(ridge(x, x @ w.T), w, rtol=1e-2, atol=1e-2)
    y, factor = torch.randn(90, H, V), torch.tensor([1.0, -2, 0.5, 3, 4, 0.1])
    torch.testing.assert_close(head_scale(y, y * factor[:, None]), factor.double())


def teacher_sample(seed: int, tokens: int = T) -> tuple[AttentionWeights, AttentionSample]:
    """A layer of attention that looks near, with fixed weights, on hidden states drawn by `seed`."""
    torch.manual_seed(7)
    draw = {"q": H * D, "k": G * D, "v": G * V}
    weights = AttentionWeights(**{n: torch.randn(r, M) / M**0.5 for n, r in draw.items()}, o=torch.randn(M, H * V) / 5)
    center = torch.randn(M)
    torch.manual_seed(seed)
    hidden = torch.randn(B, tokens, M) + center
    q, k, v = (F.linear(hidden, getattr(weights, n)).unflatten(-1, (-1, d)).transpose(1, 2)
               for n, d in (("q", D), ("k", D), ("v", V)))  # fmt: skip
    away = (torch.arange(tokens)[:, None] - torch.arange(tokens)).float()
    scores = q @ k.repeat_interleave(H // G, 1).mT - torch.tensor([0.02, 0.1, 0.3, 1, 2, 0.05])[:, None, None] * away
    weight = torch.softmax(scores.masked_fill(away < 0, -torch.inf), dim=-1)
    y = weight @ v.repeat_interleave(H // G, 1)
    output = F.linear(y.transpose(1, 2).flatten(-2), weights.o)
    # what a sample says of the scores must be true: distances enter as one more dimension of q and k
    time = torch.arange(tokens).float()[:, None].expand(B, G, tokens, 1)
    slope = torch.tensor([0.02, 0.1, 0.3, 1, 2, 0.05])[:, None, None].expand(B, H, tokens, 1)
    q, k = torch.cat([q, slope], -1), torch.cat([k, time], -1)
    return weights, AttentionSample(hidden, output, q, k, v, y, 1.0, Layout())


def started(name: str, calibrated: bool, **settings: Any) -> LayerMixer:
    torch.manual_seed(3)
    mixer = MIXERS[name](**settings).build(SHAPE)
    assert isinstance(mixer, LayerMixer)
    weights, sample = teacher_sample(11)
    mixer.start_from(weights)
    if calibrated:
        mixer.calibrate([sample, teacher_sample(12, 70)[1]])
    return mixer


@pytest.mark.parametrize("settings", [{}, {"repeat": "after"}, {"conv_taps": 1}], ids=["before", "after", "one tap"])
@pytest.mark.parametrize("name", CALIBRATED)
def test_a_calibrated_layer_is_nearer_to_the_teacher_on_other_text(name: str, settings: dict[str, Any]) -> None:
    _, fresh = teacher_sample(99)
    errors = {}
    for calibrated in (False, True):
        with torch.no_grad():
            y, _ = started(name, calibrated, **settings)(fresh.hidden_BTM, layout=Layout())
        assert y.isfinite().all()
        errors[calibrated] = float((y - fresh.output_BTM).square().mean() / fresh.output_BTM.square().mean())
    assert errors[True] < 0.6 and errors[True] < 0.7 * errors[False], errors


@pytest.mark.parametrize("name", CALIBRATED)
def test_calibration_is_deterministic_and_keeps_what_was_copied(name: str) -> None:
    copied, first, second = started(name, False), started(name, True), started(name, True)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    before, after = copied.state_dict(), first.state_dict()
    if name == "mamba2":
        inner, steps = H * V, H
        assert torch.equal(after["in_proj.weight"][inner:-steps], before["in_proj.weight"][inner:-steps])
        assert torch.equal(after["out_proj.weight"], before["out_proj.weight"])
    else:
        assert torch.equal(after["qkv_proj.weight"], before["qkv_proj.weight"])
        ratio = (after["out_proj.weight"] / before["out_proj.weight"]).unflatten(1, (H, V))
        torch.testing.assert_close(ratio, ratio[:1, :, :1].expand_as(ratio), rtol=1e-4, atol=0)
        assert (ratio[0, :, 0] > 0).all()
    assert all(x.requires_grad for x in first.parameters())


@pytest.mark.parametrize("name", CALIBRATED)
def test_faster_heads_get_a_faster_decay(name: str) -> None:
    mixer: Any = started(name, True)
    rate = mixer.A_log.exp() * F.softplus(mixer.dt_bias)
    assert rate[4] > rate[2] > rate[0] > 0 and rate[3] > rate[1]


@pytest.mark.parametrize("name", CALIBRATED)
def test_padding_in_a_sample_changes_nothing(name: str) -> None:
    _, sample = teacher_sample(11)
    plain, padded = started(name, False), started(name, False)
    plain.calibrate([sample])
    gap = 20

    def pad(x: Tensor, dim: int) -> Tensor:
        shape = list(x.shape)
        shape[dim] = gap
        return torch.cat([torch.full(shape, 3.0), x], dim=dim)

    position = torch.cat([torch.full((gap,), -1), torch.arange(T)]).expand(B, -1)
    inside = (pad(x, 2) for x in (sample.q_BHTD, sample.k_BGTD, sample.v_BGTV, sample.y_BHTV))
    outside = pad(sample.hidden_BTM, 1), pad(sample.output_BTM, 1)
    padded.calibrate([AttentionSample(*outside, *inside, 1.0, Layout(position_BT=position))])
    for a, b in zip(plain.parameters(), padded.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

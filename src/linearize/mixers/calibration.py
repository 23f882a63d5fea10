"""Calibrated starts of gated mixers: what is new is set from what the teacher's attention does on a few batches.

The idea is Taylor-Calibrate's (2606.16429): decay, write strength, gate and output scale of a copied layer decide
whether training starts near the teacher or far from it, and all can be read off the teacher. Here in closed form.

1. *Decay*. A token d tokens ago weighs exp(-rate d) in a decaying state. The rate of a head is the maximum-likelihood
   fit of that law, cut off at the start of the document, to the attention mass over distance: the mean distances agree,
   sum_n E[d | rate, n visible] = sum_n d_n, where d_n is the mean distance of query n, weighed by p_nj |v_j|
   (a token with a short value, as an attention sink, is not remembered).
2. *Write strength*. A delta rule with beta returns the mean of about 1 / beta values written under a key; attention
   returns the mean of about 1 / sum_j p_nj^2. So beta = the mean over queries of sum_j p_nj^2.
3. *Convolution*. Queries and keys start as the current token alone, so large that SiLU is nearly a ReLU and memory
   weighs tokens without negative weights; values so small that SiLU is nearly half its input. What is mixed is then
   linear in the taps of the values, which are the least-squares fit, head by head, of the mixed values to the
   teacher's y: a layer without positions finds the neighbours that rotary positions found for the teacher.
4. *Gate and output scale* of a norm before the gate (Gated DeltaNet). With n the normed output: the gain of a token is
   y . n / n . n, the gate's rows predict it from the layer's input (ridge regression), and the columns of the output
   projection are multiplied by what is left, a = sum y . x / sum x . x with x = n silu(gate).
   Of a norm after the gate (Mamba-2), which undoes any gain: the gate starts at silu(gate) = 1, D is the least-squares
   weight of the current value beside the mixed ones, and a goes into the norm's weight.

Everything is read from the teacher's own hidden states, so all layers can be calibrated from one pass.

Letters: B batch, T tokens, C queries of a block, H query heads, G key/value heads, D head dimension, V value dimension,
M model width, N tokens of a sample, K taps, R targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linearize.mixers.gates import gate_then_norm, inverse_softplus, norm_then_gate, rms_norm, wide
from linearize.mixers.layer_mixer import AttentionSample
from linearize.ops.recurrent.decay_linear import decay_linear

if TYPE_CHECKING:
    from linearize.mixers.gated_delta_net import GatedDeltaNet
    from linearize.mixers.mamba2 import Mamba2

QUERY_BLOCK = 128  # queries whose attention weights are held at once
RATES = (1e-4, 10.0)  # of decay per token
BETAS = (0.02, 0.98)
GAINS = (0.1, 4.0)  # of a token over its head's mean
RIDGE = 1e-3  # of the mean power of the inputs
READER_SIZE, VALUE_SIZE = 4.0, 0.3  # root mean square of what SiLU is given: queries and keys, values
LEAST_SCALE = 0.02  # of the one that matches the target's size
OPEN_GATE = 1.2784645  # silu of it is 1

Core = Callable[[AttentionSample], Tensor]  # what a mixer mixes, `[B, T, H, V]`, before norms and gates


@dataclass(frozen=True, eq=False)
class AttentionProfile:
    """What the attention of a layer looks like, per query head: `rate_H`: decay per token; `concentration_H`: mean over
    queries of the sum of squared weights (1: one token, 1 / n: n tokens alike)."""

    rate_H: Tensor
    concentration_H: Tensor


def attention_profile(samples: Sequence[AttentionSample]) -> AttentionProfile:
    """Read the profile off some samples, in fp64; memory is linear in T."""
    heads = samples[0].q_BHTD.shape[1]
    distance, square = torch.zeros(heads, dtype=torch.float64), torch.zeros(heads, dtype=torch.float64)
    most = max(sample.q_BHTD.shape[2] for sample in samples) + 1
    count = torch.zeros(most, dtype=torch.float64)  # queries that see so many tokens
    for sample in samples:
        for weights, mass, away, seen in _query_blocks(sample):
            number = seen.sum(-1)
            asks = number > 1
            count += torch.bincount(number[asks].flatten().cpu(), minlength=most)
            far = (mass * away[:, None]).sum(-1) / mass.sum(-1).clamp(min=1e-30)
            distance += (far * asks[:, None]).sum((0, 2)).double().cpu()
            square += (weights.square().sum(-1) * asks[:, None]).sum((0, 2)).double().cpu()
    queries = count.sum().clamp(min=1)
    device = samples[0].q_BHTD.device
    return AttentionProfile(fit_rate(distance, count).to(device), (square / queries).to(device))


def _query_blocks(sample: AttentionSample) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Softmax weights and weights times value lengths `[B, H, C, T]`, distances and visibility `[B, C, T]`."""
    q, k, v = sample.q_BHTD.float(), sample.k_BGTD.float(), sample.v_BGTV.float()
    batch, heads, tokens, _ = q.shape
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    length = v.norm(dim=-1).repeat_interleave(heads // v.shape[1], dim=1)[:, :, None]
    slot = torch.arange(tokens, device=q.device)
    starts, live = sample.layout.starts(tokens, q.device), sample.layout.live()
    document = slot.new_zeros(1, tokens) if starts is None else starts.long().cumsum(-1)
    for first in range(0, tokens, QUERY_BLOCK):
        here = slice(first, min(first + QUERY_BLOCK, tokens))
        away = slot[here, None] - slot
        seen = (away >= 0) & (document[:, here, None] == document[:, None])
        if live is not None:
            seen = seen & live[:, here, None] & live[:, None]
        if sample.window is not None:
            seen = seen & (away < sample.window)
        seen = seen.expand(batch, -1, -1)
        scores = q[:, :, here] @ k.mT * sample.scaling
        if sample.softcap is not None:
            scores = sample.softcap * torch.tanh(scores / sample.softcap)
        weights = torch.softmax(scores.masked_fill(~seen[:, None], -torch.inf), dim=-1).nan_to_num(0)
        yield weights, weights * length, away.expand(batch, -1, -1).clamp(min=0).float(), seen


def fit_rate(distance_H: Tensor, count_N: Tensor) -> Tensor:
    """The decay rates at which distances sum to `distance_H`, when `count_N[n]` queries see n tokens each."""
    seen = torch.arange(count_N.shape[0], dtype=torch.float64).clamp(min=1)
    low, high = (torch.full_like(distance_H, rate).log() for rate in RATES)
    for _ in range(60):
        middle = (low + high) / 2
        rate = middle.exp()[:, None]
        mean = 1 / torch.expm1(rate) - seen / torch.expm1(rate * seen)
        too_far = (mean * count_N).sum(-1) > distance_H
        low, high = torch.where(too_far, middle, low), torch.where(too_far, high, middle)
    return ((low + high) / 2).exp()


def ridge(inputs_NM: Tensor, targets_NR: Tensor) -> Tensor:
    """W `[R, M]` that minimises the mean of |W x - t|^2 + RIDGE mean|x|^2 / M |W|^2, in fp64."""
    x, t = inputs_NM.double(), targets_NR.double()
    power = x.T @ x
    power.diagonal().add_(RIDGE * power.diagonal().mean())
    return torch.linalg.solve(power, x.T @ t).T


def inverse_silu(y: Tensor) -> Tensor:
    """z > 0 with z sigmoid(z) = y > 0, by Newton's method."""
    z = y + 0.3
    for _ in range(20):
        s = torch.sigmoid(z)
        z = (z - (z * s - y) / (s * (1 + z * (1 - s)))).clamp(min=1e-6)
    return z


def calibrate_gated_delta_net(mixer: GatedDeltaNet, samples: Sequence[AttentionSample]) -> None:
    """Steps 1 to 4. Changes all that is new, and the scale of the output projection's columns, head by head."""
    shape, hidden = mixer.shape, _join(samples, lambda x: x.hidden_BTM)

    def core(sample: AttentionSample) -> Tensor:
        return mixer.recall(*mixer.project(sample.hidden_BTM), layout=sample.layout, need_state=False)[0]

    with torch.no_grad():
        profile = attention_profile(samples)
        mixer.A_log.zero_()
        mixer.decay_proj.weight.zero_()
        mixer.dt_bias.copy_(inverse_softplus(profile.rate_H))
        beta = torch.logit(profile.concentration_H.clamp(*BETAS))
        mixer.beta_proj.weight.copy_(beta[:, None] * _constant(hidden))
        widths = (shape.head_dim, shape.head_dim, shape.value_dim)
        sizes = (READER_SIZE, READER_SIZE, VALUE_SIZE)
        projected = mixer.qkv_proj(hidden).split(mixer.rows, dim=-1)
        parts = mixer.conv_weight.split(mixer.channels)
        for weight_CK, rows, width, size in zip(parts, projected, widths, sizes, strict=True):
            start_taps(weight_CK, rows.unflatten(-1, (-1, width)), size)
        fit_value_taps(parts[2], core, samples, shape.num_heads)
        mixer.norm_weight.fill_(1)
        target = _join(samples, lambda x: x.y_BHTV.transpose(1, 2)).double()
        mixed = _join(samples, core).double()
        normed = rms_norm(mixed, shape.norm_eps)
        gain = (normed * target).mean(-1) / normed.square().mean(-1).clamp(min=1e-12)
        gate_input = inverse_silu((gain / gain.mean(0).clamp(min=1e-6)).clamp(*GAINS))
        mixer.gate_proj.weight.copy_(ridge(hidden, gate_input).repeat_interleave(shape.value_dim, dim=0))
        gate = mixer.gate_proj(hidden).unflatten(-1, (shape.num_heads, -1))
        scale_H = head_scale(norm_then_gate(mixed, gate, mixer.norm_weight, shape.norm_eps), target)
        mixer.out_proj.weight.mul_(scale_H.repeat_interleave(shape.value_dim))


def calibrate_mamba2(mixer: Mamba2, samples: Sequence[AttentionSample]) -> None:
    """Steps 1, 3 and 4 (a step size plays the part of both decay and write strength). Changes only what is new."""
    shape, hidden = mixer.shape, _join(samples, lambda x: x.hidden_BTM)
    gate_rows, *_, step_rows = mixer.in_proj.weight.split(mixer.rows)

    def parts_of(sample: AttentionSample) -> tuple[Tensor, Tensor]:
        _, (query, key, x, decay), _ = mixer.inputs(mixer.project(sample.hidden_BTM), sample.layout)
        query, value = query.transpose(1, 2), x.transpose(1, 2)
        mixed, _ = decay_linear(query, key, value, decay, layout=sample.layout, need_state=False)
        return mixed.transpose(1, 2), x

    with torch.no_grad():
        projected = mixer.in_proj(hidden).split(mixer.rows, dim=-1)[1:4]
        mixer.A_log.zero_()
        mixer.dt_bias.copy_(inverse_softplus(attention_profile(samples).rate_H))
        step_rows.zero_()
        gate_rows.copy_((OPEN_GATE * _constant(hidden)).expand_as(gate_rows))
        if mixer.in_proj.bias is not None:
            gate_bias, *_, step_bias = mixer.in_proj.bias.split(mixer.rows)
            gate_bias.zero_()
            step_bias.zero_()
        mixer.conv_bias.zero_()
        widths = (shape.value_dim, shape.head_dim, shape.head_dim)
        parts = mixer.conv_weight.split(mixer.channels)
        for weight_CK, rows, width, size in zip(
            parts, projected, widths, (VALUE_SIZE, READER_SIZE, READER_SIZE), strict=True
        ):
            start_taps(weight_CK, rows.unflatten(-1, (-1, width)), size)
        fit_value_taps(parts[0], lambda sample: parts_of(sample)[0], samples, shape.num_heads)
        target = _join(samples, lambda x: x.y_BHTV.transpose(1, 2)).double()
        mixed = _join(samples, lambda x: parts_of(x)[0]).double()
        own = _join(samples, lambda x: parts_of(x)[1]).double()
        mixer.D.copy_(_skip(mixed, own, target))
        gate = mixer.in_proj(hidden)[:, : mixer.inner].unflatten(-1, (shape.num_heads, -1))
        ones = torch.ones(shape.num_heads, 1, dtype=mixed.dtype, device=mixed.device)
        scale_H = head_scale(gate_then_norm(mixed + wide(mixer.D)[:, None] * own, gate, ones, shape.norm_eps), target)
        mixer.norm_weight.copy_(scale_H.repeat_interleave(shape.value_dim))


def start_taps(weight_CK: Tensor, projected_NHX: Tensor, size: float) -> None:
    """The convolution as the current token alone, each head at the factor that brings its root mean square to `size`.

    `projected_NHX`: what goes into it; heads may be fewer than the convolution's, which are then copies of them.
    """
    heads = projected_NHX.shape[1]
    scale = size / projected_NHX.double().square().mean((0, 2)).sqrt().clamp(min=1e-6)
    weight_CK.zero_()
    weight_CK[:, -1] = scale.repeat_interleave(weight_CK.shape[0] // heads)


def fit_value_taps(value_CK: Tensor, core: Core, samples: Sequence[AttentionSample], num_heads: int) -> None:
    """The taps of the values by least squares of what is mixed on the teacher's attention, at the size they have.

    One set of taps for each head of the convolution (a key/value head may serve several query heads).
    """
    size, taps = value_CK[:, -1].clone(), value_CK.shape[1]
    width = samples[0].y_BHTV.shape[-1]
    copies = value_CK.shape[0] // width
    power, right = None, None
    for sample in samples:
        shifted = []
        for lag in range(taps):
            value_CK.zero_()
            value_CK[:, -1 - lag] = size
            shifted.append(_rows(core(sample), sample).double())
        basis, target = torch.stack(shifted), _rows(sample.y_BHTV.transpose(1, 2), sample).double()
        here = torch.einsum("inhv,jnhv->hij", basis, basis), torch.einsum("inhv,nhv->hi", basis, target)
        power, right = here if power is None or right is None else (power + here[0], right + here[1])
    assert power is not None and right is not None
    power, right = (x.unflatten(0, (copies, num_heads // copies)).sum(1) for x in (power, right))
    diagonal = power.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(RIDGE * diagonal.mean(-1, keepdim=True))
    solution = torch.linalg.solve(power, right)
    solution = solution / solution.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    value_CK.copy_(size[:, None] * solution.flip(-1).repeat_interleave(width, dim=0))


def head_scale(given_NHV: Tensor, target_NHV: Tensor) -> Tensor:
    """The factor of each head that brings it closest to the target, `[H]`; never quite 0: the head is to learn."""
    power = given_NHV.double().square().sum((0, 2)).clamp(min=1e-12)
    scale = (given_NHV.double() * target_NHV.double()).sum((0, 2)) / power
    least = LEAST_SCALE * (target_NHV.double().square().sum((0, 2)) / power).sqrt()
    return torch.where(scale.abs() < least, least, scale)


def _skip(mixed_NHV: Tensor, own_NHV: Tensor, target_NHV: Tensor) -> Tensor:
    """D `[H]`: with target = c (mixed + D own) by least squares; at most ten times as much of one as of the other."""
    basis = torch.stack([mixed_NHV, own_NHV])
    power = torch.einsum("inhv,jnhv->hij", basis, basis)
    most = 10 * (power[:, 0, 0] / power[:, 1, 1].clamp(min=1e-30)).sqrt()
    power.diagonal(dim1=-2, dim2=-1).mul_(1 + RIDGE)
    solution = torch.linalg.solve(power, torch.einsum("inhv,nhv->hi", basis, target_NHV))
    return torch.clamp(solution[:, 1] / solution[:, 0].clamp(min=1e-12), -most, most)


def _constant(hidden_NM: Tensor) -> Tensor:
    """The direction `[M]` in which all tokens lie at about 1: stands in for a bias where a projection has none."""
    return ridge(hidden_NM, hidden_NM.new_ones(hidden_NM.shape[0], 1))[0]


def _join(samples: Sequence[AttentionSample], read: Callable[[AttentionSample], Tensor]) -> Tensor:
    """The tokens of all samples, `[N, ...]`."""
    return torch.cat([_rows(read(sample), sample) for sample in samples])


def _rows(x_BT: Tensor, sample: AttentionSample) -> Tensor:
    """The tokens of a sample that are no padding, `[N, ...]`."""
    live = sample.layout.live()
    return x_BT.flatten(0, 1) if live is None else x_BT[live.expand(x_BT.shape[:2])]

"""The fused pass between projection and recurrence equals its parts one after the other, outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.mixers.gates import l2_norm, repeat_heads, rms_norm
from linearize.ops import conv_heads as subject
from linearize.ops import gated_norm as norm_subject
from linearize.ops.conv_heads import Heads, conv_heads
from linearize.ops.gated_norm import gated_norm
from linearize.ops.layout import Layout
from linearize.ops.short_conv import short_conv

BATCH, TOKENS = 2, 37
PARTS = (
    Heads(first=3, groups=4, heads=4, dim=5, length=0.7),
    Heads(first=29, groups=2, heads=4, dim=3),
    Heads(first=23, groups=1, heads=4, dim=6, length=1.0),
)
PASSED = ((0, 3), (35, 42))
CHANNELS = sum(part.heads * part.dim for part in PARTS)


def _by_parts(x: Tensor, weight: Tensor, bias: Tensor | None, layout: Layout) -> list[Tensor]:
    outputs, channel = [x[..., a:b] for a, b in PASSED], 0
    for part in PARTS:
        columns = x[..., part.first : part.first + part.groups * part.dim]
        own = slice(channel, channel := channel + part.heads * part.dim)
        taken = repeat_heads(columns, part.groups, part.heads)
        y, _ = short_conv(taken, weight[own], None if bias is None else bias[own], layout=layout, need_state=False)
        y = F.silu(y).unflatten(-1, (part.heads, -1))
        outputs.append(y if part.length is None else l2_norm(y) * part.length)
    return outputs


def _layout(kind: str) -> Layout:
    position = torch.arange(TOKENS).repeat(BATCH, 1)
    if kind == "plain":
        return Layout()
    if kind == "packed":
        position[0, 17:], position[1, 2:], position[1, 20:] = (torch.arange(20), torch.arange(35), torch.arange(17))
        return Layout(position_BT=position)
    position[1] -= 6
    if kind == "padded, from 9":  # positions need not begin at 0, so that no document opens behind the padding
        return Layout(position_BT=torch.where(position < 0, -1, position + 9))
    return Layout(position_BT=position.clamp(min=-1))


def _gradients(outputs: Any, inputs: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)), inputs)


@pytest.mark.parametrize("kind", ["plain", "packed", "padded", "padded, from 9"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("taps", [1, 4])
def test_equals_its_parts(monkeypatch: pytest.MonkeyPatch, kind: str, bias: bool, taps: int) -> None:
    monkeypatch.setattr(subject, "CHUNK_NUMBERS", 1)  # 16 tokens at a time: two whole chunks and a short one
    torch.manual_seed(3)
    x = torch.randn(BATCH, TOKENS, 42, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(CHANNELS, taps, dtype=torch.float64, requires_grad=True)
    constant = torch.randn(CHANNELS, dtype=torch.float64, requires_grad=True) if bias else None
    layout = _layout(kind)
    actual = conv_heads(x, weight, constant, PARTS, passed=PASSED, layout=layout)
    expected = _by_parts(x, weight, constant, layout)
    live_BT = layout.live()
    if live_BT is not None:  # what dead tokens give is nobody's, and the passed columns are as they were
        actual, expected = (
            [y.masked_fill(~live_BT.view(BATCH, TOKENS, *[1] * (y.dim() - 2)), 0) for y in outputs]
            for outputs in (actual, expected)
        )
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    inputs = [x, weight, *([] if constant is None else [constant])]
    arriving = [torch.randn_like(y) for y in expected]
    for one, other in zip(_gradients(actual, inputs, arriving), _gradients(expected, inputs, arriving), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_fewer_tokens_than_taps() -> None:
    torch.manual_seed(4)
    x = torch.randn(BATCH, 2, 42, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(CHANNELS, 4, dtype=torch.float64, requires_grad=True)
    actual, expected = (f(x, weight) for f in (_fused, lambda x, w: _by_parts(x, w, None, Layout())))
    arriving = [torch.randn_like(y) for y in expected]
    for one, other in zip(
        (*actual, *_gradients(actual, [x, weight], arriving)),
        (*expected, *_gradients(expected, [x, weight], arriving)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def _fused(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return conv_heads(x, weight, None, PARTS, passed=PASSED, layout=Layout())


@pytest.mark.parametrize("order", ["gate_first", "norm_first"])
@pytest.mark.parametrize("per_head", [True, False])
def test_gated_norm(monkeypatch: pytest.MonkeyPatch, order: Any, per_head: bool) -> None:
    monkeypatch.setattr(norm_subject, "CHUNK_NUMBERS", 1)
    torch.manual_seed(5)
    y, gate = (torch.randn(BATCH, TOKENS, 3, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(*((3, 7) if per_head else (7,)), dtype=torch.float64, requires_grad=True)
    actual = gated_norm(y, gate, weight, 1e-2, order)
    if order == "gate_first":
        expected = rms_norm(y * F.silu(gate), 1e-2) * weight
    else:
        expected = rms_norm(y, 1e-2) * weight * F.silu(gate)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    arriving, inputs = [torch.randn_like(y)], [y, gate, weight]
    for one, other in zip(
        _gradients([actual], inputs, arriving), _gradients([expected], inputs, arriving), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)

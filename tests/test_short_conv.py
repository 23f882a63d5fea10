"""The short convolution against torch's, and what documents, padding and cuts must not change."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.ops.layout import Layout
from linearize.ops.short_conv import short_conv

B, C = 2, 5


def make(tokens: int, taps: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(tokens)
    return torch.randn(B, tokens, C, dtype=dtype), torch.randn(C, taps, dtype=dtype), torch.randn(C, dtype=dtype)


def torch_conv(x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None) -> Tensor:
    padded = F.pad(x_BTC.mT, (weight_CK.shape[1] - 1, 0))
    return F.conv1d(padded, weight_CK[:, None], bias_C, groups=weight_CK.shape[0]).mT


@pytest.mark.parametrize(("tokens", "taps"), [(1, 4), (3, 4), (131, 4), (300, 3), (7, 1)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_equal_torchs(tokens: int, taps: int, with_bias: bool) -> None:
    x, weight, bias = (p.requires_grad_() for p in make(tokens, taps))
    leaves = [x, weight, *([bias] if with_bias else [])]
    inputs = bias if with_bias else None
    expected = torch_conv(x, weight, inputs)
    y, after = short_conv(x, weight, inputs, layout=Layout())
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(after, F.pad(x, (0, 0, taps, 0))[:, x.shape[1] + 1 :], rtol=0, atol=0)
    d_y = torch.randn_like(y)
    for a, b in zip(torch.autograd.grad(y, leaves, d_y), torch.autograd.grad(expected, leaves, d_y), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_documents_and_padding_are_apart() -> None:
    tokens, lengths = 140, [[37, 1, 2, 100], [50, 90]]
    x, weight, bias = make(tokens)
    x.requires_grad_()
    position = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    position[1, :50] = -1  # row 1: padding, then one document
    y, after = short_conv(x, weight, bias, layout=Layout(position_BT=position))
    rows = [torch.cat([torch_conv(part[None], weight, bias)[0] for part in x[b].split(lengths[b])]) for b in range(B)]
    live = (position >= 0)[..., None]
    torch.testing.assert_close(y * live, torch.stack(rows) * live, rtol=0, atol=1e-12)
    torch.testing.assert_close(after, x[:, -3:], rtol=0, atol=0)
    d_y = torch.randn_like(y) * live
    (actual,), (expected,) = torch.autograd.grad(y, x, d_y), torch.autograd.grad(torch.stack(rows), x, d_y)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert actual[1, :50].abs().max() == 0


def test_cutting_anywhere_changes_nothing() -> None:
    tokens = 60
    x, weight, bias = make(tokens)
    first = torch.cat([torch.full((7,), -1), torch.arange(20), torch.arange(2), torch.arange(31)])
    position = torch.stack([first, torch.cat([torch.arange(29), torch.arange(31)])])
    whole, end = short_conv(x, weight, bias, layout=Layout(position_BT=position))
    for cuts in ([1], [28], [5, 6, 29, 30, 58], list(range(1, tokens))):
        parts, taps = [], None
        for a, b in itertools.pairwise([0, *cuts, tokens]):
            here = Layout(position_BT=position[:, a:b])
            y, taps = short_conv(x[:, a:b], weight, bias, layout=here, taps_BKC=taps)
            parts.append(y)
        live = (position >= 0)[..., None]
        torch.testing.assert_close(torch.cat(parts, 1) * live, whole * live, rtol=0, atol=1e-12)
        torch.testing.assert_close(taps, end, rtol=0, atol=0)


def test_taps_stop_at_the_start_of_the_last_document_and_wait_through_padding() -> None:
    x, weight, bias = make(9)
    position = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1], [4, 5, -1, -1, -1, -1, -1, -1, -1]])
    before = torch.randn(B, 3, C, dtype=x.dtype)
    _, after = short_conv(x, weight, bias, layout=Layout(position_BT=position), taps_BKC=before)
    assert after[0, 0].abs().max() == 0
    torch.testing.assert_close(after[0, 1:], x[0, -2:], rtol=0, atol=0)
    torch.testing.assert_close(after[1], torch.stack([before[1, 2], x[1, 0], x[1, 1]]), rtol=0, atol=0)


def test_the_gradient_of_the_taps_and_half_precision() -> None:
    x, weight, bias = make(5)
    taps = torch.randn(B, 3, C, dtype=x.dtype, requires_grad=True)
    y, _ = short_conv(x, weight, bias, layout=Layout(8), taps_BKC=taps)
    expected = torch_conv(torch.cat([taps, x], 1), weight, bias)[:, 3:]
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    d_y = torch.randn_like(y)
    actual, target = torch.autograd.grad(y, taps, d_y), torch.autograd.grad(expected, taps, d_y)
    torch.testing.assert_close(actual[0], target[0], rtol=0, atol=1e-12)
    half, after = short_conv(x.bfloat16(), weight, bias, layout=Layout())
    assert half.dtype == after.dtype == torch.bfloat16
    assert short_conv(x, weight, layout=Layout(), need_state=False)[1] is None

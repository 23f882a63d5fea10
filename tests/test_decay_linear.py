"""Linear attention with decay: the chunked backend against the recurrence, in values, gradients and states."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from linearize.ops.layout import Layout
from linearize.ops.recurrent.decay_linear import decay_linear, use_backend

B, H, K, V = 2, 3, 5, 7
per_kind = pytest.mark.parametrize("per_key", [False, True], ids=["head", "key"])


def inputs(tokens: int, per_key: bool, *, strength: float = 1.0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v, log decays of very different sizes (a fifth of them nearly none), state."""
    torch.manual_seed(tokens + per_key)
    sizes = [(B, H, tokens, K), (B, H, tokens, K), (B, H, tokens, V)]
    q, k, v = (torch.randn(size, dtype=dtype) for size in sizes)
    shape = (B, H, tokens, K) if per_key else (B, H, tokens)
    log_decay = -strength * torch.rand(shape, dtype=dtype) ** 3 * (torch.rand(shape) > 0.2)
    return [q, k, v, log_decay, torch.randn(B, H, K, V, dtype=dtype)]


def packed(tokens: int) -> Layout:
    """Row 0: a carried document, then three new ones (one of a single token); row 1: padding, then two documents."""
    first = [torch.arange(9, 9 + tokens // 3), torch.arange(1), torch.arange(tokens // 4)]
    first.append(torch.arange(tokens - sum(map(len, first))))
    second = [torch.full((tokens // 5,), -1), torch.arange(tokens // 2)]
    second.append(torch.arange(tokens - sum(map(len, second))))
    return Layout(position_BT=torch.stack([torch.cat(first), torch.cat(second)]))


def spelled_out(q: Tensor, k: Tensor, v: Tensor, g: Tensor, layout: Layout) -> Tensor:
    """y_t = sum over j <= t of the same document of (q_t exp(g_{j+1} + ... + g_t)) . k_j v_j, entry by entry."""
    g = g[..., None].expand(q.shape) if g.dim() == 3 else g
    position = layout.positions(q.shape[2], q.device).expand(q.shape[0], -1)
    y = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b, t in itertools.product(range(q.shape[0]), range(q.shape[2])):
        for j in range(t - int(position[b, t]) if position[b, t] >= 0 else t + 1, t + 1):
            if j >= 0:
                weight = (q[b, :, t] * g[b, :, j + 1 : t + 1].sum(1).exp() * k[b, :, j]).sum(-1)
                y[b, :, t] += weight[:, None] * v[b, :, j]
    return y


@per_kind
@pytest.mark.parametrize("ragged", [False, True], ids=["plain", "packed"])
def test_the_reference_is_the_sum_written_out(per_key: bool, ragged: bool) -> None:
    q, k, v, g, _ = inputs(19, per_key)
    layout = packed(19) if ragged else Layout()
    if ragged:  # no state here, so the first document of row 0 starts with the call
        layout.position_BT[0, :6] -= 9
    with use_backend("reference"):
        y, _ = decay_linear(q, k, v, g, layout=layout)
    live = (layout.positions(19, q.device) >= 0)[:, None, :, None]
    torch.testing.assert_close(y * live, spelled_out(q, k, v, g, layout) * live, rtol=0, atol=1e-12)


@per_kind
@pytest.mark.parametrize("ragged", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("tokens", [5, 16, 63, 149])
@pytest.mark.parametrize("strength", [0.1, 20.0], ids=["weak", "strong"])
def test_chunked_equals_the_reference(per_key: bool, ragged: bool, tokens: int, strength: float) -> None:
    leaves = [x.requires_grad_() for x in inputs(tokens, per_key, strength=strength)]
    d_state, results = torch.randn_like(leaves[4]), []
    layout = packed(tokens) if ragged else Layout(start=9)
    live = (layout.positions(tokens, d_state.device) >= 0)[:, None, :, None]
    d_y = torch.randn(B, H, tokens, V, dtype=torch.float64) * live
    for backend in ("reference", "chunked"):
        with use_backend(backend):
            y, after = decay_linear(*leaves[:4], layout=layout, state=leaves[4])
        gradients = torch.autograd.grad([y, after], leaves, [d_y, d_state])
        results.append([y * live, after, *gradients])
    for name, a, b in zip(["y", "state", "dq", "dk", "dv", "dg", "dstate"], *results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@per_kind
@pytest.mark.parametrize("strength", [0.02, 3.0, 20.0])
def test_single_precision_is_as_good_as_the_recurrence(per_key: bool, strength: float) -> None:
    exact = inputs(413, per_key, strength=strength)
    with use_backend("reference"):
        y, after = decay_linear(*exact[:4], layout=Layout(3), state=exact[4])
    got, got_after = decay_linear(*(x.float() for x in exact[:4]), layout=Layout(3), state=exact[4])
    assert got.dtype == got_after.dtype == torch.float32
    assert (got - y).abs().max() < 3e-6 * y.abs().max()
    assert (got_after - after).abs().max() < 3e-6 * after.abs().max()


@per_kind
def test_cutting_anywhere_changes_nothing(per_key: bool) -> None:
    *qkvg, state = inputs(150, per_key)
    layout = packed(150)
    whole, end = decay_linear(*qkvg, layout=layout, state=state)
    live = (layout.position_BT >= 0)[:, None, :, None]
    for cuts in ([1], [149], [31, 64, 65, 129], list(range(30, 90))):
        parts, carried = [], state
        for a, b in itertools.pairwise([0, *cuts, 150]):
            here = Layout(position_BT=layout.position_BT[:, a:b])
            y, carried = decay_linear(*(x[:, :, a:b] for x in qkvg), layout=here, state=carried)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 2) * live, whole * live, rtol=0, atol=1e-11)
        torch.testing.assert_close(carried, end, rtol=0, atol=1e-11)


@per_kind
def test_padding_passes_the_state_through(per_key: bool) -> None:
    *qkvg, state = inputs(70, per_key)
    nothing = Layout(position_BT=torch.full((B, 70), -1))
    for backend in ("reference", "chunked"):
        with use_backend(backend):
            y, after = decay_linear(*qkvg, layout=nothing, state=state)
        torch.testing.assert_close(after, state, rtol=0, atol=0)
        assert y.isfinite().all()


@per_kind
def test_no_decay_overflows(per_key: bool) -> None:
    q, k, v, g, state = inputs(200, per_key, dtype=torch.float32)
    g = torch.where(torch.rand_like(g) < 0.5, -1000.0, 0.0).requires_grad_()
    y, after = decay_linear(q, k, v, g, layout=Layout(), state=state)
    (d_g,) = torch.autograd.grad(y.sum() + after.sum(), g)
    with use_backend("reference"):
        expected, _ = decay_linear(q, k, v, g, layout=Layout(), state=state)
    assert y.isfinite().all() and d_g.isfinite().all()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_half_precision_in_half_precision_out_with_a_wide_state() -> None:
    *qkvg, state = inputs(40, False, dtype=torch.bfloat16)
    y, after = decay_linear(*qkvg, layout=Layout(), state=state, need_state=True)
    assert y.dtype == torch.bfloat16 and after.dtype == torch.float32
    assert decay_linear(*qkvg, layout=Layout(), need_state=False)[1] is None

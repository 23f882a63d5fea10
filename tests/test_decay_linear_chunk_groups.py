"""The chunked recurrence cut into chunk groups, with mild and with strong decays, in half precision and without
subnormals."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from linearize.ops.layout import Layout
from linearize.ops.recurrent.decay_linear import decay_linear, use_backend
from linearize.ops.recurrent.decay_linear.chunk_groups import Cutting
from linearize.ops.recurrent.decay_linear.chunked import chunk_size
from linearize.ops.recurrent.decay_linear.decays import CallDecays

chunk_groups = importlib.import_module("linearize.ops.recurrent.decay_linear.chunk_groups")
B, H, T, K, V = 2, 3, 213, 5, 7
per_kind = pytest.mark.parametrize("per_key", [False, True], ids=["head", "key"])


def inputs(per_key: bool, strength: float, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v, log decays and state; the last head of row 1 decays 400 times as fast as the others."""
    torch.manual_seed(5 + per_key)
    q, k, v = (torch.randn(B, H, T, size, dtype=dtype) for size in (K, K, V))
    g = -strength * torch.rand((B, H, T, K) if per_key else (B, H, T), dtype=dtype)
    g[1, -1] *= 400
    return [x.requires_grad_() for x in (q, k, v, g, torch.randn(B, H, K, V, dtype=dtype))]


def packed() -> Layout:
    """Row 0: one document that goes on; row 1: padding, then two."""
    second = torch.cat([torch.full((20,), -1), torch.arange(101), torch.arange(T - 121)])
    return Layout(position_BT=torch.stack([torch.arange(4, 4 + T), second]))


def everything(arguments: list[Tensor], layout: Layout) -> list[Tensor]:
    """y, state and all gradients."""
    torch.manual_seed(1)
    y, after = decay_linear(*arguments[:4], layout=layout, state=arguments[4])
    live = (layout.positions(T, y.device) >= 0)[:, None, :, None]
    d_y = torch.randn(y.shape).bfloat16().to(y.dtype) * live  # the same numbers in every dtype
    d_after = torch.randn(after.shape).to(after.dtype)
    return [y * live, after, *torch.autograd.grad([y, after], arguments, [d_y, d_after])]


@per_kind
@pytest.mark.parametrize("ragged", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize(
    ("numbers", "rows", "spans"), [(1, 6, 7), (32 * 32 * 3, 6, 3), (32 * 32 * 14, 4, 1), (1 << 30, 1, 1)]
)
def test_any_cut_gives_the_same(
    per_key: bool, ragged: bool, numbers: int, rows: int, spans: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_groups, "GROUP_NUMBERS", numbers)
    arguments, layout = inputs(per_key, 0.1), packed() if ragged else Layout(4)
    cutting = Cutting.of(arguments[0], arguments[2], chunk_size(T, V))
    assert (len(cutting.rows), len(cutting.spans)) == (rows, spans)
    with use_backend("reference"):
        expected = everything(arguments, layout)
    with use_backend("chunked"):
        got = everything(arguments, layout)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


@per_kind
def test_mild_chunk_groups_are_factored_and_strong_ones_are_not(per_key: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, of = [], CallDecays.of
    monkeypatch.setattr(chunk_groups, "GROUP_NUMBERS", 32 * 32 * 7)
    monkeypatch.setattr(CallDecays, "of", lambda *args: taken.append(of(*args)) or taken[-1])
    with use_backend("chunked"):
        decay_linear(*inputs(per_key, 0.1)[:4], layout=Layout(), need_state=False)
    names = [type(x).__name__ for x in taken]
    assert names == ["FactoredDecays"] * 5 + ["KeyDecays" if per_key else "HeadDecays"]


@per_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_is_widened_group_by_group(per_key: bool, dtype: torch.dtype) -> None:
    """The result is that of the same numbers in fp32, rounded once; gradients come in the dtypes of the inputs."""
    arguments = inputs(per_key, 0.1, torch.float32)
    half = [x.detach().to(dtype).requires_grad_() for x in arguments[:4]] + [arguments[4]]
    wide = [x.detach().float().requires_grad_() for x in half[:4]] + [arguments[4]]
    for layout in (Layout(4), packed()):
        got, exact = everything(half, layout), everything(wide, layout)
        assert [x.dtype for x in got] == [dtype, torch.float32, *(x.dtype for x in half)]
        assert torch.equal(got[0], exact[0].to(dtype)) and torch.equal(got[1], exact[1])
        rounding = torch.finfo(dtype).eps
        for a, b in zip(got[2:], exact[2:], strict=True):
            assert (a.float() - b).abs().max() <= 4 * rounding * b.abs().max()


class Subnormals(TorchDispatchMode):
    """Counts the fp32 numbers that operations make, and how many of them are subnormal."""

    made = subnormal = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32 and "empty" not in str(function):
            self.made += out.numel()
            self.subnormal += int(((out.abs() < torch.finfo(torch.float32).tiny) & (out != 0)).sum())
        return out


@per_kind
@pytest.mark.parametrize("backend", ["multi_token", "chunked"])
@pytest.mark.parametrize("strength", [0.9, 5.0, 60.0])
def test_fast_decay_makes_no_subnormal_numbers(per_key: bool, backend: str, strength: float) -> None:
    """Products of subnormals are tens of times slower; a few come of small numbers times the smallest factors."""
    arguments = inputs(per_key, strength, torch.float32)
    cut = 31 if backend == "multi_token" else T
    with use_backend(backend), Subnormals() as seen:
        y, after = decay_linear(*(x[:, :, :cut] for x in arguments[:4]), layout=Layout(4), state=arguments[4])
        torch.autograd.grad([y, after], arguments, [torch.ones_like(y), torch.ones_like(after)])
    assert seen.made > 10_000 and seen.subnormal <= 1e-3 * seen.made

"""Our calls of fla's kernels against stand-ins with its own signatures: values and gradients, plain and packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fla_signatures import install
from torch import Tensor

from linearize.ops.layout import Layout
from linearize.ops.recurrent import decay_linear, gated_delta
from linearize.ops.varlen import packed

B, H, T, K, V = 3, 2, 23, 5, 7
OPERATIONS = ["head", "key", "delta"]
PADDED = [torch.cat([torch.full((6,), -1), torch.arange(T - 6)]), torch.arange(4, 4 + T), torch.full((T,), -1)]
MAX_MULTI_TOKEN = [
    torch.cat([torch.arange(7, 14), torch.arange(1), torch.arange(T - 8)]),  # the state's document, a short, a long one
    torch.cat([torch.full((3,), -1), torch.arange(9), torch.arange(T - 12)]),  # padding, then two
    torch.cat([torch.arange(5, 11), torch.full((4,), -1), torch.arange(11, T + 1)]),  # draft tokens that were rejected
]
LAYOUTS = {
    "plain": Layout(3),
    "padded, one row dead": Layout(position_BT=torch.stack(PADDED)),
    "packed, with a gap": Layout(position_BT=torch.stack(MAX_MULTI_TOKEN)),
    "one row for all": Layout(position_BT=torch.cat([torch.arange(8), torch.arange(T - 8)])[None]),
    "all dead": Layout(position_BT=torch.full((B, T), -1)),
}


def inputs(operation: str, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(3)
    q, k, v = (torch.randn(B, H, T, size, dtype=dtype) for size in (K, K, V))
    k = torch.nn.functional.normalize(k, dim=-1)
    gate = -torch.rand((B, H, T, K) if operation == "key" else (B, H, T), dtype=dtype)
    beta = [torch.rand(B, H, T, dtype=dtype)] if operation == "delta" else []
    state = torch.randn(B, H, K, V, dtype=torch.promote_types(dtype, torch.float32))
    return [x.requires_grad_() for x in (q, k, v, gate, *beta, state)]


def run(operation: str, backend: str, arguments: list[Tensor], layout: Layout, with_state: bool) -> list[Tensor]:
    module: Any = gated_delta if operation == "delta" else decay_linear
    function = module.gated_delta if operation == "delta" else module.decay_linear
    state = arguments[-1] if with_state else None
    with module.use_backend(backend):
        y, after = function(*arguments[:-1], layout=layout, state=state)
    y = y * (layout.positions(T, y.device) >= 0)[:, None, :, None]
    torch.manual_seed(4)
    d_y, d_after = torch.randn(y.shape).to(y.dtype), torch.randn(after.shape).to(after.dtype)
    leaves = arguments if with_state else arguments[:-1]
    gradients = torch.autograd.grad(
        (y * d_y).sum() + (after * d_after).sum() + 0 * sum(x.sum() for x in arguments), leaves
    )  # a row of dead tokens leads nowhere
    return [y, after, *gradients]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("with_state", [True, False], ids=["state", "no state"])
def test_documents_become_sequences(
    operation: str, name: str, with_state: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, layout, arguments = install(monkeypatch), LAYOUTS[name], inputs(operation, torch.float64)
    got = run(operation, "fla", arguments, layout, with_state)
    expected = run(operation, "reference", arguments, layout, with_state)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-12)
    assert [call["cu_seqlens"] is not None for call in calls] == ([] if name == "all dead" else [name != "plain"])
    assert all((call["initial_state"] is not None) == with_state and call["scale"] == 1.0 for call in calls)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", ["plain", "packed, with a gap"])
def test_half_precision_goes_in_as_it_is_with_gates_and_states_in_fp32(
    operation: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, arguments = install(monkeypatch), inputs(operation, torch.bfloat16)
    got = run(operation, "fla", arguments, LAYOUTS[name], True)
    expected = run(operation, "reference", arguments, LAYOUTS[name], True)
    assert len(calls) == 1 and got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32
    for a, b in zip(expected, got, strict=True):
        assert a.dtype == b.dtype and (a.float() - b.float()).abs().max() <= 0.02 * a.float().abs().max()


def test_sequences_are_found_once_for_all_layers() -> None:
    layout = Layout(position_BT=torch.stack(MAX_MULTI_TOKEN))
    where = packed(layout, B, T, torch.device("cpu"))
    assert where is packed(layout, B, T, torch.device("cpu"))
    assert where.bounds.tolist() == [0, 7, 8, 23, 32, 43, 62]
    assert where.row_S.tolist() == [0, 0, 0, 1, 1, 2]
    assert where.carries_S.tolist() == [True, False, False, False, False, True] and where.last_B.tolist() == [2, 4, 5]

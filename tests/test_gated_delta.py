"""The gated delta rule: a loop per token straight from equation 10 of 2412.06464 against every backend, and fla's
call."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from torch import Tensor

from linearize.ops.layout import Layout
from linearize.ops.recurrent.gated_delta import gated_delta, use_backend

chunked = importlib.import_module(
    "linearize.ops.recurrent.gated_delta.chunked"
)  # the package's `chunked` is the function
B, H, K, V, T = 2, 3, 5, 7, 151


def ragged(*rows: list[int]) -> Tensor:
    """Positions of rows made of padding (negative numbers) and documents (positive numbers)."""
    made = [list(itertools.chain(*([-1] * -n if n < 0 else range(n) for n in row))) for row in rows]
    return torch.tensor(made)


PLAIN = None
PACKED = ragged([11, 1, 116, 20, 3], [64, 64, 23])
PADDED = ragged([-70, 81], [151])
RIGHT = ragged([40, -111], [1, 149, -1])
LAYOUTS = pytest.mark.parametrize(
    "position", [PLAIN, PACKED, PADDED, RIGHT], ids=["plain", "packed", "padded", "right"]
)
CONTENTS = pytest.mark.parametrize("content", ["usual", "beta 0", "beta 1", "strong", "weak"])


def inputs(content: str = "usual", tokens: int = T, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """q, k (of length 1), v, log decay, beta and a state."""
    torch.manual_seed(seed)
    q, k, v = (torch.randn(B, H, tokens, d, dtype=dtype) for d in (K, K, V))
    log_decay, beta = -torch.rand(B, H, tokens, dtype=dtype), torch.rand(B, H, tokens, dtype=dtype)
    if content.startswith("beta"):
        beta = 1e-6 * beta if content == "beta 0" else 1 - 1e-6 * beta
    if content == "strong":  # some tokens erase all there is, right beside others that erase nothing
        log_decay = torch.where(beta < 0.3, -3e4, 1e-3 * log_decay)
    if content == "weak":
        log_decay = 1e-3 * log_decay
    k = torch.nn.functional.normalize(k, dim=-1)
    return [q, k, v, log_decay, beta, torch.randn(B, H, K, V, dtype=dtype)]


def naive(values: list[Tensor], position_BT: Tensor | None, *, continues: bool) -> tuple[Tensor, Tensor]:
    """One row, head and token at a time; the state is a matrix `[V, K]` as in the paper."""
    q, k, v, log_decay, beta, state = values
    y, after = torch.zeros_like(v), torch.zeros_like(state)
    for b, h in itertools.product(range(B), range(H)):
        memory = state[b, h].T.clone() if continues else torch.zeros(V, K, dtype=v.dtype)
        before = None
        for t in range(q.shape[2]):
            position = t if position_BT is None else int(position_BT[b, t])
            if position < 0:
                continue
            if position_BT is not None and (position == 0 or (before is not None and position != before + 1)):
                memory = torch.zeros(V, K, dtype=v.dtype)
            before, key, strength = position, k[b, h, t], beta[b, h, t]
            erase = torch.eye(K, dtype=v.dtype) - strength * torch.outer(key, key)
            memory = log_decay[b, h, t].exp() * memory @ erase + strength * torch.outer(v[b, h, t], key)
            y[b, h, t] = memory @ q[b, h, t]
        after[b, h] = memory.T
    return y, after


def live(position: Tensor | None) -> Tensor | int:
    return 1 if position is None else (position >= 0)[:, None, :, None]


@LAYOUTS
@CONTENTS
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_every_backend_equals_the_equation(backend: str, position: Tensor | None, content: str) -> None:
    values = inputs(content)
    expected, state = naive(values, position, continues=False)
    with use_backend(backend):
        y, after = gated_delta(*values[:5], layout=Layout(position_BT=position))
    torch.testing.assert_close(y * live(position), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(after, state, rtol=0, atol=1e-10)
    assert y.isfinite().all()


@CONTENTS
def test_fp32_is_as_close_chunked_as_it_is_step_by_step(content: str) -> None:
    exact, _ = gated_delta(*inputs(content)[:5], layout=Layout())
    values, errors = [x.float() for x in inputs(content)[:5]], {}
    for backend in ("reference", "chunked"):
        with use_backend(backend):
            y, after = gated_delta(*values, layout=Layout())
        assert y.dtype == after.dtype == torch.float32
        errors[backend] = (y - exact).abs().max()
    assert errors["chunked"] < 4 * errors["reference"] + 1e-6 and errors["chunked"] < 1e-4


@LAYOUTS
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_cutting_anywhere_changes_nothing(backend: str, position: Tensor | None) -> None:
    values = inputs()
    whole, end = gated_delta(*values[:5], layout=Layout(position_BT=position))
    for cuts in ([1, 2, 3, 70, 71, 130], [64, 128], [75]):
        state, parts = None, []
        for a, b in itertools.pairwise([0, *cuts, T]):
            layout = Layout(a) if position is None else Layout(position_BT=position[:, a:b])
            with use_backend(backend):
                y, state = gated_delta(*(x[:, :, a:b] for x in values[:5]), layout=layout, state=state)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 2) * live(position), whole * live(position), rtol=0, atol=1e-11)
        torch.testing.assert_close(state, end, rtol=0, atol=1e-11)


def test_one_token_continues_a_state() -> None:
    values = inputs(tokens=1)
    y, after = gated_delta(*values[:5], layout=Layout(9), state=values[5])
    expected, state = naive(values, None, continues=True)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(after, state)


@LAYOUTS
@CONTENTS
def test_chunked_gradients_equal_autograd_through_the_reference(position: Tensor | None, content: str) -> None:
    grads: dict[str, tuple[Tensor, ...]] = {}
    for backend in ("reference", "chunked"):
        values = [x.requires_grad_() for x in inputs(content)]
        with use_backend(backend):
            y, after = gated_delta(*values[:5], layout=Layout(7, position), state=values[5])
        torch.manual_seed(4)
        loss = (y * live(position) * torch.randn_like(y)).sum() + (after * torch.randn_like(after)).sum()
        grads[backend] = torch.autograd.grad(loss, values)
    for name, actual, expected in zip(["q", "k", "v", "log_decay", "beta", "state"], *grads.values(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
        assert name == "state" or expected.abs().max() > 0


@pytest.mark.parametrize("tokens", [2, 16, 17, 33, 63, 64, 65, 200])
def test_gradients_at_every_length(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "GROUP_NUMBERS", 64 * 64 * B * H * 2)  # two chunks a chunk group
    grads: dict[str, tuple[Tensor, ...]] = {}
    for backend in ("reference", "chunked"):
        values = [x.requires_grad_() for x in inputs(tokens=tokens)]
        with use_backend(backend):
            y, after = gated_delta(*values[:5], layout=Layout(3), state=values[5])
        grads[backend] = torch.autograd.grad(y.square().sum() + after.pow(3).sum(), values)
    for actual, expected in zip(grads["chunked"], grads["reference"], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_padding_may_hold_anything(backend: str) -> None:
    values = inputs()
    wild = [x.masked_fill(~(PADDED >= 0)[:, None, :, *[None] * (x.dim() - 3)], 1e4) for x in values[:5]]
    wild[3] = -wild[3].abs()
    with use_backend(backend):
        y, after = gated_delta(*wild, layout=Layout(position_BT=PADDED))
        expected, state = gated_delta(*values[:5], layout=Layout(position_BT=PADDED))
    torch.testing.assert_close(y * live(PADDED), expected * live(PADDED))
    torch.testing.assert_close(after, state)
    assert y.isfinite().all()


def test_half_precision_is_computed_in_fp32_and_keeps_an_fp32_state() -> None:
    values = [x.bfloat16() for x in inputs()[:5]]
    y, after = gated_delta(*values, layout=Layout())
    exact, state = gated_delta(*(x.float() for x in values), layout=Layout())
    assert y.dtype == torch.bfloat16 and after.dtype == torch.float32
    torch.testing.assert_close(y, exact.bfloat16())
    torch.testing.assert_close(after, state)
    assert gated_delta(*values, layout=Layout(), need_state=False)[1] is None


@pytest.mark.parametrize("numbers", [1, 32 * 32 * B * H * 2, 1 << 30], ids=["a chunk", "two chunks", "all"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_any_chunk_groups_give_the_same_in_any_order_of_dimensions(
    numbers: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from tensors whose heads lie inside the tokens, as projections give them, and in half precision."""
    torch.manual_seed(2)
    tokens, results = 5 * 32 + 13, []
    sizes = ((H, K), (H, K), (H, V))
    q, k, v = (torch.randn(B, tokens, *size).to(dtype).transpose(1, 2) for size in sizes)
    k = torch.nn.functional.normalize(k, dim=-1)
    g, beta = (-torch.rand(B, H, tokens)).to(dtype), torch.rand(B, H, tokens).to(dtype)
    arguments = [x.requires_grad_() for x in (q, k, v, g, beta)]
    d_y = torch.randn(v.shape).to(dtype)
    for size in (1 << 17, numbers):
        monkeypatch.setattr(chunked, "GROUP_NUMBERS", size)
        with use_backend("chunked"):
            y, after = gated_delta(*arguments, layout=Layout(3))
        results.append([y, after, *torch.autograd.grad([y, after], arguments, [d_y, torch.ones_like(after)])])
    with use_backend("reference"):
        y, after = gated_delta(*arguments, layout=Layout(3))
    exact = [y, after, *torch.autograd.grad([y, after], arguments, [d_y, torch.ones_like(after)])]
    for a, b, c in zip(*results, exact, strict=True):
        bound, assured = (1e-11, 1e-12) if dtype == torch.float64 else (0.02, 0.01)
        assert a.dtype == c.dtype and (a - b).abs().max() <= assured * a.abs().max()
        assert (a.double() - c.double()).abs().max() <= bound * c.double().abs().max()

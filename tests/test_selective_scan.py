"""Every backend of the selective scan against loops over single numbers written from the paper's equation (fp64)."""

from __future__ import annotations

import itertools
import math
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import linearize.ops.recurrent.selective_scan as backends
from linearize.ops.layout import Layout
from linearize.ops.recurrent.selective_scan import BACKENDS, chunked, selective_scan, use_backend

B, T, G, P, N = 2, 41, 3, 5, 7
E = G * P
PLAIN_BACKENDS = [name for name in BACKENDS if name not in ("mamba_ssm", "triton")]
every_backend = pytest.mark.parametrize("backend", PLAIN_BACKENDS)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8: 41 tokens are five whole blocks and one token more."""
    monkeypatch.setattr(sys.modules["linearize.ops.recurrent.selective_scan.chunked"], "BLOCK", 8)


def inputs(tokens: int = T, *, rows: int = B, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """x, dt, A, B, C and a first state, all random and all sizes different."""
    torch.manual_seed(seed)
    dt = torch.nn.functional.softplus(torch.randn(rows, tokens, E, dtype=dtype) - 1)
    A = -torch.exp(0.7 * torch.randn(E, N, dtype=dtype))
    groups = [torch.randn(rows, tokens, G, N, dtype=dtype) for _ in "BC"]
    return [torch.randn(rows, tokens, E, dtype=dtype), dt, A, *groups, torch.randn(rows, E, N, dtype=dtype)]


def naive(tensors: list[Tensor], position_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One number after the other; -1 is padding, a position that does not follow the last one forgets."""
    x, dt, A, w_B, w_C, state = (w.tolist() for w in tensors)
    rows, tokens = tensors[0].shape[:2]
    y = torch.zeros(rows, tokens, E, dtype=torch.float64)
    for b, e in itertools.product(range(rows), range(E)):
        h, last = list(state[b][e]), None
        for t in range(tokens):
            here = None if position_BT is None else int(position_BT[b, t])
            if here == -1:
                continue
            if here is not None and (here == 0 or (last is not None and here != last + 1)):
                h = [0.0] * N
            last, step = here, dt[b][t][e]
            for n in range(N):
                h[n] = math.exp(step * A[e][n]) * h[n] + step * w_B[b][t][e // P][n] * x[b][t][e]
            y[b, t, e] = sum(w_C[b][t][e // P][n] * h[n] for n in range(N))
        state[b][e] = h
    return y, torch.tensor(state, dtype=torch.float64)


def scan(backend: str, tensors: list[Tensor], layout: Layout, **settings: Any) -> tuple[Tensor, Tensor | None]:
    with use_backend(backend):
        return selective_scan(*tensors[:5], layout=layout, state=tensors[5], **settings)


RAGGED = torch.stack(
    [
        torch.cat([torch.arange(9, 20), torch.arange(1), torch.arange(17), torch.arange(12)]),
        torch.cat([torch.full((10,), -1), torch.arange(23), torch.full((8,), -1)]),
    ]
)


@every_backend
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, T])
def test_it_is_the_equation(backend: str, tokens: int) -> None:
    tensors = inputs(tokens)
    for y, expected in zip(scan(backend, tensors, Layout(3)), naive(tensors), strict=True):
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@every_backend
def test_documents_and_padding_are_kept_apart(backend: str) -> None:
    tensors = inputs()
    y, state = scan(backend, tensors, Layout(position_BT=RAGGED))
    expected, end = naive(tensors, RAGGED)
    live = (RAGGED >= 0)[..., None]
    torch.testing.assert_close(y * live, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, end, rtol=0, atol=1e-12)
    assert torch.isfinite(y).all()


@every_backend
def test_one_layout_row_serves_every_row(backend: str) -> None:
    tensors = inputs()
    y, state = scan(backend, tensors, Layout(position_BT=RAGGED[:1]))
    expected, end = naive(tensors, RAGGED[:1].expand(B, -1))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, end, rtol=0, atol=1e-12)


@every_backend
def test_cutting_changes_nothing(backend: str) -> None:
    tensors = inputs()
    for position_BT in (torch.arange(4, 4 + T)[None], RAGGED):
        whole, end = scan(backend, tensors, Layout(position_BT=position_BT))
        for cuts in ([0, 1, T], [0, 8, 9, 30, T], [0, T - 1, T]):
            state, parts = tensors[5], []
            for a, b in itertools.pairwise(cuts):
                chunk = [w[:, a:b] if w.dim() > 2 else w for w in tensors[:5]]
                y, state = scan(backend, [*chunk, state], Layout(position_BT=position_BT[:, a:b]))
                parts.append(y)
            torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12)
            torch.testing.assert_close(state, end, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", [Layout(5), Layout(position_BT=RAGGED)], ids=["plain", "ragged"])
@pytest.mark.parametrize("with_state", [True, False])
def test_gradients_of_all_inputs_are_those_of_the_reference(layout: Layout, with_state: bool) -> None:
    torch.manual_seed(1)
    weight_y, weight_h = torch.randn(B, T, E, dtype=torch.float64), torch.randn(B, E, N, dtype=torch.float64)
    if not layout.is_plain:
        weight_y *= (RAGGED >= 0)[..., None]
    gradients = {}
    for backend in PLAIN_BACKENDS:
        tensors = [w.requires_grad_() for w in inputs()]
        with use_backend(backend):
            y, h = selective_scan(*tensors[:5], layout=layout, state=tensors[5] if with_state else None)
        loss = (weight_y * y).sum() + (weight_h * h).sum()
        gradients[backend] = torch.autograd.grad(loss, tensors[: 5 + with_state])
    assert all(g.abs().max() > 0.1 for g in gradients["reference"])
    for gradient, expected in zip(gradients["chunked"], gradients["reference"], strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-10)


def test_gradients_are_the_slopes() -> None:
    """Against finite differences, not against another backend."""
    torch.manual_seed(3)
    sizes = [(1, 10, 4), (1, 10, 4), (4, 2), (1, 10, 2, 2), (1, 10, 2, 2), (1, 4, 2)]
    tensors = [torch.randn(size, dtype=torch.float64) for size in sizes]
    tensors[1], tensors[2] = tensors[1].abs(), -tensors[2].exp()

    def run(*w: Tensor) -> tuple[Tensor, Tensor]:
        return chunked(*w[:5], layout=Layout(2), state=w[5])  # type: ignore[return-value]

    assert torch.autograd.gradcheck(run, [w.requires_grad_() for w in tensors])


@every_backend
def test_strong_decay_neither_overflows_nor_loses_the_rest(backend: str) -> None:
    """exp(dt A) from 1 to 0 within one sequence: values and gradients stay finite and equal fp64's."""
    wide = inputs(dtype=torch.float64)
    wide[1][:, ::6] = 1e4
    wide[1][:, 1::6] = 0
    wide[0][:, ::6] *= 1e-4
    narrow = [w.float().requires_grad_() for w in wide]
    y, state = scan(backend, narrow, Layout(1))
    expected, end = scan("reference", wide, Layout(1))
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.double(), end, rtol=1e-4, atol=1e-4)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(y.sum() + state.sum(), narrow))


@every_backend
def test_half_precision_inputs_give_their_dtype_and_a_wide_state(backend: str) -> None:
    x, dt, A, w_B, w_C, _ = inputs()
    half = [x.bfloat16(), dt.bfloat16(), A.float(), w_B.bfloat16(), w_C.bfloat16(), None]
    y, state = scan(backend, half, Layout())
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    expected, _ = scan("reference", [*(w.double() for w in half[:5]), None], Layout())
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)
    assert scan(backend, half, Layout(), need_state=False)[1] is None


def test_few_tokens_and_many_take_different_backends_and_agree() -> None:
    tensors = inputs()
    whole, end = selective_scan(*tensors[:5], layout=Layout())
    state, parts = None, []
    for t in range(T):
        token = [w[:, t : t + 1] if w.dim() > 2 else w for w in tensors[:5]]
        y, state = selective_scan(*token, layout=Layout(t), state=state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, end, rtol=0, atol=1e-12)


def stand_in(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any = None, z: Any = None, delta_bias: Any = None,
    delta_softplus: bool = False, return_last_state: bool = False
) -> Any:  # fmt: skip
    """`selective_scan_fn` of mamba-ssm 2.3.2, its checks included; u, delta [B, E, T]; A [E, N]; B, C [B, G, N, T]."""
    assert D is z is delta_bias is None and not delta_softplus
    assert u.shape == delta.shape and B.shape[2] == C.shape[2] == A.shape[1] <= 256
    assert {w.dtype for w in (u, delta, A, B, C)} == {torch.float32} and all(
        w.stride(-1) == 1 for w in (u, delta, B, C)
    )
    per_group = u.shape[1] // B.shape[1]
    h, y = u.new_zeros(u.shape[0], *A.shape), []
    for t in range(u.shape[2]):
        B_t, C_t = (w[..., t].repeat_interleave(per_group, dim=1) for w in (B, C))
        h = torch.exp(delta[..., t, None] * A) * h + (delta[..., t] * u[..., t])[..., None] * B_t
        y.append((h * C_t).sum(-1))
    y_BET = torch.stack(y, dim=-1)
    return (y_BET, h) if return_last_state else y_BET


@pytest.fixture
def _kernel(monkeypatch: pytest.MonkeyPatch):
    package, module = ModuleType("mamba_ssm"), ModuleType("mamba_ssm.ops.selective_scan_interface")
    package.__spec__ = ModuleSpec("mamba_ssm", None)
    module.selective_scan_fn, module.selective_scan_cuda = stand_in, object()  # type: ignore[attr-defined]
    for entry in (package, ModuleType("mamba_ssm.ops"), module):
        monkeypatch.setitem(sys.modules, entry.__name__, entry)
    backends.kernel.cache_clear()
    yield
    backends.kernel.cache_clear()


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("position_BT", [None, RAGGED, RAGGED[:1]], ids=["plain", "ragged", "one row"])
def test_the_kernel_is_called_as_it_documents(position_BT: Tensor | None) -> None:
    tensors = [*(w.float().requires_grad_() for w in inputs()[:5]), None]
    layout = Layout(position_BT=position_BT)
    y, state = scan("mamba_ssm", tensors, layout)
    expected, end = scan("reference", tensors, layout)
    torch.testing.assert_close(state, end, rtol=1e-5, atol=1e-5)
    live = torch.ones(B, T, 1) if position_BT is None else (position_BT >= 0)[..., None]
    torch.testing.assert_close(y * live, expected * live, rtol=1e-5, atol=1e-5)
    assert scan("mamba_ssm", tensors, layout, need_state=False)[1] is None
    gradients = [torch.autograd.grad((out * live).square().sum(), tensors[:5]) for out in (y, expected)]
    for gradient, expected_gradient in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_kernel")
def test_the_kernel_runs_only_what_it_can() -> None:
    def taken(**change: object) -> bool:
        call = {"device": "cuda", "dtype": torch.float32, "tokens": 99, "state_dim": N, "gradients": True, **change}
        return backends.choice(backends.ScanCall(**call))[0] == "mamba_ssm"  # type: ignore[arg-type]

    assert taken(need_state=False) and taken(gradients=False)
    assert not taken()  # it has no gradient through the last state
    for change in ({"has_state": True}, {"state_dim": 300}, {"whole": False}, {"device": "cpu"}, {"tokens": 9}):
        assert not taken(need_state=False, **change), change
    assert not taken(need_state=False, dtype=torch.float64)


@pytest.mark.usefixtures("_kernel")
def test_a_package_without_its_cuda_kernel_is_not_called() -> None:
    sys.modules["mamba_ssm.ops.selective_scan_interface"].selective_scan_cuda = None  # as its 2.3 sets it
    call = backends.ScanCall(device="cuda", dtype=torch.float32, tokens=99, state_dim=N, need_state=False)
    backend, why = backends.choice(call)
    assert backend == "chunked" and "without its CUDA kernel" in why


@pytest.mark.skipif(backends.find_spec("mamba_ssm") is not None, reason="mamba_ssm is installed")
def test_without_the_package_there_is_no_kernel() -> None:
    backends.kernel.cache_clear()
    assert backends.kernel() is None

"""Every backend of window + linear attention against a per-token loop written straight from the paper's equation
(fp64)."""

from __future__ import annotations

import itertools

import pytest
import torch

from linearize.mixers.base import AttentionShape
from linearize.mixers.feature_maps import FeatureMap
from linearize.ops.layout import Layout
from linearize.ops.window_linear import BACKENDS, WindowLinear, advance, use_backend, window_linear

B, H, G, D, V = 2, 6, 3, 5, 7
SHAPE = AttentionShape(num_heads=H, num_kv_heads=G, head_dim=D, value_dim=V, model_dim=H * D)


def make_spec(
    window, shape, *, linear=True, sinks=0, shared=False, softcap=None, affine=False, branch="both", name="hedgehog"
):
    torch.manual_seed(3)
    maps = [FeatureMap(name, SHAPE, 9, "identity").double() for _ in "qk"]
    for parameter in itertools.chain(*(m.parameters() for m in maps)):
        torch.nn.init.normal_(parameter, std=0.7)
    factor = torch.randn(H, dtype=torch.float64)
    return WindowLinear(
        window=window,
        shape=shape,
        scaling=0.61,
        num_sinks=sinks,
        softcap=softcap,
        shared_shift=shared,
        feature_q=maps[0] if linear else None,
        feature_k=maps[1] if linear else None,
        log_window_factor_H=torch.nn.functional.logsigmoid(factor),
        linear_factor_H=torch.sigmoid(-factor) if affine else None,
        branch=branch,
    )


def naive(q, k, v, spec, position_BT):
    """One query at a time, all tokens of its document looked at one by one (all heads at once)."""
    y = torch.zeros(*q.shape[:3], V, dtype=q.dtype)
    k_all, v_all = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
    phi_q = spec.features_q(q) if spec.feature_q else None
    phi_k = spec.features_k(k) if spec.feature_k else None
    for b, n in itertools.product(range(q.shape[0]), range(q.shape[2])):
        p = int(position_BT[b, n])
        near, far = [], []
        for j in range(p + 1):
            if spec.window == 0:
                inside = False
            elif spec.shape == "sliding":
                inside = p - j < spec.window
            else:
                inside = p // spec.window - j // spec.window <= 1
            (near if inside or j < spec.num_sinks else far).append(n - p + j)
        near, far = [] if spec.branch == "linear" else near, far if spec.has_linear else []
        scores = torch.einsum("hd,hid->hi", q[b, :, n], k_all[b][:, near]) * spec.scaling
        if spec.softcap:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        m = scores.amax(-1, keepdim=True) if near else torch.zeros(H, 1, dtype=q.dtype)
        m = torch.clamp(m, min=0) if spec.shared_shift else m
        weights = (scores - m + spec.log_window_factor_H[:, None]).exp()
        top, bottom = torch.einsum("hi,hiv->hv", weights, v_all[b][:, near]), weights.sum(-1)
        if far:
            weights = torch.einsum("hf,hif->hi", phi_q[b, :, n], phi_k[b][:, far]) * (
                (-m).exp() if spec.shared_shift else 1
            )
            top, bottom = top + torch.einsum("hi,hiv->hv", weights, v_all[b][:, far]), bottom + weights.sum(-1)
        y[b, :, n] = top / bottom.masked_fill(bottom == 0, 1)[:, None]
    return y


def inputs(tokens, seed=0, dtype=torch.float64, grad=False):
    torch.manual_seed(seed)
    made = [torch.randn(B, n, tokens, d, dtype=dtype) * 1.3 for n, d in ((H, D), (G, D), (G, V))]
    return [x.requires_grad_(grad) for x in made]


def ragged(tokens, lengths_by_row):
    """Positions of rows made of padding (negative numbers) and documents (positive numbers)."""
    rows = [list(itertools.chain(*([-1] * -n if n < 0 else range(n) for n in row))) for row in lengths_by_row]
    assert all(len(row) == tokens for row in rows), [len(r) for r in rows]
    return torch.tensor(rows)


PLAIN = None
PACKED = ragged(53, [[11, 1, 38, 3], [-7, 30, 16]])
PADDED = ragged(53, [[-20, 33], [53]])
RIGHT = ragged(53, [[40, -13], [5, 48]])
CASES = [
    (4, "terraced", {}),
    (4, "terraced", {"linear": False}),
    (5, "sliding", {}),
    (7, "sliding", {"shared": True, "sinks": 3}),
    (16, "terraced", {"shared": True}),
    (17, "terraced", {"affine": True, "softcap": 2.0}),
    (3, "terraced", {"sinks": 2}),
    (6, "sliding", {"linear": False, "sinks": 2}),
    (0, "sliding", {"name": "elu"}),
    (0, "terraced", {"name": "t2r", "shared": True}),
    (1, "sliding", {"name": "exp"}),
    (1, "terraced", {"name": "gain", "shared": True}),
    (64, "terraced", {}),
    (200, "sliding", {}),
    (9, "terraced", {"branch": "window"}),
    (9, "sliding", {"branch": "linear"}),
    (0, "sliding", {"branch": "window"}),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("position", [PLAIN, PACKED, PADDED, RIGHT], ids=["plain", "packed", "padded", "right"])
@pytest.mark.parametrize(("window", "shape", "options"), CASES)
def test_every_backend_equals_the_equation(backend, position, window, shape, options):
    spec, (q, k, v) = make_spec(window, shape, **options), inputs(53)
    expected = naive(q, k, v, spec, torch.arange(53).expand(B, -1) if position is None else position)
    with use_backend(backend):
        y, _ = window_linear(q, k, v, spec=spec, layout=Layout(position_BT=position))
    live = 1 if position is None else (position >= 0)[:, None, :, None]
    torch.testing.assert_close(y * live, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("position", [PLAIN, PACKED, PADDED], ids=["plain", "packed", "padded"])
@pytest.mark.parametrize(("window", "shape", "options"), CASES)
def test_cutting_anywhere_changes_nothing(backend, position, window, shape, options):
    spec, (q, k, v) = make_spec(window, shape, **options), inputs(53)
    whole, end = window_linear(q, k, v, spec=spec, layout=Layout(position_BT=position))
    for cuts in ([1, 2, 3, 20, 21, 37], [8, 24, 32, 48], list(range(1, 53))):
        state, parts = None, []
        for a, b in itertools.pairwise([0, *cuts, 53]):
            layout = Layout(start=a, position_BT=None if position is None else position[:, a:b])
            with use_backend(backend):
                y, state = window_linear(
                    q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], spec=spec, layout=layout, state=state
                )
            parts.append(y)
        live = 1 if position is None else (position >= 0)[:, None, :, None]
        torch.testing.assert_close(torch.cat(parts, 2) * live, whole * live, rtol=0, atol=1e-10)
        if end.memory_BHFV is not None:
            torch.testing.assert_close(state.memory_BHFV, end.memory_BHFV, rtol=0, atol=1e-10)


@pytest.mark.parametrize("position", [PLAIN, PACKED], ids=["plain", "packed"])
@pytest.mark.parametrize(("window", "shape", "options"), CASES[:-1])
def test_chunked_gradients_equal_autograd_through_the_reference(position, window, shape, options):
    spec = make_spec(window, shape, **options)
    grads = {}
    for backend in BACKENDS:
        leaves = inputs(53, grad=True)
        maps = [] if spec.feature_q is None else [*spec.feature_q.parameters(), *spec.feature_k.parameters()]
        factor = spec.log_window_factor_H.detach().requires_grad_(True)
        forced = type(spec)(**{**spec.__dict__, "log_window_factor_H": factor})
        with use_backend(backend):
            y, _ = window_linear(*leaves, spec=forced, layout=Layout(position_BT=position), need_state=False)
        torch.manual_seed(9)
        grads[backend] = torch.autograd.grad(
            (y * torch.randn_like(y)).sum(), [*leaves, factor, *maps], allow_unused=True
        )
    for expected, got in zip(grads["reference"], grads["chunked"], strict=True):
        if expected is None or got is None:
            assert expected is None or expected.abs().max() == 0
            assert got is None or got.abs().max() == 0
            continue
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_a_state_carries_gradients_across_a_cut():
    spec = make_spec(4, "terraced")
    q, k, v = inputs(40, grad=True)
    whole, _ = window_linear(q, k, v, spec=spec, layout=Layout())
    expected = torch.autograd.grad(whole[:, :, 30:].square().sum(), k)[0]
    with use_backend("chunked"):
        _, state = window_linear(q[:, :, :30], k[:, :, :30], v[:, :, :30], spec=spec, layout=Layout())
        y, _ = window_linear(q[:, :, 30:], k[:, :, 30:], v[:, :, 30:], spec=spec, layout=Layout(start=30), state=state)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), k)[0], expected)


@pytest.mark.parametrize("shape", ["terraced", "sliding"])
def test_a_window_over_the_whole_text_is_softmax_attention(shape):
    spec, (q, k, v) = make_spec(53, shape), inputs(53)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=spec.scaling, enable_gqa=True
    )
    for backend in BACKENDS:
        with use_backend(backend):
            y, _ = window_linear(q, k, v, spec=spec, layout=Layout())
        torch.testing.assert_close(y, expected)


def test_fp32_decode_agrees_with_prefill_to_1e_5():
    spec = make_spec(6, "terraced", shared=True)
    q, k, v = (x.float() for x in inputs(301))
    whole, _ = window_linear(q, k, v, spec=spec, layout=Layout())
    state, parts = None, []
    for t in range(301):
        y, state = window_linear(
            q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1], spec=spec, layout=Layout(t), state=state
        )
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=0, atol=1e-5)


def test_the_state_stops_growing():
    spec = make_spec(8, "terraced", sinks=2)
    sizes = []
    for tokens in (64, 640):
        q, k, v = inputs(tokens)
        sizes.append(window_linear(q, k, v, spec=spec, layout=Layout())[1].num_bytes)
    assert sizes[0] == sizes[1]


def test_half_precision_keeps_the_sum_in_fp32():
    spec = make_spec(4, "terraced")
    q, k, v = (x.to(torch.bfloat16) for x in inputs(40))
    y, state = window_linear(q, k, v, spec=spec, layout=Layout())
    assert y.dtype == state.k_BGRD.dtype == torch.bfloat16
    assert state.memory_BHFV.dtype == torch.float32
    exact, _ = window_linear(*(x.double() for x in (q, k, v)), spec=spec, layout=Layout())
    assert (y.double() - exact).abs().max() < 0.02


@pytest.mark.parametrize("position", [PLAIN, PADDED], ids=["plain", "padded"])
def test_advance_gives_the_state_of_a_full_step(position):
    spec, (q, k, v) = make_spec(5, "terraced", sinks=2), inputs(53)
    layout = Layout(position_BT=position)
    _, expected = window_linear(q, k, v, spec=spec, layout=layout)
    got = advance(k, v, spec=spec, layout=layout)
    for name in ("k_BGRD", "v_BGRV", "memory_BHFV", "sink_k_BGND"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name))


def test_memory_of_training_is_linear(monkeypatch):
    """Saved tensors per token do not grow with T."""
    saved = {}
    for tokens in (128, 512):
        spec, (q, k, v) = make_spec(16, "terraced"), inputs(tokens, grad=True)
        total = 0

        def count(x):
            nonlocal total
            total += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            window_linear(q, k, v, spec=spec, layout=Layout(), need_state=False)
        saved[tokens] = total / tokens
    assert saved[512] < 1.1 * saved[128]


def test_layout_reads_padding_and_packing():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert Layout.from_inputs(num_tokens=5, past=0, attention_mask=mask).position_BT.tolist() == [
        [-1, -1, 0, 1, 2],
        [0, 1, 2, 3, 4],
    ]
    assert Layout.from_inputs(num_tokens=2, past=3, attention_mask=mask).position_BT.tolist() == [[1, 2], [3, 4]]
    assert Layout.from_inputs(num_tokens=5, past=0, attention_mask=torch.ones(2, 5)).is_plain
    packed = torch.tensor([[0, 1, 0, 1, 2]])
    assert Layout.from_inputs(num_tokens=5, past=0, position_ids=packed).position_BT.tolist() == packed.tolist()
    assert Layout.from_inputs(num_tokens=3, past=2, position_ids=torch.tensor([[2, 3, 4]])).is_plain
    with pytest.raises(ValueError, match="between new tokens"):
        Layout.from_inputs(num_tokens=5, past=0, attention_mask=torch.tensor([[1, 1, 0, 1, 1]]))

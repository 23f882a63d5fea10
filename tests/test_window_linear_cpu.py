"""The chunked backend on a CPU: blocks of a few heads, masks without padding, 16 bits widened group by group."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import pytest
import torch
from benchmarks.peak import product_flops
from test_window_linear import PACKED, PLAIN, inputs, make_spec

import linearize.ops.blocking as blocking
import linearize.ops.matmul as matmul
from linearize.ops.blocking import Scratch, head_blocks
from linearize.ops.hedgehog import hedgehog
from linearize.ops.layout import Layout
from linearize.ops.matmul import exp_or_zero, product_into
from linearize.ops.window_linear import use_backend, window_linear
from linearize.ops.window_linear.masks import UNLIKE

subject = sys.modules[window_linear.__module__ + ".chunked"]  # the package's `chunked` is the function
KINDS = [
    (4, "terraced", {"shared": True, "sinks": 3}),
    (5, "sliding", {}),
    (16, "terraced", {"softcap": 2.0, "affine": True}),
    (0, "sliding", {"name": "elu"}),
]


def run(backend, spec, position=None, tokens=203, state=None, dtype=torch.float64, need_state=True):
    leaves = [x.to(dtype).requires_grad_(True) for x in inputs(tokens)]
    maps = [*spec.feature_q.parameters(), *spec.feature_k.parameters()]
    with use_backend(backend):
        y, after = window_linear(
            *leaves, spec=spec, layout=Layout(position_BT=position), state=state, need_state=need_state
        )
    torch.manual_seed(9)
    loss = (y * torch.randn_like(y)).sum()
    if after is not None:
        loss = loss + (after.memory_BHFV * torch.randn_like(after.memory_BHFV)).sum()
    return y, after, torch.autograd.grad(loss, [*leaves, *maps], allow_unused=True)


@pytest.mark.parametrize("block", [1, 1 << 10, 1 << 30], ids=["one head", "a few heads", "all heads"])
@pytest.mark.parametrize("position", [PLAIN, PACKED], ids=["plain", "packed"])
@pytest.mark.parametrize(("window", "shape", "options"), KINDS)
def test_blocks_of_any_size_give_the_same(monkeypatch, block, position, window, shape, options):
    """Chunk groups of a chunk or two: masks of later chunks, memories carried along, one head at a time or more."""
    spec, tokens = make_spec(window, shape, **options), 203 if position is None else 53
    expected, state, gradients = run("reference", spec, position, tokens)
    monkeypatch.setattr(blocking, "BLOCK", block)
    monkeypatch.setattr(subject, "ONE_HEAD", min(block, 1 << 12))
    y, after, got = run("chunked", spec, position, tokens)
    live = 1 if position is None else (position >= 0)[:, None, :, None]
    torch.testing.assert_close(y * live, expected * live, rtol=0, atol=1e-10)
    torch.testing.assert_close(after.memory_BHFV, state.memory_BHFV, rtol=0, atol=1e-10)
    for mine, its in zip(got, gradients, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("position", [PLAIN, PACKED], ids=["plain", "packed"])
@pytest.mark.parametrize(("window", "shape", "options"), KINDS)
def test_gradients_that_nobody_needs_are_not_computed(window, shape, options, position):
    """Of every part alone, they are those of all parts together, for fewer products."""
    spec, tokens = make_spec(window, shape, **options), 203 if position is None else 53
    names = ["q", "k", "v", "map of q", "map of k", "log g"]

    def gradients(needed):
        q, k, v = (x.requires_grad_(name in needed) for x, name in zip(inputs(tokens), "qkv", strict=True))
        maps = {"map of q": spec.feature_q, "map of k": spec.feature_k}
        for name, own in maps.items():
            own.requires_grad_(name in needed)
        log_g = spec.log_window_factor_H.detach().requires_grad_("log g" in needed)
        with use_backend("chunked"):
            own = replace(spec, log_window_factor_H=log_g)
            y, _ = window_linear(q, k, v, spec=own, layout=Layout(position_BT=position), need_state=False)
        torch.manual_seed(9)
        loss = (y * torch.randn_like(y)).sum()
        leaves = {"q": [q], "k": [k], "v": [v], "log g": [log_g]} | {n: list(m.parameters()) for n, m in maps.items()}
        needed_leaves = [leaf for name in names if name in needed for leaf in leaves[name]]
        if not loss.requires_grad or not needed_leaves:
            return {}, 0
        for leaf in needed_leaves:
            leaf.grad = None
        flops = product_flops(lambda: loss.backward(inputs=needed_leaves))
        return {name: [leaf.grad for leaf in leaves[name]] for name in names if name in needed}, flops

    expected, whole = gradients(names)
    for needed in [*([name] for name in names), ["map of q", "map of k", "log g"], ["q", "v"], ["k", "map of q"]]:
        got, flops = gradients(needed)
        assert flops < whole
        for name in got:
            for mine, its in zip(got[name], expected[name], strict=True):
                torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)


def test_chunks_of_a_plain_text_share_their_masks(monkeypatch):
    monkeypatch.setattr(subject, "ONE_HEAD", 1 << 12)
    spec, layout = make_spec(4, "terraced", sinks=3), Layout()
    with use_backend("chunked"):
        window_linear(*inputs(403), spec=spec, layout=layout)
    (masks,) = (x for key, x in layout.memo.items() if key[0] == "masks")
    assert masks.first.bias.shape[1] <= UNLIKE + 1 and masks.others.bias.shape[1] == 1
    assert masks.others.fold is None and masks.others.keep is None
    assert not masks.others.bias[..., 3:-16].eq(0).all()


def test_what_the_chunk_groups_folded_is_not_mapped_again(monkeypatch):
    """A prefill maps each key once for its output, and only the last ones again for the state."""
    mapped = []
    spec = make_spec(4, "terraced")
    inner = spec.feature_k
    counted = type(spec)(**{**spec.__dict__, "feature_k": lambda x: (mapped.append(x.shape[2]), inner(x))[1]})
    with use_backend("chunked"):
        window_linear(*inputs(803), spec=counted, layout=Layout())
    assert mapped[-1] <= 2 * 16 and sum(mapped) < 803 + 4 * 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_widened_group_by_group(monkeypatch, dtype):
    """Never a whole tensor at once; what comes out is what the fp32 backend gives for the same numbers, rounded."""
    monkeypatch.setattr(subject, "ONE_HEAD", 1 << 12)
    monkeypatch.setattr(matmul, "has_bf16_units", lambda: False)  # whose products round
    spec, widened = make_spec(4, "terraced", shared=True, sinks=2), []
    spec = type(spec)(**{**spec.__dict__, "feature_k": spec.feature_k.float(), "feature_q": spec.feature_q.float()})
    attend = subject.attend_chunk_group
    monkeypatch.setattr(
        subject,
        "attend_chunk_group",
        lambda *a: (widened.append((a[1].dtype, a[1].shape[2] * a[1].shape[3])), attend(*a))[1],
    )
    narrow = [x.to(dtype) for x in inputs(403)]
    with use_backend("chunked"):
        y, state = window_linear(*narrow, spec=spec, layout=Layout())
        assert len(widened) > 3 and all(d == torch.float32 and n < 403 / 2 for d, n in widened)
        exact, wide = window_linear(*(x.float() for x in narrow), spec=spec, layout=Layout())
    assert y.dtype == state.k_BGRD.dtype == dtype and state.memory_BHFV.dtype == torch.float32
    torch.testing.assert_close(y, exact.to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(state.memory_BHFV, wide.memory_BHFV, rtol=1e-6, atol=1e-5)


def test_gradients_of_16_bits_are_those_of_fp32_rounded():
    spec = make_spec(4, "terraced")
    spec = type(spec)(**{**spec.__dict__, "feature_k": spec.feature_k.float(), "feature_q": spec.feature_q.float()})
    results = {}
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [x.to(torch.bfloat16).to(dtype).requires_grad_(True) for x in inputs(75)]
        with use_backend("chunked"):
            y, _ = window_linear(*leaves, spec=spec, layout=Layout(), need_state=False)
        torch.manual_seed(5)
        results[dtype] = torch.autograd.grad(y, leaves, torch.randn(y.shape).to(torch.bfloat16).to(dtype))
    for narrow, wide in zip(results[torch.bfloat16], results[torch.float32], strict=True):
        assert narrow.dtype == torch.bfloat16
        assert (narrow.float() - wide).norm() < 0.006 * wide.norm()


def test_gradients_of_gradients_are_refused():
    spec, leaves = make_spec(4, "terraced"), inputs(53, grad=True)
    with use_backend("chunked"):
        y, _ = window_linear(*leaves, spec=spec, layout=Layout(), need_state=False)
    (first,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_inference_mode_leaves_memory_that_training_may_use():
    blocking.scratch()._flat.clear()
    spec, arguments = make_spec(4, "terraced"), inputs(53)
    with torch.inference_mode(), use_backend("chunked"):
        expected, _ = window_linear(*arguments, spec=spec, layout=Layout())
    y, _, _ = run("chunked", spec, tokens=53)
    torch.testing.assert_close(y, expected)
    with torch.inference_mode(), use_backend("chunked"):
        again, _ = window_linear(*arguments, spec=spec, layout=Layout())
    assert torch.equal(again, expected)


def test_blocks_cover_every_head_once():
    for batch, groups, numbers in itertools.product((1, 3), (1, 5), (1, blocking.BLOCK // 7, blocking.BLOCK, 10**9)):
        seen = torch.zeros(batch, groups)
        for block in head_blocks(batch, groups, numbers):
            part = block.of(seen)
            assert part.numel() * numbers <= max(numbers, blocking.BLOCK)
            part += 1
        assert seen.eq(1).all()


def test_scratch_is_the_same_memory_unless_it_has_no_contents():
    memory, x = Scratch(), torch.zeros(2)
    first = memory("a", 3, 5, like=x)
    assert memory("a", 2, 4, like=x).data_ptr() == first.data_ptr() != memory("b", 2, like=x).data_ptr()
    assert memory("a", 2, like=x.double()).dtype == torch.float64
    assert memory.rows("c", 3, 17, like=x).stride() == (32, 1)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = memory("a", 3, like=torch.zeros(2))
        assert fake.fake_mode is mode
    assert type(memory("a", 3, like=x)) is torch.Tensor


@pytest.mark.parametrize("columns", [5, 37], ids=["narrow", "wide"])
@pytest.mark.parametrize("cut", [False, True], ids=["in place", "strided"])
def test_products_are_written_into_their_output(columns, cut):
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 19, 7), torch.randn(2, 3, 7, columns)
    for beta in (0, 1):
        whole = torch.randn(2, 5, 19, columns)
        out = whole[:, 1:4] if cut else torch.randn(2, 3, 19, columns)
        kept, expected = whole[:, 4].clone(), beta * out + 0.3 * (a @ b)
        product_into(out, a, b, beta=beta, alpha=0.3)
        torch.testing.assert_close(out, expected)
        assert torch.equal(whole[:, 4], kept)


@pytest.mark.parametrize("block", [64, 1 << 17])
@pytest.mark.parametrize(("lead", "per_group"), [((), 1), ((2,), 3), ((2, 3), 2)])
@pytest.mark.parametrize("gained", [False, True])
def test_hedgehog_by_heads_equals_autograd(monkeypatch, block, lead, per_group, gained):
    monkeypatch.setattr(blocking, "BLOCK", block)
    torch.manual_seed(1)
    x = torch.randn(*lead, 3, 11, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3 * per_group, 5, 7, dtype=torch.float64, requires_grad=True)
    gain = torch.randn(*lead, 3 * per_group, 11, 1, dtype=torch.float64, requires_grad=True) if gained else None
    z = torch.einsum("...gcd,grdf->...grcf", x, weight.unflatten(0, (3, -1))).flatten(-4, -3)
    expected = torch.cat([z.softmax(-1), (-z).softmax(-1)], dim=-1) * (1 if gain is None else gain.exp())
    got, leaves = hedgehog(x, weight, gain), [t for t in (x, weight, gain) if t is not None]
    torch.testing.assert_close(got, expected)
    d_phi = torch.randn_like(got)
    for mine, its in zip(
        torch.autograd.grad(got, leaves, d_phi), torch.autograd.grad(expected, leaves, d_phi), strict=True
    ):
        torch.testing.assert_close(mine, its)


def test_exponentials_of_masked_and_low_scores() -> None:
    x = torch.tensor([0.7, -3.0, -75.0, -85.0, -torch.inf], dtype=torch.float64, requires_grad=True)
    p = exp_or_zero(x)
    p.sum().backward()
    assert x.grad is not None
    expected = torch.tensor([0.7, -3.0, -75.0], dtype=torch.float64).exp()
    for values in (p.detach(), x.grad, exp_or_zero(x.detach())):
        torch.testing.assert_close(values[:3], expected, rtol=1e-14, atol=0)
        assert values[3:].tolist() == [0, 0]

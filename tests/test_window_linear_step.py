"""The backend that decodes one token at a time, against the reference on the whole text and on every single step."""

from __future__ import annotations

import pytest
import torch
from test_window_linear import CASES, V, inputs, make_spec

from linearize.ops.layout import Layout
from linearize.ops.window_linear import use_backend, window_linear
from linearize.ops.window_linear.backends import WindowCall, choice, cursor_of


def backend(q, layout, state, spec, tokens=None):
    """The one that such a call gets, with an output for each token of q."""
    tokens, whole = tokens or q.shape[2], tokens in (None, q.shape[2])
    call = {"device": "cpu", "dtype": q.dtype, "tokens": tokens, "layout": layout, "whole": whole, "spec": spec}
    return choice(WindowCall(cursor=cursor_of(state, layout), **call))[0]


@pytest.mark.parametrize(("window", "shape", "options"), CASES)
def test_decoding_gives_the_reference_of_the_whole_text(window, shape, options):
    spec, (q, k, v) = make_spec(window, shape, **options), inputs(53)
    with use_backend("reference"):
        whole, end = window_linear(q, k, v, spec=spec, layout=Layout())
    first = 11
    y, state = window_linear(q[:, :, :first], k[:, :, :first], v[:, :, :first], spec=spec, layout=Layout())
    parts = [y]
    for t in range(first, 53):
        one = [x[:, :, t : t + 1] for x in (q, k, v)]
        assert backend(one[0], Layout(t), state, spec) == "step"
        y, state = window_linear(*one, spec=spec, layout=Layout(t), state=state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=0, atol=1e-10)
    assert state.next == end.next == 53
    for name in ("k_BGRD", "v_BGRV", "memory_BHFV", "sink_k_BGND", "sink_v_BGNV"):
        torch.testing.assert_close(getattr(state, name), getattr(end, name), rtol=0, atol=1e-10)


def test_a_step_needs_one_token_a_plain_layout_and_a_plain_state():
    spec, (q, k, v) = make_spec(5, "sliding", sinks=2), inputs(9)
    _, plain = window_linear(q, k, v, spec=spec, layout=Layout())
    _, ragged = window_linear(q, k, v, spec=spec, layout=Layout(position_BT=torch.arange(9).repeat(2, 1)))
    one = q[:, :, :1]
    assert backend(one, Layout(9), plain, spec) == "step"
    assert backend(one, Layout(9), ragged, spec) != "step"
    assert backend(one, Layout(), None, spec) != "step"
    assert backend(q[:, :, :2], Layout(9), plain, spec) != "step"
    assert backend(one, Layout(position_BT=torch.tensor([[9], [9]])), plain, spec) != "step"
    y, _ = window_linear(one, k[:, :, :1], v[:, :, :1], spec=spec, layout=Layout(9), state=plain, need_state=False)
    assert y.shape == (2, 6, 1, V)


@pytest.mark.parametrize("window", [4, 16])
def test_a_plain_state_holds_no_memory_but_its_own(window):
    spec, (q, k, v) = make_spec(window, "terraced", sinks=1), inputs(53)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))  # as a model gives them
    for row in (slice(0, 2), slice(0, 1)):
        _, state = window_linear(q[row], k[row], v[row], spec=spec, layout=Layout())
        for x in (state.k_BGRD, state.v_BGRV, state.sink_k_BGND, state.sink_v_BGNV, state.memory_BHFV):
            assert x.untyped_storage().nbytes() == x.numel() * x.element_size()


@pytest.mark.parametrize(("window", "shape", "options"), CASES)
def test_a_few_tokens_give_the_reference_of_the_whole_text(window, shape, options):
    """Pieces as verification makes them: some tokens committed, some neither committed nor asked for."""
    spec, (q, k, v) = make_spec(window, shape, **options), inputs(53)
    with use_backend("reference"):
        whole, _ = window_linear(q, k, v, spec=spec, layout=Layout())
    for first, sizes in (
        (1, [(0, 0, 3), (3, 2, 1), (1, 0, 9), (11, 4, 13)]),
        (20, [(0, 1, 31), (9, 0, 2), (2, 0, 22)]),
    ):
        _, state = window_linear(*(x[:, :, :first] for x in (q, k, v)), spec=spec, layout=Layout())
        start = first
        for commit, waiting, new in sizes:
            end = start + commit + waiting + new
            arguments = {"spec": spec, "layout": Layout(start), "state": state}
            part = [q[:, :, end - new : end], k[:, :, start:end], v[:, :, start:end]]
            assert (backend(part[0], Layout(start), state, spec, end - start) == "reference") == (not spec.has_window)
            y, after = window_linear(*part, commit=commit, **arguments)
            torch.testing.assert_close(y, whole[:, :, end - new : end], rtol=0, atol=1e-10)
            with use_backend("reference"):
                y, all_after = window_linear(*part, **arguments)
                _, expected = window_linear(*part, commit=commit, **arguments)
            again, actual = window_linear(*part, **arguments)
            torch.testing.assert_close(again, y, rtol=0, atol=1e-10)
            for one, two in ((after, expected), (actual, all_after)):
                assert one.next == two.next
                for name in ("k_BGRD", "v_BGRV", "memory_BHFV", "sink_k_BGND", "sink_v_BGNV"):
                    torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=0, atol=1e-10)
            state, start = after, start + commit
            for x in (state.k_BGRD, state.v_BGRV):
                assert x.untyped_storage().nbytes() == x.numel() * x.element_size()


def test_few_tokens_are_few_plain_and_after_others():
    spec, (q, k, v) = make_spec(5, "sliding", sinks=2), inputs(9)
    _, plain = window_linear(q, k, v, spec=spec, layout=Layout())
    _, ragged = window_linear(q, k, v, spec=spec, layout=Layout(position_BT=torch.arange(9).repeat(2, 1)))
    two = q[:, :, :2]
    assert [backend(two, Layout(9), plain, spec, tokens) for tokens in (2, 32, 33)] == [
        "multi_token",
        "multi_token",
        "reference",
    ]
    assert backend(two, Layout(9), ragged, spec) == backend(two, Layout(), None, spec) == "reference"
    assert backend(two, Layout(position_BT=torch.tensor([[9, 10]])), plain, spec) == "reference"

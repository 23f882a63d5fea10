"""Documents whose first token is not at position 0: an offset, padding that was counted, a part of a document.

Nothing before the first token is seen, whatever still lies in the ring of the call before, and a terraced window's
blocks go by the position.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from models import left_padded, mixer, student_of, text, tiny
from test_window_linear import inputs, make_spec

from linearize.ops.layout import Layout
from linearize.ops.window_linear import BACKENDS, advance, use_backend, window_linear
from linearize.ops.window_linear.state import WindowBuffers

TOKENS = 41


def rows(*documents: list[tuple[int, int]]) -> torch.Tensor:
    """Positions: of each document its first position (-1: padding) and its tokens."""
    made = [[p if first < 0 else first + i for first, n in row for i, p in enumerate([-1] * n)] for row in documents]
    assert all(len(row) == TOKENS for row in made)
    return torch.tensor(made)


LAYOUTS = {
    "offset": rows([(5, 41)], [(5, 41)]),
    "far": rows([(100_003, 41)], [(1, 41)]),
    "counted padding": rows([(-1, 9), (9, 32)], [(0, 41)]),
    "parts": rows([(0, 8), (3, 1), (6, 20), (2, 12)], [(-1, 2), (1, 17), (30, 22)]),
    "in part of padding": rows([(-1, 12), (1, 29)], [(-1, 12), (12, 29)]),
}
SPECS = [
    (4, "terraced", {}),
    (5, "sliding", {"linear": False}),
    (7, "sliding", {"shared": True, "sinks": 3}),
    (3, "terraced", {"sinks": 2, "softcap": 2.0}),
    (64, "terraced", {"sinks": 4}),
    (0, "sliding", {"name": "elu"}),
]
CUTS = ([10, 11, 12, 30], [1, 9, 25])


def alone(q, k, v, spec, position):
    """Each document by itself in one call of the reference, after which there is nothing."""
    y = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b in range(len(position)):
        p = position[b].tolist()
        edges = [t for t in range(TOKENS) if t == 0 or p[t] != p[t - 1] + 1 or p[t - 1] < 0] + [TOKENS]
        for a, z in itertools.pairwise(edges):
            if p[a] >= 0:
                part = [x[b : b + 1, :, a:z] for x in (q, k, v)]
                layout = Layout(position_BT=position[b : b + 1, a:z])
                with use_backend("reference"):
                    y[b : b + 1, :, a:z] = window_linear(*part, spec=spec, layout=layout, need_state=False)[0]
    return y


@pytest.mark.parametrize("backend", [*BACKENDS, "as chosen"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("window", "shape", "options"), SPECS)
def test_a_document_may_begin_anywhere_and_be_cut_anywhere(backend, name, window, shape, options):
    spec, (q, k, v), position = make_spec(window, shape, **options), inputs(TOKENS), LAYOUTS[name]
    expected, live = alone(q, k, v, spec, position), (position >= 0)[:, None, :, None]
    for cuts in ([], *CUTS):
        state, parts = None, []
        for a, b in itertools.pairwise([0, *cuts, TOKENS]):
            part = [x[:, :, a:b] for x in (q, k, v)]
            layout = Layout(position_BT=position[:, a:b])
            if backend == "as chosen":
                y, state = window_linear(*part, spec=spec, layout=layout, state=state)
            else:
                with use_backend(backend):
                    y, state = window_linear(*part, spec=spec, layout=layout, state=state)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 2) * live, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("window", "shape", "options"), SPECS)
def test_a_plain_text_may_begin_anywhere(backend, window, shape, options):
    """No padding, no positions but the first: as a text whose positions are given."""
    spec, (q, k, v) = make_spec(window, shape, **options), inputs(TOKENS)
    expected = alone(q, k, v, spec, LAYOUTS["offset"])
    with use_backend(backend):
        y, state = window_linear(*(x[:, :, :11] for x in (q, k, v)), spec=spec, layout=Layout(5))
        z, _ = window_linear(*(x[:, :, 11:] for x in (q, k, v)), spec=spec, layout=Layout(16), state=state)
    torch.testing.assert_close(torch.cat([y, z], 2), expected, rtol=0, atol=1e-10)
    for t in range(11, TOKENS):  # one at a time, and what a rollback replays
        one = [x[:, :, t : t + 1] for x in (q, k, v)]
        y, after = window_linear(*one, spec=spec, layout=Layout(5 + t), state=state)
        state = advance(*one[1:], spec=spec, layout=Layout(5 + t), state=state)
        torch.testing.assert_close(y, expected[:, :, t : t + 1], rtol=0, atol=1e-10)
        torch.testing.assert_close(after.k_BGRD, state.k_BGRD)


@pytest.mark.parametrize("tokens", [1, 6, 40])
def test_tokens_that_do_not_follow_the_state_open_a_document(tokens):
    spec, (q, k, v) = make_spec(7, "sliding", sinks=3), inputs(TOKENS)
    _, state = window_linear(q, k, v, spec=spec, layout=Layout())
    assert state.next == TOKENS
    late = [x[:, :, :tokens] for x in (q, k, v)]
    expected, _ = window_linear(*late, spec=spec, layout=Layout(50))
    y, after = window_linear(*late, spec=spec, layout=Layout(50), state=state)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    assert after.begin.tolist() == [50, 50] and after.next.tolist() == [50 + tokens] * 2


def test_a_state_tells_where_its_document_begins_only_where_that_is_not_at_0():
    spec, (_, k, v) = make_spec(7, "sliding", sinks=3), inputs(TOKENS)

    def begin(position, state=None):
        return advance(k, v, spec=spec, layout=Layout(position_BT=position), state=state).begin

    assert begin(torch.arange(TOKENS).repeat(2, 1)) is None
    assert begin(LAYOUTS["parts"]).tolist() == [2, 30]
    state = advance(k, v, spec=spec, layout=Layout(position_BT=LAYOUTS["parts"]))
    assert state.next.tolist() == [14, 52]
    row = torch.arange(TOKENS)
    assert begin(torch.stack([14 + row, row]), state).tolist() == [2, 0]  # goes on; opens another


def test_buffers_keep_only_what_is_of_the_document():
    spec, (q, k, v) = make_spec(7, "sliding", sinks=3), inputs(TOKENS)
    position = LAYOUTS["parts"][:, :11]
    _, state = window_linear(*(x[:, :, :11] for x in (q, k, v)), spec=spec, layout=Layout(position_BT=position))
    again = replace(WindowBuffers.of(state, spec, most=2).state(spec), memory_BHFV=state.memory_BHFV)  # theirs is fp32
    assert again.begin.tolist() == state.begin.tolist() == [6, 1]
    late, layout = [x[:, :, 11:] for x in (q, k, v)], Layout(position_BT=LAYOUTS["parts"][:, 11:])
    y, _ = window_linear(*late, spec=spec, layout=layout, state=again)
    torch.testing.assert_close(y, alone(q, k, v, spec, LAYOUTS["parts"])[:, :, 11:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["lolcats", "sliding_window", "gla"])
def test_a_student_reads_on_after_padding_that_was_counted(name):
    """`position_ids` that count the padding: the second call through the cache gives what one call gives."""
    student, (ids, mask) = student_of(tiny(), [mixer(name)] * 3), left_padded(text(2, 23), [23, 14])
    options = {"position_ids": torch.arange(23).repeat(2, 1)}
    with torch.no_grad():
        whole = student(ids, attention_mask=mask, **options).logits
        first = {"position_ids": options["position_ids"][:, :11], "attention_mask": mask[:, :11]}
        cache = student(ids[:, :11], **first, use_cache=True).past_key_values
        then = {"position_ids": options["position_ids"][:, 11:], "attention_mask": mask}
        logits = student(ids[:, 11:], **then, past_key_values=cache).logits
    torch.testing.assert_close(logits, whole[:, 11:], rtol=0, atol=2e-4)

"""Decoding writes into free memory behind the ring, and no state that was returned ever changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_window_linear import inputs, make_spec

from linearize.ops.layout import Layout
from linearize.ops.window_linear import WindowLinearState, use_backend, window_linear
from linearize.ops.window_linear.state import ring_buffer_slots

WINDOWS = [(7, "terraced"), (9, "sliding")]
NAMES = ("k_BGRD", "v_BGRV", "memory_BHFV", "sink_k_BGND", "sink_v_BGNV")


class Decode:
    """One token after the other from some state of a text."""

    def __init__(self, window: int, shape: Any, tokens: int = 61) -> None:
        self.spec, self.text = make_spec(window, shape, sinks=2), inputs(tokens)

    def start(self, tokens: int) -> WindowLinearState:
        state = window_linear(*(x[:, :, :tokens] for x in self.text), spec=self.spec, layout=Layout())[1]
        assert state is not None
        return state

    def step(self, state: WindowLinearState, *, other: bool = False) -> tuple[torch.Tensor, WindowLinearState]:
        """The text's next token, or some `other` one."""
        assert isinstance(state.next, int)
        q, k, v = (x[:, :, state.next : state.next + 1] * (0.3 if other else 1.0) for x in self.text)
        y, after = window_linear(q, k, v, spec=self.spec, layout=Layout(state.next), state=state)
        assert after is not None
        return y, after


def values(state: WindowLinearState) -> list[torch.Tensor]:
    return [x.clone() for name in NAMES if (x := getattr(state, name)) is not None]


def equal(state: WindowLinearState, expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(values(state), expected, strict=True))


@torch.no_grad()
@pytest.mark.parametrize(("window", "shape"), WINDOWS)
def test_tokens_go_into_one_memory_until_it_is_full(window: int, shape: Any) -> None:
    decode = Decode(window, shape)
    _, state = decode.step(decode.start(15))
    memories = []
    for _ in range(40):
        assert state.ring_buffer is not None and state.ring_buffer.k_BGCD.shape[2] == ring_buffer_slots(window, shape)
        assert state.k_BGRD.untyped_storage().data_ptr() == state.ring_buffer.k_BGCD.data_ptr()
        memories.append(state.ring_buffer)
        _, state = decode.step(state)
    new = len({id(ring_buffer) for ring_buffer in memories})
    assert 1 < new <= (40 // window + 2 if shape == "terraced" else 40 // 16 + 1)


@torch.no_grad()
@pytest.mark.parametrize(("window", "shape"), WINDOWS)
def test_states_given_out_never_change_and_may_be_gone_on_from_twice(window: int, shape: Any) -> None:
    decode, states = Decode(window, shape), []
    _, state = decode.step(decode.start(12))
    for _ in range(30):
        states.append((state, values(state)))
        _, side = decode.step(state)
        _, state_again = decode.step(state, other=True)
        y, state = decode.step(state)
        assert equal(side, values(state)) and not equal(state_again, values(state))
        with use_backend("reference"):
            expected, _ = decode.step(states[-1][0])
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    assert all(equal(state, before) for state, before in states)


@torch.no_grad()
@pytest.mark.parametrize("how", ["copied", "reordered", "fewer rows", "other memory"])
def test_a_state_made_from_another_one_leaves_its_memory_alone(how: str) -> None:
    decode = Decode(7, "terraced")
    _, state = decode.step(decode.start(12))
    change: Any = {"reordered": lambda x: x.flip(0), "fewer rows": lambda x: x[:1], "other memory": lambda x: x.clone()}
    made = copy.deepcopy(state) if how == "copied" else state.map_batch(change[how])
    rows = made.k_BGRD.shape[0]
    text = [x[:rows].flip(0) if how == "reordered" else x[:rows] for x in decode.text]
    for _ in range(3):
        before = values(state)
        _, state = decode.step(state)
        at = made.next
        _, made = window_linear(*(x[:, :, at : at + 1] for x in text), spec=decode.spec, layout=Layout(at), state=made)
    assert made.ring_buffer is not state.ring_buffer and len(before) == 5
    expected = state.map_batch(change.get(how, lambda x: x.clone()))
    for name in NAMES:
        torch.testing.assert_close(getattr(made, name), getattr(expected, name), rtol=0, atol=1e-12)


def test_gradients_and_inference_mode_get_memory_of_their_own() -> None:
    decode = Decode(9, "sliding")
    with torch.inference_mode():
        _, state = decode.step(decode.start(12))
    first = state.ring_buffer
    with torch.no_grad():
        _, state = decode.step(state)
    assert first is not None and state.ring_buffer is not None and state.ring_buffer is not first
    with torch.no_grad():
        _, state = decode.step(decode.start(12))
    decode.text = tuple(x.requires_grad_(True) for x in decode.text)
    y, after = decode.step(state)
    assert state.ring_buffer is not None and after.ring_buffer is None
    with torch.no_grad():
        decode.step(state)  # goes into the ring buffer that the first output was computed beside
    y.sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in decode.text)

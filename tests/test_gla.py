"""Liger's gated linear attention against a loop over tokens written from the paper's equations (fp64)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from linearize.mixers.base import AttentionShape
from linearize.mixers.gla import Gla, GlaConfig
from linearize.ops.layout import Layout

B, H, G, D, V, T, W = 2, 6, 3, 5, 7, 37, 4
SHAPE = AttentionShape(num_heads=H, num_kv_heads=G, head_dim=D, value_dim=V, model_dim=11)
SCALING, CAP = 0.61, 3.0
POSITIONS = torch.stack(
    [
        torch.cat([torch.arange(21), torch.arange(1), torch.arange(15)]),
        torch.cat([torch.full((9,), -1), torch.arange(28)]),
    ]
)


def build(**settings: Any) -> Gla:
    mixer = GlaConfig(**{"window": W, **settings}).build(SHAPE)
    assert isinstance(mixer, Gla) and not list(mixer.parameters())
    return mixer


def inputs(seed: int = 0) -> list[Tensor]:
    """q, k, v and keys; the keys far from k, as norms and rotary positions would make them."""
    torch.manual_seed(seed)
    sizes = ((H, D), (G, D), (G, V), (G, D))
    return [2 * torch.randn(B, n, T, d, dtype=torch.float64) for n, d in sizes]


def naive(arguments: list[Tensor], positions: Tensor, share: float, divisor: float) -> Tensor:
    """One token after the other."""
    q, k, v, keys = arguments
    y = torch.zeros(B, H, T, V, dtype=torch.float64)
    for b, h in itertools.product(range(B), range(H)):
        g = h // (H // G)
        memory = torch.zeros(D, V, dtype=torch.float64)
        for t in range(T):
            position = int(positions[b, t])
            if position < 0:
                continue
            if position == 0:
                memory = torch.zeros_like(memory)
            gate = (1 / (1 + (-keys[b, g, t]).exp())) ** (1 / divisor)
            memory = gate[:, None] * memory + torch.outer(k[b, g, t].softmax(0), v[b, g, t])
            near = slice(t - min(position, W - 1), t + 1)
            scores = CAP * torch.tanh(SCALING * k[b, g, near] @ q[b, h, t] / CAP)
            y[b, h, t] = share * scores.softmax(0) @ v[b, g, near] + (1 - share) * q[b, h, t].softmax(0) @ memory
    return y


def run(mixer: Gla, arguments: list[Tensor], positions: Tensor, cuts: list[int], **settings: Any) -> tuple[Tensor, Any]:
    state, parts = None, []
    for a, b in itertools.pairwise([0, *cuts, T]):
        y, state = mixer(
            *(x[:, :, a:b] for x in arguments),
            scaling=SCALING, softcap=CAP, layout=Layout(position_BT=positions[:, a:b]), state=state, **settings,
        )  # fmt: skip
        parts.append(y)
    return torch.cat(parts, dim=2), state


@pytest.mark.parametrize("cuts", [[], [9, 10, 30], list(range(1, T))], ids=["whole", "cut", "token by token"])
@pytest.mark.parametrize("settings", [{}, {"window_share": 0.3, "gate_divisor": 2.5}], ids=["published", "other"])
def test_it_is_the_equation_in_every_document(cuts: list[int], settings: dict[str, float]) -> None:
    arguments = inputs()
    y, _ = run(build(**settings), arguments, POSITIONS, cuts)
    expected = naive(arguments, POSITIONS, settings.get("window_share", 0.5), settings.get("gate_divisor", 16.0))
    live = (POSITIONS >= 0)[:, None, :, None]
    torch.testing.assert_close(y * live, expected, rtol=0, atol=1e-11)
    assert torch.isfinite(y).all()


def test_the_defaults_are_the_published_ones() -> None:
    assert GlaConfig().model_dump() == {
        "name": "gla", "window": 64, "window_shape": "sliding", "window_share": 0.5, "gate_divisor": 16.0,
    }  # fmt: skip


def test_the_branches_add_up_and_leave_the_same_state() -> None:
    arguments, mixer = inputs(), build(window_share=0.3)
    both, end = run(mixer, arguments, POSITIONS, [20])
    window, after_window = run(mixer, arguments, POSITIONS, [20], branch="window")
    linear, after_linear = run(mixer, arguments, POSITIONS, [20], branch="linear")
    torch.testing.assert_close(window + linear, both, rtol=0, atol=1e-12)
    live = (POSITIONS >= 0)[:, None, :, None]
    assert all(((both - part) * live).abs().max() > 0.1 for part in (window, linear))
    for after in (after_window, after_linear):
        assert torch.equal(after.memory_BGDV, end.memory_BGDV)


def test_the_linear_term_remembers_beyond_the_window_and_the_gate_forgets() -> None:
    """A change of the first token reaches the last when the keys are large, and is gone when they are very negative."""
    arguments = inputs()
    changed = [x.clone() for x in arguments]
    changed[2][:, :, 0] += 5
    reached = {}
    for name, level in (("kept", 40.0), ("forgotten", -160.0)):
        outputs = []
        for q, k, v, keys in (arguments, changed):
            outputs.append(
                build()(q, k, v, torch.full_like(keys, level), scaling=SCALING, layout=Layout())[0][:, :, -1]
            )
        reached[name] = (outputs[0] - outputs[1]).abs().max()
    assert reached["kept"] > 1e-2 and reached["forgotten"] < 1e-12


def test_the_state_is_kept_once_per_key_value_head() -> None:
    arguments, mixer = inputs(), build()
    _, end = mixer(*arguments, scaling=SCALING, layout=Layout())
    assert end.memory_BGDV.shape == (B, G, D, V)
    assert end.num_bytes == B * mixer.cost(8).state_bytes
    doubled = end.map_batch(lambda x: torch.cat([x, x]))
    assert doubled.num_bytes == 2 * end.num_bytes


def test_advance_gives_the_state_of_forward() -> None:
    arguments, mixer = inputs(), build()
    _, end = mixer(*arguments, scaling=SCALING, layout=Layout())
    _, middle = mixer(*(x[:, :, :8] for x in arguments), scaling=SCALING, layout=Layout())
    after = mixer.advance(*(x[:, :, 8:] for x in arguments[1:]), layout=Layout(8), state=middle)
    torch.testing.assert_close(after.memory_BGDV, end.memory_BGDV, rtol=0, atol=1e-12)
    torch.testing.assert_close(after.window.k_BGRD, end.window.k_BGRD, rtol=0, atol=0)
    assert mixer(*arguments, scaling=SCALING, layout=Layout(), need_state=False)[1] is None


def test_half_precision_comes_back_and_gradients_reach_all_inputs() -> None:
    arguments = [x.bfloat16().requires_grad_() for x in inputs()]
    y, state = build()(*arguments, scaling=SCALING, layout=Layout())
    assert y.dtype == torch.bfloat16 and state.memory_BGDV.dtype == torch.float32
    expected = build()(*(x.detach().double() for x in arguments), scaling=SCALING, layout=Layout())[0]
    torch.testing.assert_close(y.double(), expected, rtol=3e-2, atol=3e-2)
    gradients = torch.autograd.grad(y.float().square().sum(), arguments)
    assert all(bool(torch.isfinite(g).all()) and bool(g.abs().max() > 0) for g in gradients)

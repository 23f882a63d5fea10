"""Static steps of window mixers by the kernel: one launch a layer, ring and sum in memory that never moves, also inside
`torch.compile(fullgraph=True)`. Values in Triton's interpreter, in a process of its own: `triton_static_cases.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_triton_multi_step import case, needs_triton, run

from linearize.ops.layout import Layout
from linearize.ops.window_linear import WindowLinear, WindowLinearState, window_linear
from linearize.ops.window_linear.state import WindowBuffers

pytestmark = pytest.mark.slow  # the cases run in Triton's interpreter

LAYERS = 2


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, float]]:
    return json.loads(run(str(Path(__file__).parent / "support" / "triton_static_cases.py"), interpret=True))


@needs_triton
@pytest.mark.parametrize("name", ["decoding", "chunks", "verifying", "undecided", "aot_eager, 1", "eager, 2"])
def test_one_launch_a_layer_in_memory_that_stays(name: str, results: dict) -> None:
    """And the logits and states of the backend in PyTorch."""
    numbers = case(results, name)
    assert numbers["logits"] < 2e-5 and numbers["memory"] < 2e-5 and numbers["moved"] == 0, numbers
    assert numbers["fewest"] == numbers["most"] == LAYERS, numbers


@needs_triton
@pytest.mark.parametrize("name", ["aot_eager, 1", "eager, 2"])
def test_a_traced_step_is_one_graph_with_the_kernel_in_it(name: str, results: dict) -> None:
    numbers = case(results, name)
    assert numbers["graphs"] == 1 and numbers["operators"] == LAYERS, numbers


@needs_triton
def test_nothing_else_runs_for_a_layer(results: dict) -> None:
    """No copy, no cast, no factor computed before: outputs are new memory, all else is in the launch."""
    numbers = case(results, "launched")
    assert numbers["launches"] == 2 * LAYERS and numbers["others"] == [], numbers
    assert any("empty" in name for name in numbers["views"]), numbers


@pytest.mark.parametrize("shape", ["terraced", "sliding"])
def test_wider_rings_hold_the_same_tokens(shape: str) -> None:
    spec = WindowLinear(window=3, shape=shape, scaling=0.5)
    q, k, v = (torch.randn(2, heads, 9, 5, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    _, state = window_linear(q, k, v, spec=spec, layout=Layout())
    assert isinstance(state, WindowLinearState)
    buffers = WindowBuffers.of(state, spec, most=2)
    wider = WindowBuffers.of(state, spec, most=2).widened(3)  # it shares what is no ring
    assert wider.k_BGCD.shape[2] == buffers.k_BGCD.shape[2] + 3
    static = Layout(position_BT=torch.tensor([[9, -1, 10, 11], [9, 10, 11, 12]]), tail=2)
    more = [torch.randn(2, heads, 4, 5, generator=torch.Generator().manual_seed(7 + heads)) for heads in (4, 2, 2)]
    before = buffers.k_BGCD.clone()
    ys = [
        window_linear(more[0][:, :, 2:], *more[1:], spec=spec, layout=static, state=held, commit=2)[0]
        for held in (buffers, wider)
    ]
    torch.testing.assert_close(ys[1], ys[0])
    assert not torch.equal(before, buffers.k_BGCD)
    torch.testing.assert_close(wider.state(spec).k_BGRD, buffers.state(spec).k_BGRD)

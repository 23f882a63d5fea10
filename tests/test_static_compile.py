"""Static steps under `torch.compile(fullgraph=True)`: one graph for each width, whatever rows keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import mixer, student_of, text, tiny
from static_cases import prompts
from torch import Tensor

from linearize.modeling.static.step import StaticStep

ROWS = 3
PLANS = [("softmax", "lolcats", "mamba2"), ("gla", "mamba", "gated_delta_net"), ("retention", "sliding_window")]


@pytest.mark.slow
@pytest.mark.parametrize("names", PLANS)
def test_one_graph_whatever_is_kept(names: tuple[str, ...]) -> None:
    """`fullgraph=True` fails at any break, and a step that was compiled once is not compiled again."""
    plan = [None if name == "softmax" else mixer(name) for name in names]
    model = student_of(tiny("llama", attention="sdpa", num_hidden_layers=len(plan)), plan)
    (ids, mask), graphs = prompts(), []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    plain, compiled = (StaticStep(model, batch=ROWS, width=4, capacity=60) for _ in range(2))
    compiled.compile(backend=backend)
    for step in (plain, compiled):
        step.prefill(ids, mask)
    kept = [0, 0, 0]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(6):
            tokens = text(ROWS, 4, seed=seed)
            torch.testing.assert_close(compiled.step(tokens, kept), plain.step(tokens, kept), rtol=1e-4, atol=1e-4)
            kept = [(seed + 1) % 5, 2 * seed % 5, 4 - seed % 5]
    assert len(graphs) == 1
    torch._dynamo.reset()


@pytest.mark.slow
def test_one_token_compiles_through_aot_autograd() -> None:
    """Plain decoding, with what is written in place made explicit as compilers for a GPU want it."""
    model = student_of(tiny("llama", attention="sdpa", num_hidden_layers=1), [mixer("lolcats")])
    (ids, mask) = prompts()
    torch._dynamo.reset()
    plain, compiled = (StaticStep(model, batch=ROWS, capacity=60, rollback=False) for _ in range(2))
    compiled.compile(backend="aot_eager")
    for step in (plain, compiled):
        step.prefill(ids, mask)
    for seed in range(6):
        token = text(ROWS, 1, seed=seed)
        torch.testing.assert_close(compiled.step(token), plain.step(token), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()

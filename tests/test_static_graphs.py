"""Static steps can be recorded: nothing is read from the device or brought to it, whatever the mixer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from models import text
from static_cases import VARIANTS, hybrid
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from linearize.modeling.static.layers import attending_static, softmax_configs
from linearize.modeling.static.step import StaticStep
from linearize.ops.layout import Layout

ROWS = 3


class OnlyMeta(TorchDispatchMode):
    """Refuses operations that touch memory anywhere else: whatever comes from the host, or goes there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            if isinstance(x, Tensor) and x.device.type != "meta":
                raise AssertionError(f"{func} touches memory of the {x.device}")
        return out


def on_meta(step: StaticStep, model: Any) -> Any:
    """The step with all memory on the device that has no memory; the model there."""
    step.start_B, step.held_1, step.kept_B = (x.to("meta") for x in (step.start_B, step.held_1, step.kept_B))
    for layer in step.cache.layers:
        if layer.keys is not None:
            layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")
        else:
            layer.state = layer.state.map_batch(lambda x: x.to("meta"))
            layer.raw = tuple(x.to("meta") for x in layer.raw)
    return copy.deepcopy(model).to("meta")


def run_on_meta(step: StaticStep, model: Any) -> Iterator[tuple[int, ...]]:
    """Every kind of step with values that nobody can look at; gives the shapes of the logits."""
    ghost = on_meta(step, model)
    with torch.no_grad(), attending_static(softmax_configs(ghost)), OnlyMeta():
        for tokens in (1, 3):
            for commit in (True, False)[: 1 + step.rollback]:
                ids = torch.zeros(ROWS, tokens, dtype=torch.long, device="meta")
                yield tuple(step.forward(ghost, ids, step.kept_B, commit).shape)


@pytest.mark.parametrize("name", VARIANTS)
def test_no_value_decides_anything(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without memory have no values: to look at one, or to bring one from the host, raises."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it knows no such device
    model = hybrid(name)
    for rollback in (True, False):
        step = StaticStep(model, batch=ROWS, width=5, capacity=40, rollback=rollback)
        step.prefill(text(ROWS, 9))
        shapes = list(run_on_meta(step, model))
        assert shapes == [(ROWS, tokens, 61) for tokens in (1, 3) for _ in range(1 + rollback)]


def test_a_look_at_a_value_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a mixer to ask whether all tokens are alive, the test above would fail; and a constant of the host would."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    model = hybrid("mamba2")
    step = StaticStep(model, batch=ROWS, width=5, capacity=40)
    step.prefill(text(ROWS, 9))
    step.step(text(ROWS, 2))
    with monkeypatch.context() as patch:
        patch.setattr(Layout, "live", lambda self: None if bool((self.position_BT >= 0).all()) else self.position_BT)
        with pytest.raises(RuntimeError, match="meta tensors"):
            list(run_on_meta(step, model))
    with OnlyMeta(), pytest.raises(AssertionError, match="memory of the cpu"):
        torch.zeros(2, device="meta") + torch.ones(2).to("meta")

"""Packed projections give what the plain ones give, where they are used at all, and leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from linearize.modeling import packed
from linearize.modeling.packed import packed_projections


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(packed, "SMALLEST", 100)
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 37), nn.Tanh(), nn.Linear(37, 11, bias=False), nn.Linear(11, 3))


@pytest.mark.parametrize("tokens", [1, 2, 9, 64, 65])
def test_values_are_the_same(model: nn.Module, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, used = torch.randn(1, tokens, 13), []
    op = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *given: used.append(given) or op(*given))
    expected = model(x).detach()
    with packed_projections(model, 9) as count, torch.inference_mode():
        assert count == 2, "the smallest weight stays as it is"
        torch.testing.assert_close(model(x), expected)
    assert len(used) == (2 if 1 < tokens < 65 else 0)
    with torch.inference_mode():
        model(x)
    assert len(used) == (2 if 1 < tokens < 65 else 0) and all("forward" not in vars(m) for m in model.modules())


def test_gradients_go_through_the_plain_weights(model: nn.Module) -> None:
    x = torch.randn(2, 5, 13)
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    with packed_projections(model, 9):
        found = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_cannot_be_packed_is_left_alone(model: nn.Module) -> None:
    with packed_projections(model.double(), 9) as count:
        assert count == 0

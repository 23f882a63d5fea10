"""Packed projections equal plain ones, store no weight twice, and leave nothing behind."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from models import mixer, student_of, text, tiny
from torch import nn

from linearize.errors import InputError
from linearize.modeling import prepacked_linear as packed
from linearize.modeling.prepacked_linear import can_pack, packed_projections, transposed_projections


@pytest.fixture(autouse=True)
def _pack_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "SMALLEST", 100)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 37), nn.Tanh(), nn.Linear(37, 11, bias=False), nn.Linear(11, 3))


@pytest.mark.parametrize("tokens", [1, 2, 9, 64, 65])
def test_values_are_the_same(model: nn.Module, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, used = torch.randn(1, tokens, 13), []
    op = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *args: used.append(args) or op(*args))
    expected = model(x).detach()
    with packed_projections(model) as count, torch.inference_mode():
        assert count == 2, "the smallest weight stays as it is"
        torch.testing.assert_close(model(x), expected)
    assert len(used) == 2
    assert torch.equal(model(x), expected), "the weights are not the same bits again"
    assert len(used) == 2 and all("forward" not in vars(m) for m in model.modules())


def test_the_plain_weights_are_let_go_and_come_back(model: nn.Module) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model[2].weight.requires_grad_(False)
    gone, kept = weakref.ref(model[0].weight), model[2].weight
    with torch.inference_mode(), packed_projections(model):
        gc.collect()
        assert gone() is None, "the weight is held twice"
        assert model[0].weight.is_meta and model[0].weight.shape == (37, 13)
        assert torch.equal(kept, before["2.weight"]), "somebody else's weight was touched"
    assert model[2].weight is kept and not kept.requires_grad
    assert model[0].weight.requires_grad and not model[0].weight.is_inference()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model(torch.randn(5, 13)).sum().backward()
    assert model[0].weight.grad is not None


def test_weights_come_back_after_an_error(model: nn.Module) -> None:
    expected = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match="on purpose"), packed_projections(model):
        raise RuntimeError("on purpose")
    assert torch.equal(model[0].weight, expected) and "forward" not in vars(model[0])


def test_gradients_are_refused(model: nn.Module) -> None:
    with packed_projections(model), pytest.raises(InputError, match="packed for decoding"):
        model(torch.randn(2, 5, 13))


def test_weights_in_common_are_packed_once_and_stay_in_common(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    other[0].weight.data = model[0].weight.data
    alone, made = other[2].weight.data_ptr(), []
    op = torch.ops.mkldnn._reorder_linear_weight
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda *args: made.append(args) or op(*args))
        with packed_projections(model, other) as count:
            assert count == 4 and len(made) == 3
    assert other[0].weight.data_ptr() == model[0].weight.data_ptr()
    assert other[0].weight is not model[0].weight
    assert other[2].weight.data_ptr() != model[2].weight.data_ptr() and alone


@pytest.mark.parametrize("tokens", [1, 3, 9, 10])
def test_a_weight_with_another_use_stays(tokens: int) -> None:
    torch.manual_seed(1)
    embedding, head, bias = nn.Embedding(37, 13), nn.Linear(13, 37, bias=False), nn.Linear(13, 37)
    head.weight = embedding.weight
    bias.weight = embedding.weight
    model = nn.ModuleList([embedding, head, bias])
    x = torch.randn(1, tokens, 13)
    expected = [layer(x).detach() for layer in (head, bias)]
    with packed_projections(model) as count, torch.no_grad():
        assert count == 0 and head.weight is embedding.weight
        for layer, y in zip((head, bias), expected, strict=True):
            torch.testing.assert_close(layer(x), y)
    assert "forward" not in vars(head)


def test_what_cannot_be_packed_is_left_alone(model: nn.Module) -> None:
    assert can_pack(model)
    assert not can_pack(model.double())
    with packed_projections(model) as count:
        assert count == 0


@pytest.mark.parametrize("tokens", [1, 2, 5, 6])
def test_turned_products_are_the_same_and_may_be_differentiated(model: nn.Module, tokens: int) -> None:
    x = torch.randn(1, tokens, 13)
    expected = model(x)
    expected.sum().backward()
    gradient, model[0].weight.grad = model[0].weight.grad, None
    with transposed_projections(model) as count:
        assert count == 2 and not model[0].weight.is_meta
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected)
        model(x).sum().backward()
    assert torch.equal(model[0].weight.grad, gradient) and "forward" not in vars(model[0])


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("name", ["gla", "mamba", "lolcats"])
def test_students_give_the_same_logits(family: str, name: str) -> None:
    student: Any = student_of(tiny(family), [None, mixer(name), mixer(name)])
    ids = text(2, 9)
    with torch.no_grad():
        expected = student(ids).logits
        with packed_projections(student) as count:
            torch.testing.assert_close(student(ids).logits, expected, rtol=1e-4, atol=1e-5)
            assert count > 5
        assert torch.equal(student(ids).logits, expected)


def test_a_head_that_is_the_embedding_too_is_packed_where_it_may_be_held_twice() -> None:
    """And hidden states still become logits by the family's own way, as vLLM asks for them."""
    from linearize.training.stages.chunked_logits import SplitModel

    student = student_of(tiny("llama", attention="sdpa", tie_word_embeddings=True), [mixer("lolcats"), None, None])
    head, ids = student.lm.lm_head, torch.arange(7)[None]
    with torch.no_grad():
        expected = student(ids, use_cache=False).logits
        with packed.packed_projections(student) as fewer:
            assert not head.weight.is_meta
        with packed.packed_projections(student, twice=True) as count:
            assert head.weight.is_meta and count == fewer + 1
            split = SplitModel(student)
            assert split.decoder is not None
            hidden = split.hidden({"input_ids": ids, "position_ids": ids})
            torch.testing.assert_close(split.logits(hidden[0]), expected[0], rtol=1e-5, atol=1e-5)
    assert head.weight is student.get_input_embeddings().weight

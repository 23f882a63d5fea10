"""Speculation with weights in blocks: the same text, the weights as they were, packed only once it pays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import left_padded, text
from speculation_cases import both_ways, near, plain, target

from linearize.decoding import LookupDrafter, share_equal_weights, speculate
from linearize.decoding.speculative import weight_layout
from linearize.decoding.speculative.weight_layout import WeightLayout
from linearize.errors import InputError
from linearize.modeling import prepacked_linear as packed

WORTH = 12


@pytest.fixture(autouse=True)
def _pack_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "SMALLEST", 100)
    monkeypatch.setattr(weight_layout, "MIN_TOKENS", WORTH)


def packs(model: Any) -> list[bool]:
    """Whether weights are in blocks, at every pass of a model from now on."""
    seen: list[bool] = []
    linear = next(m for m in model.modules() if type(m) is torch.nn.Linear)
    linear.register_forward_pre_hook(lambda module, _: seen.append(module.weight.is_meta))
    return seen


@pytest.mark.parametrize("name", ["lolcats", "gla", "mamba2", "softmax"])
def test_the_text_is_the_same(name: str) -> None:
    model, (ids, mask) = target(name), left_padded(text(2, 13), [13, 6])
    draft = near(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = [plain(model, ids[i : i + 1, 13 - n :], 15) for i, n in enumerate([13, 6])]
    for pack in (True, False, "auto"):
        result = speculate(model, draft, ids, mask, max_new_tokens=15, draft_tokens=3, pack=pack)
        assert result.tokens == expected
        both_ways(result.stats)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any("forward" in vars(module) for one in (model, draft) for module in one.modules())


def test_it_packs_where_it_pays() -> None:
    model, ids = target("lolcats"), text(1, 9)
    draft = near(model)
    seen, its = packs(model), packs(draft)
    speculate(model, draft, ids, max_new_tokens=WORTH - 1, draft_tokens=3)
    assert not any(seen) and not any(its), "for a few tokens"
    speculate(model, draft, ids, max_new_tokens=WORTH - 1, draft_tokens=3, pack=True)
    assert any(seen) and any(its)
    seen.clear()
    result = speculate(model, draft, ids, max_new_tokens=WORTH + 5, draft_tokens=3)
    assert not seen[0] and all(seen[1:]), "the prompt is read as ever, all else in blocks"
    assert result.tokens == [plain(model, ids, WORTH + 5)]


def test_packing_waits_until_speculation_pays() -> None:
    model = target("lolcats")
    linear = next(m for m in model.modules() if type(m) is torch.nn.Linear)
    with WeightLayout([model], "auto") as layout:
        assert not linear.weight.is_meta and "forward" in vars(linear), "turned meanwhile"
        layout.consider(pays=False, tokens_left=WORTH)
        layout.consider(pays=True, tokens_left=WORTH - 1)
        assert not linear.weight.is_meta
        layout.consider(pays=True, tokens_left=WORTH)
        assert linear.weight.is_meta
        layout.consider(pays=False, tokens_left=1)
        assert linear.weight.is_meta
    assert not linear.weight.is_meta and "forward" not in vars(linear)
    with WeightLayout([model], False) as layout:
        layout.consider(pays=True, tokens_left=WORTH)
        assert "forward" not in vars(linear)


def test_weights_in_common_stay_in_common() -> None:
    model, ids = target("softmax"), text(1, 9)
    draft = near(model, 0)
    share_equal_weights(draft, model)
    result = speculate(model, draft, ids, max_new_tokens=9, draft_tokens=2, pack=True)
    assert result.tokens == [plain(model, ids, 9)]
    pairs = zip(model.parameters(), draft.parameters(), strict=True)
    assert all(one.data_ptr() == two.data_ptr() for one, two in pairs)


@pytest.mark.parametrize("pack", ["yes", 1, None])
def test_bad_values(pack: Any) -> None:
    with pytest.raises(InputError, match="pack is"):
        speculate(target("softmax"), LookupDrafter(), text(1, 9), max_new_tokens=3, pack=pack)

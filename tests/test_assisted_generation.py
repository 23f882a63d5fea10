"""transformers' own assisted decoding and prompt lookup give the text of plain decoding, for mixers and hybrids."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import pytest
import torch
from models import VOCABULARY, mixer, student_of, text, tiny
from torch import Tensor

from linearize.mixers import MIXERS
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.cache import MixerCacheLayer

NEW = 24
KINDS = {"all": [0, 1, 2], "hybrid": [0, 2], "hybrid_last": [1]}
every_mixer = pytest.mark.parametrize("name", sorted(MIXERS))
FEW = {"suppress_tokens": [*range(3), *range(6, VOCABULARY)]}  # three are left: some draft tokens are accepted


@lru_cache
def student(name: str, kind: str) -> LinearizedForCausalLM:
    """A mixer in some of three layers; no token ends the text."""
    plan = [mixer(name) if layer in KINDS[kind] else None for layer in range(3)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = student_of(tiny("llama", attention="sdpa"), plan)
    model.generation_config.eos_token_id = None
    return model


@lru_cache
def draft(name: str, kind: str, drafted: int) -> LinearizedForCausalLM:
    """The same student with its last projection disturbed: right at times, and it rolls back itself."""
    model = copy.deepcopy(student(name, kind))
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        weight.add_(0.7 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(drafted)))
    model.generation_config.update(
        assistant_confidence_threshold=0.0, num_assistant_tokens=drafted, num_assistant_tokens_schedule="constant"
    )
    return model


class Verified:
    """Counts the target's tokens: how many were run, and how many of them were dropped again."""

    def __init__(self, model: LinearizedForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run = self.dropped = self.calls = 0
        target = next(iter(model.mixers().values()))
        step, crop = MixerCacheLayer.step, MixerCacheLayer.crop
        mine: list[MixerCacheLayer] = []

        def counted_step(layer: MixerCacheLayer, its: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            if its is target:
                mine[:] = [layer]
                self.run += inputs[0].shape[its.time_dim]
                self.calls += 1
            return step(layer, its, inputs, *args, **kwargs)

        def counted_crop(layer: MixerCacheLayer, remove: int) -> None:
            self.dropped -= remove if mine and layer is mine[0] else 0
            crop(layer, remove)

        monkeypatch.setattr(MixerCacheLayer, "step", counted_step)
        monkeypatch.setattr(MixerCacheLayer, "crop", counted_crop)

    def check(self, prompt: int) -> None:
        """Tokens were accepted (fewer passes than tokens) and rejected."""
        assert self.calls < NEW, "nothing was accepted"
        assert self.dropped > 0, "nothing was rejected"
        assert prompt + NEW - 1 <= self.run - self.dropped <= prompt + NEW


def generate(model: LinearizedForCausalLM, ids: Tensor, **settings: Any) -> Tensor:
    return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False, **FEW, **settings})[:, ids.shape[1] :]


@every_mixer
@pytest.mark.parametrize(("kind", "drafted"), [("all", 9), ("hybrid", 4)])
def test_an_assistant_changes_nothing(name: str, kind: str, drafted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = student(name, kind), text(1, 11)
    expected = generate(model, ids)
    counted = Verified(model, monkeypatch)
    assert torch.equal(generate(model, ids, assistant_model=draft(name, kind, drafted)), expected)
    counted.check(11)


@every_mixer
@pytest.mark.parametrize("kind", ["all", "hybrid_last"])
def test_prompt_lookup_changes_nothing(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = student(name, kind), text(1, 26) % 3 + 3
    expected = generate(model, ids)
    counted = Verified(model, monkeypatch)
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=9, max_matching_ngram_size=2), expected)
    counted.check(26)


@every_mixer
def test_sampling_with_an_assistant_follows_the_seed(name: str) -> None:
    model, ids = student(name, "hybrid"), text(1, 11)

    def sample(seed: int, **settings: Any) -> Tensor:
        torch.manual_seed(seed)
        return generate(model, ids, do_sample=True, **settings)

    for settings in ({"assistant_model": draft(name, "hybrid", 4)}, {"prompt_lookup_num_tokens": 3}):
        first = sample(1, **settings)
        assert first.shape == (1, NEW) and bool(((first >= 3) & (first < 6)).all())
        assert torch.equal(sample(1, **settings), first) and not torch.equal(sample(2, **settings), first)


def test_kept_sliding_softmax_layers_roll_back_too() -> None:
    """One row at a time: transformers' own layers hold draft tokens back."""
    model = student_of(tiny("gemma2"), [None, mixer("mamba2"), None])
    model.generation_config.eos_token_id = None
    ids = text(1, 26) % 3 + 3
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=5), generate(model, ids))

"""transformers' own `generate` on students: every way of decoding gives what full forward passes give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import VOCABULARY, left_padded, mixer, student_of, text, tiny
from torch import Tensor
from transformers import DynamicCache

from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.cache import MixerCacheLayer

NEW = 13
PLANS: dict[str, list[Any]] = {
    "all": [mixer(), mixer(window=0, feature_map="elu"), mixer("sliding_window", num_sinks=2)],
    "hybrid": [None, mixer(shift="shared"), None],
    "hybrid_first": [mixer(window_shape="sliding", num_sinks=1), None, mixer(window=3)],
}
every_plan = pytest.mark.parametrize("plan", PLANS)


@pytest.fixture(scope="module")
def students() -> dict[str, LinearizedForCausalLM]:
    return {name: endless(student_of(tiny("llama", attention="sdpa"), plan)) for name, plan in PLANS.items()}


def endless(model: Any) -> Any:
    """No token ends the text."""
    model.generation_config.eos_token_id = None
    return model


def generate(model: LinearizedForCausalLM, ids: Tensor, **settings: Any) -> Tensor:
    """The new tokens only."""
    settings = {"max_new_tokens": NEW, "do_sample": False, **settings}
    return model.generate(ids, **settings)[:, ids.shape[1] :]


def greedy(model: LinearizedForCausalLM, ids: Tensor, count: int = NEW) -> Tensor:
    """The argmax of full forward passes, without any cache."""
    with torch.no_grad():
        for _ in range(count):
            following = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, following], dim=1)
    return ids[:, -count:]


@every_plan
@pytest.mark.parametrize("tokens", [1, 3, 23])
def test_greedy_is_the_argmax_of_full_passes(students: dict, plan: str, tokens: int) -> None:
    model, ids = students[plan], text(2, tokens)
    expected = greedy(model, ids)
    assert len(set(expected.flatten().tolist())) > 3, "one token over and over would hide a lost state"
    assert torch.equal(generate(model, ids), expected)


@every_plan
def test_left_padded_batches_equal_single_prompts(students: dict, plan: str) -> None:
    model, lengths = students[plan], [17, 4, 23]
    ids, mask = left_padded(text(3, 23), lengths)
    together = generate(model, ids, attention_mask=mask)
    alone = [generate(model, ids[i : i + 1, 23 - n :])[0] for i, n in enumerate(lengths)]
    assert torch.equal(together, torch.stack(alone))


@every_plan
def test_sampling_follows_the_seed_and_needs_no_cache(students: dict, plan: str) -> None:
    model, ids = students[plan], text(3, 9)

    def sample(seed: int, **settings: Any) -> Tensor:
        torch.manual_seed(seed)
        return generate(model, ids, do_sample=True, temperature=1.2, top_k=17, **settings)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert torch.equal(sample(1), sample(1, use_cache=False))


@every_plan
def test_beams_equal_beams_without_a_cache(students: dict, plan: str) -> None:
    model, (ids, mask) = students[plan], left_padded(text(2, 11), [11, 6])
    settings = {"num_beams": 4, "num_return_sequences": 3, "attention_mask": mask}
    with_cache = generate(model, ids, **settings)
    assert torch.equal(with_cache, generate(model, ids, use_cache=False, **settings))
    assert not torch.equal(with_cache[::3], generate(model, ids, attention_mask=mask)), "beams found nothing new"


def test_two_beams_by_hand(students: dict) -> None:
    model, ids = students["all"], text(1, 7)
    beams = [(0.0, ids)]
    for _ in range(4):
        grown = []
        for score, row in beams:
            with torch.no_grad():
                logits = model(row, use_cache=False).logits[0, -1].log_softmax(-1)
            best = logits.topk(2)
            grown += [
                (score + float(s), torch.cat([row, t.view(1, 1)], dim=1)) for s, t in zip(*best, strict=True)
            ]  # fmt: skip
        beams = sorted(grown, key=lambda beam: -beam[0])[:2]
    assert torch.equal(generate(model, ids, num_beams=2, max_new_tokens=4), beams[0][1][:, 7:])


@every_plan
@pytest.mark.parametrize("chunk", [1, 4, 9])
def test_chunked_prefill_changes_nothing(students: dict, plan: str, chunk: int) -> None:
    model, (ids, mask) = students[plan], left_padded(text(2, 23), [23, 10])
    expected = generate(model, ids, attention_mask=mask)
    assert torch.equal(generate(model, ids, attention_mask=mask, prefill_chunk_size=chunk), expected)


class Counted:
    """Counts how many guessed tokens were given and how many of them stayed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dropped = self.calls = 0
        original = MixerCacheLayer.crop

        def crop(layer: MixerCacheLayer, tokens_to_remove: int) -> None:
            self.calls += 1
            self.dropped -= tokens_to_remove
            original(layer, tokens_to_remove)

        monkeypatch.setattr(MixerCacheLayer, "crop", crop)


class Passes:
    """Counts the forward passes of a model."""

    def __init__(self, model: Any) -> None:
        self.count = 0
        self.hook = model.register_forward_pre_hook(self._pass)

    def _pass(self, *_: Any) -> None:
        self.count += 1


@every_plan
def test_prompt_lookup_changes_nothing(students: dict, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four tokens are allowed, so that some guesses from the prompt come true and some do not."""
    model, ids = students[plan], text(1, 26) % 4 + 3
    allowed = {"suppress_tokens": [*range(3), *range(7, VOCABULARY)], "max_new_tokens": 40}
    expected = generate(model, ids, **allowed)
    counted, passes = Counted(monkeypatch), Passes(model)
    actual = generate(model, ids, prompt_lookup_num_tokens=5, **allowed)
    passes.hook.remove()
    assert torch.equal(actual, expected)
    assert counted.dropped > 0, "nothing was rejected"
    assert passes.count < 40, "nothing was accepted"


@every_plan
@pytest.mark.parametrize("role", ["target", "draft", "twins"])
def test_assisted_decoding_changes_nothing(students: dict, plan: str, role: str, monkeypatch: Any) -> None:
    """Against a draft that is wrong at times, and against a twin that never is."""
    ids, student = text(1, 11), students[plan]
    other = endless(tiny("llama", attention="sdpa"))
    near = endless(student_of(other, mixer(window=23, feature_dim=3)))  # the teacher until the text is longer
    twin = endless(student_of(other, PLANS[plan]))
    target, draft = {"target": (student, near), "draft": (near, student), "twins": (student, twin)}[role]
    draft.generation_config.update(
        assistant_confidence_threshold=0.0, num_assistant_tokens=4, num_assistant_tokens_schedule="constant"
    )
    expected = greedy(target, ids, 20)
    counted, passes = Counted(monkeypatch), Passes(target)
    actual = generate(target, ids, assistant_model=draft, max_new_tokens=20)
    passes.hook.remove()
    assert torch.equal(actual, expected)
    assert counted.calls > 0
    assert (passes.count < 8) if role == "twins" else (counted.dropped > 0)


def test_the_cache_is_transformers_own_with_our_layers(students: dict) -> None:
    for plan, model in students.items():
        out = model.generate(text(1, 9), max_new_tokens=3, return_dict_in_generate=True)
        cache = out.past_key_values
        assert type(cache) is DynamicCache
        ours = [isinstance(layer, MixerCacheLayer) for layer in cache.layers]
        assert ours == [entry is not None for entry in PLANS[plan]]
        assert cache.get_seq_length() == 11


def test_a_cache_continues_in_a_second_call(students: dict) -> None:
    for model in students.values():
        ids = text(1, 9)
        first = model.generate(ids, max_new_tokens=6, return_dict_in_generate=True)
        longer = torch.cat([first.sequences, text(1, 5, seed=3)], dim=1)
        again = generate(model, longer, past_key_values=first.past_key_values)
        assert torch.equal(again, greedy(model, longer))


def test_the_cache_holds_the_same_bytes_at_64k_as_at_1k() -> None:
    teacher = tiny("llama", attention="sdpa", num_hidden_layers=2, hidden_size=12, intermediate_size=12, head_dim=2,
                   max_position_embeddings=2**16)  # fmt: skip
    model = student_of(teacher, [mixer(window=16, feature_dim=2), mixer("sliding_window", window=16, num_sinks=2)])
    cache, held, chunk = None, {}, 1024
    with torch.no_grad():
        for end in range(chunk, 2**16 + 1, chunk):
            ids = torch.randint(VOCABULARY, (1, chunk), generator=torch.Generator().manual_seed(end))
            cache = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
            held[end] = [layer.num_bytes for layer in cache.layers]
    assert cache.get_seq_length() == 2**16
    assert held[2**16] == held[1024] and all(held[1024])
    stated = [m.cost(4).state_bytes for m in model.mixers().values()]
    assert all(most <= bound for most, bound in zip(held[1024], stated, strict=True))


def test_generation_settings_of_the_student_are_its_own() -> None:
    teacher = tiny("llama")
    model = student_of(teacher, mixer())
    model.generation_config.temperature = 0.123
    assert teacher.generation_config.temperature != 0.123

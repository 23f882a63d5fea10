"""One row on a CPU is decoded in memory that is written in place: equal values, few calls, states that stay."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from support.models import mixer, student_of, text, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from linearize.errors import InputError
from linearize.mixers.lolcats import Lolcats
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.cache_argument import cache_of
from linearize.ops.layout import Layout
from linearize.ops.window_linear import WindowLinear, use_backend
from linearize.ops.window_linear.decoder import WindowDecoder

TOKENS, WINDOW = 61, 7
EQUAL = {"rtol": 0, "atol": 1e-5}  # norms round to fp32
MIXERS: dict[str, dict[str, Any]] = {
    "gain, shared shift": {"feature_map": "gain", "feature_dim": 9, "shift": "shared", "num_sinks": 1},
    "hedgehog, as published": {"feature_dim": 11},
    "gain, as published": {"feature_map": "gain", "feature_dim": 5, "num_sinks": 3},
    "affine": {"feature_dim": 9, "affine": True, "shift": "shared", "num_sinks": WINDOW},
    "affine, as published": {"feature_map": "gain", "feature_dim": 9, "affine": True, "num_sinks": 2},
    "store": {"feature_map": "gain", "feature_dim": 9, "shift": "shared", "num_sinks": 1, "store": 10},
    "store, as published": {"feature_dim": 11, "num_sinks": 3, "store": 4},
    "store of more than the text": {"feature_map": "gain", "feature_dim": 5, "shift": "shared", "store": 64},
    "window alone": {"name": "sliding_window", "window_shape": "terraced", "num_sinks": 2},
}


def student(settings: dict[str, Any], dtype: torch.dtype = torch.float64) -> LinearizedForCausalLM:
    """Two layers of the mixer, every weight random."""
    options = {"window": WINDOW, **settings}
    name = options.pop("name", "lolcats")
    return student_of(tiny(num_hidden_layers=2).to(dtype), mixer(name, **options))


@torch.no_grad()
def decode(model: LinearizedForCausalLM, ids: Tensor, cache: Any, start: int, end: int) -> tuple[Tensor, Any]:
    """Token by token; the logits `[B, T, V]`."""
    logits = []
    for t in range(start, end):
        out = model(ids[:, t : t + 1], cache=cache, use_cache=True)
        cache = cache_of(out)
        logits.append(out.logits)
    return torch.cat(logits, dim=1), cache


@torch.no_grad()
def prefilled(model: LinearizedForCausalLM, ids: Tensor, tokens: int) -> Any:
    return cache_of(model(ids[:, :tokens], use_cache=True))


def decoders(cache: Any) -> list[Any]:
    return [layer._decoder for layer in cache.layers]


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("start", [1, WINDOW - 1, 2 * WINDOW, 3 * WINDOW - 1, 31])
def test_decoded_tokens_have_the_logits_of_one_pass(kind: str, start: int) -> None:
    model, ids = student(MIXERS[kind]), text(1, TOKENS)
    with torch.no_grad():
        expected = model(ids).logits
    logits, cache = decode(model, ids, prefilled(model, ids, start), start, TOKENS)
    torch.testing.assert_close(logits, expected[:, start:], **EQUAL)
    assert all(isinstance(decoder, WindowDecoder) for decoder in decoders(cache))
    assert cache.get_seq_length() == TOKENS


@torch.no_grad()
@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("start", [8, 2 * WINDOW, 33])
def test_outputs_and_state_are_those_of_the_reference(kind: str, start: int) -> None:
    mixer_, generator = student(MIXERS[kind]).mixers()[1], torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, n, TOKENS, 10, generator=generator, dtype=torch.float64) for n in (6, 3, 3))
    options = {"scaling": 0.4}
    with use_backend("reference"):
        y, expected = mixer_(q, k, v, layout=Layout(), **options)
    _, state = mixer_(*(x[:, :, :start] for x in (q, k, v)), layout=Layout(), **options)
    token = [x[:, :, start : start + 1] for x in (q, k)]
    decoder = mixer_.decoder(*token, layout=Layout(start), state=state, **options)
    outputs = [decoder.step(*(x[:, :, t : t + 1] for x in (q, k, v))) for t in range(start, TOKENS)]
    torch.testing.assert_close(torch.cat(outputs, 2), y[:, :, start:], rtol=0, atol=1e-12)
    after = decoder.state()
    assert after.next == expected.next == TOKENS and after.num_bytes == expected.num_bytes
    for name in ("k_BGRD", "v_BGRV", "memory_BHFV", "sink_k_BGND", "sink_v_BGNV", "store_k_BGPD", "store_v_BGPV"):
        torch.testing.assert_close(getattr(after, name), getattr(expected, name), rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MIXERS)
def test_numbers_of_16_bits_are_decoded_in_fp32(kind: str, dtype: torch.dtype) -> None:
    """Outputs are fp32's, rounded once; the state is that of other paths, keys and values to the bit."""
    mixer_, generator = student(MIXERS[kind], torch.float32).mixers()[1], torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, n, TOKENS, 10, generator=generator).to(dtype) for n in (6, 3, 3))
    options, start = {"scaling": 0.4}, 2 * WINDOW
    with use_backend("reference"):
        y = mixer_(*(x.float() for x in (q, k, v)), layout=Layout(), **options)[0][:, :, start:]
        expected = mixer_(q, k, v, layout=Layout(), **options)[1]
    _, state = mixer_(*(x[:, :, :start] for x in (q, k, v)), layout=Layout(), **options)
    token = [x[:, :, start : start + 1] for x in (q, k)]
    decoder = mixer_.decoder(*token, layout=Layout(start), state=state, **options)
    outputs = torch.cat([decoder.step(*(x[:, :, t : t + 1] for x in (q, k, v))) for t in range(start, TOKENS)], 2)
    assert outputs.dtype == dtype and decoder.k_GCD.dtype == torch.float32
    torch.testing.assert_close(outputs.float(), y.to(dtype).float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    after = decoder.state()
    for name in ("k_BGRD", "v_BGRV", "sink_k_BGND", "sink_v_BGNV", "store_k_BGPD", "store_v_BGPV"):
        one, other = getattr(after, name), getattr(expected, name)
        assert (one is None and other is None) or (one.dtype == dtype and torch.equal(one, other)), name
    torch.testing.assert_close(after.memory_BHFV, expected.memory_BHFV, rtol=1e-5, atol=1e-5)


def test_a_state_that_was_read_never_changes_and_decoding_goes_on_from_it() -> None:
    model, ids = student(MIXERS["gain, shared shift"]), text(1, TOKENS)
    with torch.no_grad():
        expected = model(ids).logits
    cache, states, logits = prefilled(model, ids, 9), [], []
    for end in range(13, TOKENS, 6):
        y, cache = decode(model, ids, cache, cache.get_seq_length(), end)
        logits.append(y)
        state = cache.layers[0].state
        assert state is cache.layers[0].state and decoders(cache)[0] is None
        states.append((state, [x.clone() for x in (state.k_BGRD, state.v_BGRV, state.memory_BHFV)]))
    torch.testing.assert_close(torch.cat(logits, 1), expected[:, 9 : 9 + sum(y.shape[1] for y in logits)], **EQUAL)
    for state, before in states:
        assert all(torch.equal(*x) for x in zip((state.k_BGRD, state.v_BGRV, state.memory_BHFV), before, strict=True))


def test_calls_of_several_tokens_and_drafts_may_come_between() -> None:
    model, ids = student(MIXERS["gain, shared shift"]), text(1, TOKENS)
    with torch.no_grad():
        expected = model(ids).logits
        _, cache = decode(model, ids, prefilled(model, ids, 5), 5, 20)
        cache = cache_of(model(ids[:, 20:26], cache=cache, use_cache=True))
        _, cache = decode(model, ids, cache, 26, 30)
        cache.activate_past_recording()
        model(ids[:, :4], cache=cache, use_cache=True)  # a draft, of which nothing stays
        cache.crop(-4)
        y = model(ids[:, 30:33], cache=cache, use_cache=True).logits
    torch.testing.assert_close(y, expected[:, 30:33], **EQUAL)


def test_copies_of_a_cache_go_on_by_themselves() -> None:
    model, ids, other = student(MIXERS["gain, shared shift"]), text(1, TOKENS), text(1, TOKENS, seed=8)
    _, cache = decode(model, ids, prefilled(model, ids, 8), 8, 31)
    copied = copy.deepcopy(cache)
    decode(model, other, copied, 31, 50)
    logits, _ = decode(model, ids, cache, 31, TOKENS)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(ids).logits[:, 31:], **EQUAL)


def test_copies_of_a_cache_share_the_mixers() -> None:
    model, ids = student(MIXERS["gain, shared shift"]), text(1, TOKENS)
    _, cache = decode(model, ids, prefilled(model, ids, 8), 8, 31)
    before = sum(isinstance(x, Lolcats) for x in gc.get_objects())
    copied = copy.deepcopy(cache)
    assert sum(isinstance(x, Lolcats) for x in gc.get_objects()) == before
    assert copied.get_seq_length() == 31


def test_a_backend_that_is_asked_for_within_a_text_takes_over() -> None:
    model, ids = student(MIXERS["gain, shared shift"]), text(1, TOKENS)
    _, cache = decode(model, ids, prefilled(model, ids, 8), 8, 31)
    assert decoders(cache)[1] is not None
    with use_backend("reference"):
        logits, cache = decode(model, ids, cache, 31, 40)
    assert decoders(cache)[1] is None
    with torch.no_grad():
        torch.testing.assert_close(logits, model(ids).logits[:, 31:40], **EQUAL)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("before", "after"), [(0, 10), (10, 0), (10, 4)])
def test_a_store_of_another_size_begins_with_a_new_cache(before: int, after: int, rows: int) -> None:
    model, ids = student(MIXERS["gain, shared shift"] | {"store": before}), text(rows, TOKENS)
    _, cache = decode(model, ids, prefilled(model, ids, 20), 20, 31)
    model.set_store(after)
    with pytest.raises(InputError, match="31 tokens"):
        decode(model, ids, cache, 31, 32)
    model.set_store(before)
    decode(model, ids, cache, 31, 32)
    model.keep_heads({1: [0]})
    with pytest.raises(InputError, match="32 tokens"):
        decode(model, ids, cache, 32, 33)
    decode(model, ids, prefilled(model, ids, 20), 20, 31)


def test_inference_mode_may_be_entered_and_left_within_a_text() -> None:
    model, ids = student(MIXERS["gain, shared shift"]), text(1, TOKENS)
    with torch.no_grad():
        expected = model(ids).logits
    with torch.inference_mode():
        first, cache = decode(model, ids, prefilled(model, ids, 6), 6, 20)
    second, cache = decode(model, ids, cache, 20, 42)
    with torch.inference_mode():
        third, cache = decode(model, ids, cache, 42, TOKENS)
        torch.testing.assert_close(torch.cat([first, second, third], 1), expected[:, 6:], **EQUAL)
    assert all(isinstance(decoder, WindowDecoder) for decoder in decoders(cache))


@pytest.mark.parametrize("kind", ["rows", "padding", "sliding", "map", "hook", "backend"])
def test_what_it_is_not_made_for_runs_as_before(kind: str) -> None:
    changes: dict[str, dict[str, Any]] = {
        "sliding": {"window_shape": "sliding"}, "map": {"feature_map": "t2r"},
    }  # fmt: skip
    model = student(MIXERS["gain, shared shift"] | changes.get(kind, {}))
    ids, seen = text(3 if kind == "rows" else 1, 40), []
    if kind == "hook":
        model.mixers()[1].register_forward_hook(lambda *_: seen.append(1))
    if kind == "backend":
        cache = prefilled(model, ids, 15)
        with use_backend("reference"):
            decode(model, ids, cache, 15, 40)
    elif kind == "padding":
        mask = torch.ones(1, 21, dtype=torch.long)
        mask[:, :3] = 0
        with torch.no_grad():
            cache = cache_of(model(ids[:, :20], attention_mask=mask[:, :20], use_cache=True))
            model(ids[:, 20:21], attention_mask=mask, cache=cache, use_cache=True)
    else:
        _, cache = decode(model, ids, prefilled(model, ids, 15), 15, 40)
    assert decoders(cache)[1] is None
    assert len(seen) == (26 if kind == "hook" else 0)


class Calls(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_calls_of_a_token_are_bounded_and_it_folds_only_full_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids, folds = student(MIXERS["gain, shared shift"]), text(1, TOKENS), []
    original = WindowLinear.features_k
    _, cache = decode(model, ids, prefilled(model, ids, 20), 20, 21)
    monkeypatch.setattr(WindowLinear, "features_k", lambda spec, k: folds.append(k.shape[2]) or original(spec, k))
    decoder = cache.layers[1]._decoder
    q = torch.randn(1, decoder.groups * decoder.copies, 1, decoder.k_GCD.shape[2], dtype=torch.float64)
    k, v = (torch.randn(1, decoder.groups, *q.shape[2:], dtype=torch.float64) for _ in range(2))
    counts = []
    for _ in range(3 * WINDOW):
        with Calls() as calls:
            decoder.step(q, k, v)
        counts.append(calls.count)
    assert folds == [WINDOW] * 3
    assert sorted(counts)[-4] <= 28 < counts[WINDOW - 1], "three tokens fold, the others do not"

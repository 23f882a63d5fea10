"""Pending tokens and new ones in one call: every mixer, every split, rows that accepted different numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import left_padded, student_of, text, tiny
from test_mixer_contract import (
    CONFIGS,
    FP32,
    HEADS,
    SCORES,
    build,
    cut,
    every_mixer,
    inputs,
    name,
    raw,
    same_state,
    student,
)
from torch import Tensor
from transformers import DynamicCache, StaticCache

from linearize.errors import InputError
from linearize.mixers import MIXERS, LayerMixer, Mixer, MixerConfig
from linearize.modeling import cache as cache_module
from linearize.modeling.ragged_cache import accept_rows, compact
from linearize.ops.layout import Layout
from linearize.ops.recurrent import decay_linear, gated_delta, selective_scan

PREFIX = 13
CASES = [(0, 0, 9), (4, 0, 5), (1, 0, 9), (6, 3, 1), (0, 3, 2), (37, 2, 7)]  # committed, undecided, new


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def call(mixer: Mixer, arguments: list[Tensor], new: int, *, commit: int | None, **options: Any) -> tuple[Tensor, Any]:
    """The mixer over raw inputs, with outputs of the last `new` tokens: tokens first."""
    options |= {"commit": commit, "need_state": commit != 0}
    if isinstance(mixer, LayerMixer):
        return mixer.mix(*mixer.project(*arguments), outputs=new, **options)
    query = arguments[0][:, :, arguments[0].shape[2] - new :]
    y, state = mixer(query, *raw(mixer, arguments), **SCORES, **options)
    return y.transpose(1, 2), state


@every_mixer
@pytest.mark.parametrize(("committed", "undecided", "new"), CASES, ids=str)
def test_one_call_is_replaying_and_then_running(config: MixerConfig, committed: int, undecided: int, new: int) -> None:
    built = build(config)
    tokens = PREFIX + committed + undecided + new
    arguments = inputs(built, tokens=tokens)
    prefix, rest = cut(built, arguments, 0, PREFIX), cut(built, arguments, PREFIX, tokens)
    start = built.advance(*raw(built, prefix), layout=Layout())
    y, state = call(built, rest, new, commit=committed, layout=Layout(PREFIX), state=start)
    whole, end = call(built, arguments, new, commit=None, layout=Layout())
    torch.testing.assert_close(y, whole, rtol=1e-9, atol=1e-9)
    if committed:
        accepted = cut(built, rest, 0, committed)
        same_state(state, built.advance(*raw(built, accepted), layout=Layout(PREFIX), state=start), 1e-9)
    all_new, after = call(built, rest, new, commit=None, layout=Layout(PREFIX), state=start)
    torch.testing.assert_close(all_new, y, rtol=1e-9, atol=1e-9)
    same_state(after, end, 1e-9)


@every_mixer
@pytest.mark.parametrize("counts", [[3, 6, 0], [1, 1, 5], [9, 2, 4], [39, 2, 17]], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_dead_tokens_were_never_there(config: MixerConfig, counts: list[int], padded: bool) -> None:
    """Ring, sums, taps and positions of each row, and its outputs afterwards, are those of the row by itself."""
    built, held, new, later = build(config), max(counts), 5, 8
    tokens = PREFIX + held + new + later
    arguments = inputs(built, rows=len(counts), tokens=tokens)
    pad = torch.tensor([4, 0, 2] if padded else [0, 0, 0])[:, None]
    prefix = (torch.arange(PREFIX) - pad).clamp(min=-1)
    begun = Layout(position_BT=prefix) if padded else Layout()
    drafted_layout = Layout(position_BT=torch.arange(PREFIX, PREFIX + held) - pad) if padded else Layout(PREFIX)
    tail = drafted_layout.keeping(counts, 0, held, torch.device("cpu"))
    after = [count + PREFIX for count in counts]
    position = torch.tensor(after)[:, None] - pad + torch.arange(new + later)
    joined = tail.then(Layout(position_BT=position[:, :new]), (held, new), len(counts), torch.device("cpu"))
    state = built.advance(*raw(built, cut(built, arguments, 0, PREFIX)), layout=begun)
    verified = cut(built, arguments, PREFIX, PREFIX + held + new)
    at_once, end = call(built, verified, new, commit=None, layout=joined, state=state)
    y, state = call(built, verified, new, commit=held, layout=joined, state=state)
    last, latest = cut(built, arguments, PREFIX + held + new, tokens), Layout(position_BT=position[:, new:])
    go_on, _ = call(built, last, later, commit=None, layout=latest, state=end)
    last = cut(built, arguments, PREFIX + held, tokens)
    more, _ = call(built, last, new + later, commit=None, layout=Layout(position_BT=position), state=state)
    for row, count in enumerate(counts):
        kept = [*range(int(pad[row]), PREFIX + count), *range(PREFIX + held, tokens)]
        alone = [x[row : row + 1].index_select(built.time_dim, torch.tensor(kept)) for x in arguments]
        expected, _ = call(built, alone, new + later, commit=None, layout=Layout())
        torch.testing.assert_close(y[row], expected[0, :new], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(at_once[row], expected[0, :new], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(more[row], expected[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(go_on[row], expected[0, new:], rtol=1e-9, atol=1e-9)
        if isinstance(built, LayerMixer):
            context = cut(built, alone, 0, PREFIX - int(pad[row]) + count)
            own = built.advance(*built.project(*context), layout=Layout())
            same_state(state.map_batch(lambda x, row=row: x[row : row + 1]), own, 1e-9)


@every_mixer
@pytest.mark.parametrize("kept", [False, True], ids=["all", "hybrid"])
def test_rows_of_a_student_keep_what_they_accept(config: MixerConfig, kept: bool) -> None:
    """Rounds of draft tokens of which each row keeps another number, against full passes over what each row kept."""
    if getattr(config, "store", 0):
        pytest.skip("a store's choice is discrete, in fp32 rounding makes it between equals: in fp64 above")
    model = student_of(tiny("llama", attention="sdpa"), [None, config, None]) if kept else student(config)
    rounds = [(9, [9, 0, 4]), (4, [4, 4, 4]), (6, [1, 5, 0]), (1, [1, 0, 1]), (7, [2, 7, 3])]
    (ids, mask), vocabulary = left_padded(text(3, 11), [11, 3, 8]), 61
    rows = [ids[row, mask[row].bool()].tolist() for row in range(3)]
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    cache.activate_past_recording()
    generator = torch.Generator().manual_seed(1)
    for step, (size, counts) in enumerate(rounds):
        new = torch.randint(3, vocabulary, (3, size), generator=generator)
        keys = torch.cat([mask, torch.ones(3, size, dtype=torch.long)], dim=1)
        logits = model(new, attention_mask=keys, past_key_values=cache).logits
        for row, count in enumerate(counts):
            seen = torch.tensor([rows[row] + new[row].tolist()])
            torch.testing.assert_close(logits[row], model(seen).logits[0, -size:], **FP32)
            rows[row] += new[row, :count].tolist()
        mask = torch.cat([mask, accept_rows(cache, counts, size)], dim=1)
        assert cache.get_seq_length() == mask.shape[1]
        if step in (0, 3):
            mask = compact(cache, mask)
            assert mask.shape[1] == max(map(len, rows)) == cache.get_seq_length()
    assert [int(x) for x in mask.sum(-1)] == [len(row) for row in rows]


@pytest.mark.parametrize("config", [c for c in CONFIGS if c not in HEADS], ids=name)
def test_memory_does_not_grow_with_the_draft_length(config: MixerConfig) -> None:
    """The state is one, whatever K is; beside it are the raw inputs of one verification and of what was accepted."""
    model, ids, held = student(config), text(1, 300), {}
    most = [mixer.cost(4).state_bytes for mixer in model.mixers().values()]
    for drafted in (4, 9):
        cache = model(ids[:, :100], use_cache=True).past_key_values
        cache.activate_past_recording()
        at = 100
        for _ in range(5):
            model(ids[:, at : at + drafted], past_key_values=cache)
            per_token = [layer.pending.num_bytes // drafted for layer in cache.layers]
            storage = [sum(x.untyped_storage().nbytes() for x in layer.pending.inputs) for layer in cache.layers]
            assert storage == [drafted * size for size in per_token], "more is kept alive than is counted"
            states = [layer.state.num_bytes for layer in cache.layers]
            assert all(0 < state <= bound for state, bound in zip(states, most, strict=True))
            cache.crop(-(drafted // 2))
            assert all(len(layer.pending) == layer.accepted == drafted - drafted // 2 for layer in cache.layers)
            at += drafted - drafted // 2
        for count in (3, 2):  # as a draft does: some calls before anything is decided
            model(ids[:, at : at + count], past_key_values=cache)
            at += count
        assert [len(layer.pending) for layer in cache.layers] == [layer.held for layer in cache.layers] == [5, 5]
        assert [sum(x.untyped_storage().nbytes() for x in layer.pending.inputs) for layer in cache.layers] == [
            5 * size for size in per_token
        ], "what was committed is kept alive"
        held[drafted] = per_token
    assert held[4] == held[9]


@every_mixer
def test_a_long_prompt_is_not_held_back(config: MixerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers starts to record before the prompt: all but its end goes into the state at once."""
    monkeypatch.setattr(cache_module, "HELD", 7)
    model, ids = student(config), text(2, 60)
    whole = model(ids).logits
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    first = model(ids[:, :41], past_key_values=cache).logits
    assert all(len(layer.pending) == layer.held == 7 for layer in cache.layers)
    cache.crop(-5)
    second = model(ids[:, 36:39], past_key_values=cache).logits
    cache.crop(0)
    assert all(len(layer.pending) == 3 for layer in cache.layers)
    third = model(ids[:, 39:], past_key_values=cache).logits
    for result, start, stop in ((first, 0, 41), (second, 36, 39), (third, 39, 60)):
        torch.testing.assert_close(result, whole[:, start:stop], **FP32)
    with pytest.raises(ValueError, match="cannot drop 8 tokens, 7 are held"):
        cache.crop(-8)


OPERATIONS = {
    "decay_linear": decay_linear,
    "gated_delta": gated_delta,
    "selective_scan": selective_scan,
}


def operands(operation: str, tokens: int, asked: int, *, per_key: bool) -> tuple[list[Tensor], Tensor, int]:
    """The operation's inputs with the queries of the last `asked` tokens, a state, and which dimension counts time."""
    torch.manual_seed(tokens)
    rows, heads, key, value = 3, 2, 5, 7
    rand = lambda *size: torch.randn(*size, dtype=torch.float64)  # noqa: E731
    if operation == "selective_scan":
        x, dt, A = rand(rows, tokens, 6), rand(rows, tokens, 6).exp(), -rand(6, 4).exp()
        B, C = rand(rows, tokens, 2, 4), rand(rows, tokens, 2, 4)
        return [x, dt, A, B, C[:, tokens - asked :]], rand(rows, 6, 4), 1
    q, k, v = rand(rows, heads, tokens, key), rand(rows, heads, tokens, key), rand(rows, heads, tokens, value)
    decay = -rand(rows, heads, tokens, *([key] if per_key else [])).exp()
    strength = [rand(rows, heads, tokens).sigmoid()] if operation == "gated_delta" else []
    if operation == "gated_delta":
        k = torch.nn.functional.normalize(k, dim=-1)
    return [q[:, :, tokens - asked :], k, v, decay, *strength], rand(rows, heads, key, value), 2


@pytest.mark.parametrize(
    ("operation", "per_key"), [*((name, False) for name in OPERATIONS), ("decay_linear", True)], ids=str
)
@pytest.mark.parametrize("with_state", [True, False], ids=["state", "no_state"])
@pytest.mark.parametrize(("tokens", "asked", "commit"), [(9, 9, None), (11, 4, 7), (11, 4, 0), (31, 3, 25), (2, 1, 1)])
def test_every_form_of_an_operation_equals_the_reference(
    operation: str, per_key: bool, with_state: bool, tokens: int, asked: int, commit: int | None
) -> None:
    """Documents, padding and dead tokens too."""
    module: Any = OPERATIONS[operation]
    run = getattr(module, operation)
    arguments, state, time_dim = operands(operation, tokens, asked, per_key=per_key)
    count = torch.arange(tokens)
    position = torch.stack([count + 3, (count - tokens // 2) % tokens, count + 5])
    position[2, 1 : 1 + tokens // 3] = -1
    position[2, 1 + tokens // 3 :] = 6 + count[: tokens - 1 - tokens // 3]
    for layout in (Layout(4), Layout(position_BT=position)):
        options = {"layout": layout, "state": state if with_state else None, "commit": commit}
        with module.use_backend("reference"):
            expected, end = run(*arguments, **options)
        for backend in ("multi_token", "chunked"):
            with module.use_backend(backend):
                y, after = run(*arguments, **options)
            live = layout.positions(tokens, y.device)[:, tokens - asked :] >= 0
            live = live[:, :, None] if time_dim == 1 else live[:, None, :, None]
            torch.testing.assert_close(y * live, expected * live, rtol=0, atol=1e-10)
            if commit != 0:
                torch.testing.assert_close(after, end, rtol=0, atol=1e-10)
            elif with_state:
                assert torch.equal(after, state)


def test_all_mixers_are_covered() -> None:
    assert {name(config).split("-")[0] for config in CONFIGS} == {*MIXERS, "heads"}


def test_counts_and_masks_that_do_not_fit_are_refused() -> None:
    teacher = tiny("gemma2")
    config = CONFIGS[0]
    local = student_of(teacher, [None, config, config])
    mixed = student_of(tiny("llama", attention="sdpa"), [config, None, config])

    def begun(model: Any) -> DynamicCache:
        cache = model(text(2, 7), use_cache=True).past_key_values
        cache.activate_past_recording()
        model(text(2, 4, seed=3), past_key_values=cache)
        return cache

    cache = begun(mixed)
    for counts, message in (([5, 1], "each from 0 to 4"), ([1], "4 were to be decided in 1 row"), ([], "one count")):
        with pytest.raises(InputError, match=message):
            accept_rows(cache, counts, 4)
    with pytest.raises(InputError, match="layer 0 holds 4 tokens back and 3"):
        accept_rows(cache, [1, 2], 3)
    with pytest.raises(InputError, match="call accept_rows first"):
        compact(cache, torch.ones(2, 11))
    assert cache.get_seq_length() == 11 and all(layer.get_seq_length() == 11 for layer in cache.layers)
    mask = torch.cat([torch.ones(2, 7, dtype=torch.long), accept_rows(cache, torch.tensor([1, 3]), 4)], dim=1)
    assert mask[:, 7:].tolist() == [[1, 0, 0], [1, 1, 1]]
    with pytest.raises(InputError, match=r"shape \[2, 9\], the cache 10 columns"):
        compact(cache, mask[:, :9])
    for wrong, message in ((None, "accept_rows"), (torch.ones(2, 12, dtype=torch.long), "do not follow the last")):
        with pytest.raises(InputError, match=message):
            mixed(text(2, 2), attention_mask=wrong, past_key_values=cache)
    holes = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 1, 1]] * 2)
    plain = mixed(text(2, 7), use_cache=True).past_key_values
    with pytest.raises(InputError, match="hides past tokens"):
        mixed(text(2, 3), attention_mask=holes, past_key_values=plain)
    cache = begun(local)
    with pytest.raises(InputError, match="layer 0 keeps softmax attention over a sliding window"):
        accept_rows(cache, [2, 3], 4)
    assert accept_rows(cache, [3, 3], 4).tolist() == [[1, 1, 1]] * 2, "all rows alike can be dropped there too"
    with pytest.raises(InputError, match=r"Static\w*Layer.* cannot roll back"):
        accept_rows(StaticCache(config=teacher.config, max_cache_len=9), [1], 1)

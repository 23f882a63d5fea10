"""What callers pass to a student: the cache under both names, packing, padding, checkpointing, direct calls."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import LAYERS, mixer, student_of, text, tiny
from torch import Tensor
from transformers import DynamicCache, StaticCache

from linearize.errors import InputError
from linearize.mixers import MIXERS
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.cache import MixerCacheLayer
from linearize.modeling.cache_argument import cache_argument, cache_of, with_cache

MIXER_NAMES = sorted(MIXERS)
every_mixer = pytest.mark.parametrize("name", MIXER_NAMES)
CLOSE = {"rtol": 0, "atol": 1e-8}  # of logits in fp64


def student(name: str, *, kept: bool = False) -> LinearizedForCausalLM:
    """A student of three layers with this mixer, in fp64; `kept`: the middle layer keeps its softmax."""
    plan = [MIXERS[name]()] * LAYERS if name not in ("lolcats", "sliding_window") else [mixer(name, window=5)] * LAYERS
    return student_of(
        tiny("llama", attention="sdpa"), [None if kept and i == 1 else entry for i, entry in enumerate(plan)]
    ).double()


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Texts of unequal lengths as one batch behind padding, and its mask."""
    longest = max(map(len, rows))
    ids, mask = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :], mask[i, longest - len(row) :] = row, 1
    return ids, mask


def full(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """Logits of one pass without a cache."""
    with torch.no_grad():
        return model(ids, use_cache=False, **inputs).logits


# The cache argument.


@every_mixer
@pytest.mark.parametrize("argument", ["cache", "past_key_values"])
def test_both_names_of_the_cache_give_the_full_pass(name: str, argument: str) -> None:
    model, ids = student(name, kept=True), text(2, 23)
    cache, parts = DynamicCache(config=model.config), []
    with torch.no_grad():
        for part in ids.split([9, 1, 1, 5, 7], dim=1):
            parts.append(model(part, use_cache=True, **{argument: cache}).logits)
    assert cache.get_seq_length() == 23
    torch.testing.assert_close(torch.cat(parts, 1), full(model, ids), **CLOSE)


def test_the_name_is_that_of_the_models_own_forward() -> None:
    class New(torch.nn.Module):
        def forward(self, input_ids: Tensor, cache: Any = None, **kwargs: Any) -> Any: ...

    class Old(torch.nn.Module):
        def forward(self, input_ids: Tensor, past_key_values: Any = None, **kwargs: Any) -> Any: ...

    assert cache_argument(New()) == "cache" and cache_argument(Old()) == "past_key_values"
    assert with_cache(Old(), None) == {"past_key_values": None}
    teacher = tiny("llama")
    cache = DynamicCache(config=teacher.config)
    with torch.no_grad():
        output = teacher(text(1, 7), use_cache=True, **with_cache(teacher, cache))
    assert cache_of(output) is cache and cache.get_seq_length() == 7


def test_two_different_caches_are_refused() -> None:
    model = student("lolcats")
    first, second = (DynamicCache(config=model.config) for _ in range(2))
    with pytest.raises(InputError):
        model(text(1, 3), cache=first, past_key_values=second)
    model(text(1, 3), cache=first, past_key_values=first)
    assert first.get_seq_length() == 3


@pytest.mark.parametrize("cached", [False, True])
def test_use_cache_of_the_config_decides(cached: bool) -> None:
    model = student("mamba2", kept=True)
    model.config.use_cache = cached
    with torch.no_grad():
        assert (cache_of(model(text(1, 5))) is not None) is cached
        assert (cache_of(model(text(1, 5), use_cache=not cached)) is not None) is not cached


# Caches of another make.


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("of", ["nothing", "teacher"])
def test_an_empty_cache_of_another_make_gets_the_students_layers(kept: bool, of: str) -> None:
    model, ids = student("gated_delta_net", kept=kept), text(2, 19)
    cache = DynamicCache() if of == "nothing" else DynamicCache(config=model.lm.config)
    with torch.no_grad():
        parts = [model(part, cache=cache, use_cache=True).logits for part in ids.split([7, 1, 11], dim=1)]
    assert [isinstance(layer, MixerCacheLayer) for layer in cache.layers] == [True, not kept, True]
    torch.testing.assert_close(torch.cat(parts, 1), full(model, ids), **CLOSE)


def test_a_cache_that_the_teacher_filled_is_refused() -> None:
    teacher = tiny("llama")
    model = student_of(teacher, [mixer()] * LAYERS)
    cache = DynamicCache(config=teacher.config)
    with torch.no_grad():
        teacher(text(1, 7), use_cache=True, **with_cache(teacher, cache))
    with pytest.raises(InputError, match="7 tokens"):
        model(text(1, 3), cache=cache)


@pytest.mark.parametrize("name", ["lolcats", "mamba", "gla"])
@pytest.mark.parametrize("kept", [False, True])
def test_a_static_cache_generates_the_same_tokens(name: str, kept: bool) -> None:
    model, ids = student(name, kept=kept), text(2, 9)
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, max_new_tokens=11, do_sample=False)
    assert len(set(expected[:, 9:].flatten().tolist())) > 3
    generated = model.generate(ids, max_new_tokens=11, do_sample=False, cache_implementation="static")
    assert torch.equal(generated, expected)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        parts = [model(part, cache=cache, use_cache=True).logits for part in ids.split([5, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), full(model, ids), **CLOSE)


# Arguments that nobody reads.


@pytest.mark.parametrize("argument", ["past", "memory", "attn_mask", "decoder_attention_mask", "positions", "labls"])
def test_an_unknown_keyword_is_refused_by_every_forward(argument: str) -> None:
    model = student("mamba2", kept=True)
    ids, unknown = text(1, 5), {argument: torch.ones(1, 5, dtype=torch.long)}
    for forward in (model, model.lm, model.base_model, model.model):
        with pytest.raises(InputError, match=argument):
            forward(ids, **unknown)


@pytest.mark.parametrize("name", ["mamba2", "lolcats"])
def test_a_converted_layer_refuses_a_tensor_that_it_would_not_read(name: str) -> None:
    model = student(name)
    layer = model.base_model.layers[1]

    def also_pass(module: Any, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"segment_ids": torch.zeros(1, 5)}

    layer.self_attn.register_forward_pre_hook(also_pass, with_kwargs=True)
    with pytest.raises(InputError, match="segment_ids"):
        model(text(1, 5))


@pytest.mark.parametrize("argument", ["cu_seq_lens_q", "seq_idx"])
def test_documents_without_positions_are_refused(argument: str) -> None:
    with pytest.raises(InputError, match="position_ids"):
        student("retention")(text(1, 5), **{argument: torch.tensor([0, 2, 5])})


def test_looking_ahead_is_refused() -> None:
    with pytest.raises(InputError, match="is_causal"):
        student("lolcats")(text(1, 5), is_causal=False)


# Gradient checkpointing.


@every_mixer
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_gradients_under_checkpointing_with_use_cache(name: str, reentrant: bool, kept: bool) -> None:
    def gradients(checkpointing: bool, **options: Any) -> dict[str, Tensor]:
        model = copy.deepcopy(start).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(ids, labels=ids, **options).loss.backward()
        return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}

    start, ids = student(name, kept=kept), text(2, 21)
    expected = gradients(False, use_cache=False)
    assert any(".mixer." in k for k in expected) or name in ("sliding_window", "gla")
    for options in ({"use_cache": True}, {"cache": DynamicCache(config=start.config), "use_cache": True}):
        checkpointed = gradients(True, **options)
        assert checkpointed.keys() == expected.keys()
        for key, gradient in expected.items():
            torch.testing.assert_close(
                checkpointed[key], gradient, rtol=0, atol=1e-6 + 1e-5 * float(gradient.abs().max())
            )


def test_a_filled_cache_cannot_be_left_out_under_checkpointing() -> None:
    model, ids = student("retention"), text(1, 9)
    with torch.no_grad():
        cache = cache_of(model(ids[:, :5], use_cache=True))
    model.train().gradient_checkpointing_enable()
    with pytest.raises(InputError, match="5 tokens"):
        model(ids[:, 5:], labels=ids[:, 5:], cache=cache)
    with torch.no_grad():  # nothing is replayed without gradients
        logits = model(ids[:, 5:], cache=cache).logits
    torch.testing.assert_close(logits, full(model.eval(), ids)[:, 5:], **CLOSE)


@pytest.mark.parametrize("name", ["lolcats", "mamba2"])
def test_a_layer_that_is_recomputed_with_a_cache_is_refused(name: str) -> None:
    """As wrappers from outside do it (FSDP's activation checkpointing): the student is not notified beforehand."""
    model, ids = student(name).train(), text(1, 9)
    layer = model.base_model.layers[1]
    plain = layer.forward
    layer.forward = lambda x, **kw: torch.utils.checkpoint.checkpoint(lambda y: plain(y, **kw), x, use_reentrant=False)
    loss = model(ids, labels=ids, use_cache=True).loss
    with pytest.raises(InputError, match="use_cache=False"):
        loss.backward()
    model(ids, labels=ids, use_cache=False).loss.backward()


# Padding and packing.


@every_mixer
@pytest.mark.parametrize("positions", ["none", "from 0", "clamped", "arange", "from 1", "ones at padding"])
def test_left_padding_changes_nothing_wherever_positions_begin(name: str, positions: str) -> None:
    model = student(name, kept=True)
    rows = [text(1, 17, seed=1)[0], text(1, 6, seed=2)[0], text(1, 11, seed=3)[0]]
    ids, mask = padded(rows)
    counted = mask.cumsum(1)
    position_ids = {
        "none": None, "from 0": counted - 1, "clamped": (counted - 1).clamp(min=0), "from 1": counted,
        "arange": torch.arange(17)[None].expand(3, -1), "ones at padding": (counted - 1).masked_fill(mask == 0, 1),
    }[positions]  # fmt: skip
    for use_cache in (False, True):
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, position_ids=position_ids, use_cache=use_cache).logits
        for i, row in enumerate(rows):
            own = None if position_ids is None else position_ids[i : i + 1, 17 - len(row) :]
            expected = full(model, row[None], position_ids=own)[0]
            torch.testing.assert_close(logits[i, 17 - len(row) :], expected, **CLOSE)


@every_mixer
@pytest.mark.parametrize("padding", ["nothing", "mask of ones", "padding on the right", "padding on the left"])
def test_packed_rows_through_kept_layers_equal_their_documents(name: str, padding: str) -> None:
    model = student(name, kept=True)
    assert not model.training
    first, second = text(1, 13, seed=1), text(1, 8, seed=2)
    ids, position_ids = torch.cat([first, second], 1), torch.cat([torch.arange(13), torch.arange(8)])[None]
    mask, pad = None, (0, 0)
    if padding != "nothing":
        pad = {"mask of ones": (0, 0), "padding on the right": (0, 4), "padding on the left": (3, 0)}[padding]
        mask = torch.nn.functional.pad(torch.ones(1, 21, dtype=torch.long), pad)
        ids, position_ids = (torch.nn.functional.pad(x, pad, value=1) for x in (ids, position_ids))
    with torch.no_grad():
        output = model(ids, position_ids=position_ids, attention_mask=mask)
    assert cache_of(output) is None, "documents of packed rows have no common past"
    logits = output.logits[:, pad[0] : pad[0] + 21]
    expected = torch.cat([full(model, first), full(model, second)], 1)
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert float((logits[:, 13:] - full(model, torch.cat([first, second], 1))[:, 13:]).abs().max()) > 0.1


def test_packed_rows_do_not_fill_a_cache_of_kept_layers() -> None:
    ids, position_ids = text(1, 9), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with pytest.raises(InputError, match="use_cache=False"):
        student("mamba2", kept=True)(ids, position_ids=position_ids, use_cache=True)
    model = student("mamba2")
    with torch.no_grad():
        cache = cache_of(model(ids, position_ids=position_ids, use_cache=True))
        after = model(text(1, 1, seed=9), position_ids=torch.tensor([[5]]), cache=cache).logits
    torch.testing.assert_close(
        after[:, -1], full(model, torch.cat([ids[:, 4:], text(1, 1, seed=9)], 1))[:, -1], **CLOSE
    )


@every_mixer
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_second_turn_of_unequal_lengths_goes_on_from_the_cache(name: str, side: str) -> None:
    model = student(name, kept=True)
    turns = [[text(1, n, seed=n)[0] for n in lengths] for lengths in ((12, 5, 9), (3, 14, 8), (6, 2, 7))]
    cache, mask = DynamicCache(config=model.config), torch.zeros(3, 0, dtype=torch.long)
    for turn in turns:
        ids, new = padded(turn)
        if side == "right":
            ids, new = ids.flip(1), new.flip(1)
            for i, row in enumerate(turn):
                ids[i, : len(row)] = row
        mask = torch.cat([mask, new], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, position_ids=positions, cache=cache).logits
    for i in range(3):
        expected = full(model, torch.cat([turn[i] for turn in turns])[None])[0, -len(turns[2][i]) :]
        turn_logits = logits[i][new[i].bool()]
        torch.testing.assert_close(turn_logits, expected, **CLOSE)


def test_a_mask_that_denies_what_was_read_is_refused() -> None:
    model = student("gla", kept=True)
    with torch.no_grad():
        cache = cache_of(model(text(2, 6), use_cache=True))
        padded = cache_of(model(text(2, 6), attention_mask=torch.tensor([[0] * 2 + [1] * 4, [1] * 6]), use_cache=True))
    with pytest.raises(InputError, match="hides past tokens"):
        model(text(2, 1), attention_mask=torch.tensor([[0] + [1] * 6, [1] * 7]), cache=cache)
    with pytest.raises(InputError, match="padding"):
        model(text(2, 1), cache=padded)
    with pytest.raises(InputError, match="between new tokens"):
        model(text(1, 5), attention_mask=torch.tensor([[1, 1, 0, 1, 1]]))
    with pytest.raises(InputError, match=r"\[2, 1, 5, 5\]"):
        model(text(2, 5), attention_mask=torch.ones(2, 1, 5, 5))
    with pytest.raises(InputError, match=r"\[2, 4\]"):
        model(text(2, 5), attention_mask=torch.ones(2, 4))


# Direct calls.


@every_mixer
@pytest.mark.parametrize("kept", [False, True])
def test_the_backbone_called_by_itself_gives_the_students_hidden_states(name: str, kept: bool) -> None:
    model = student(name, kept=kept)
    ids, mask = padded([text(1, 15, seed=1)[0], text(1, 9, seed=2)[0]])
    with torch.no_grad():
        live = mask.bool()  # what is computed on padding is nobody's
        expected = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states[-1]
        for backbone in (model.base_model, model.model, model.lm.base_model):
            hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            torch.testing.assert_close(hidden[live], expected[live], **CLOSE)
        logits = model.get_output_embeddings()(model.base_model(ids, mask).last_hidden_state)
        by_head = model.lm(ids, attention_mask=mask).logits
    for row_logits in (logits, by_head):
        expected = full(model, ids, attention_mask=mask)
        torch.testing.assert_close(row_logits[live], expected[live], **CLOSE)


def test_the_backbone_called_by_itself_keeps_its_state_in_the_cache() -> None:
    model, ids = student("mamba2", kept=True), text(2, 17)
    cache, parts = None, []
    with torch.no_grad():
        for part in ids.split([8, 1, 8], dim=1):
            output = model.base_model(part, use_cache=True, **with_cache(model.base_model, cache))
            cache = cache_of(output)
            parts.append(model.get_output_embeddings()(output.last_hidden_state))
    torch.testing.assert_close(torch.cat(parts, 1), full(model, ids), **CLOSE)


def test_further_conversions_and_copies_use_their_own_plan() -> None:
    model = student_of(tiny("llama", attention="sdpa"), [MIXERS["mamba2"](), None, None])
    twin = copy.deepcopy(model)
    model.convert_layers({2: MIXERS["mamba2"]()})
    with torch.no_grad():
        kinds = [
            [
                isinstance(layer, MixerCacheLayer)
                for layer in cache_of(one.base_model(text(1, 5), use_cache=True)).layers
            ]
            for one in (model, twin)
        ]
    assert kinds == [[True, False, True], [True, False, False]]


def test_one_layer_called_by_itself_is_refused() -> None:
    model = student("mamba2")
    with pytest.raises(InputError, match="base_model"):
        model.base_model.layers[0](torch.zeros(1, 3, 30))


def test_the_last_logits_are_those_of_all_and_the_head_reads_contiguous_rows() -> None:
    model, ids, seen = student("mamba2"), text(2, 17), list[torch.Tensor]()
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        whole, last = (model(ids, use_cache=False, logits_to_keep=count).logits for count in (0, 3))
    torch.testing.assert_close(last, whole[:, -3:], **CLOSE)
    rows = seen[-1]
    assert rows.shape[:2] == (2, 3)
    assert rows.stride() == (3 * rows.shape[2], rows.shape[2], 1)

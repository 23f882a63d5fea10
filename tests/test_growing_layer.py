"""The cache layer with room: the tensors of transformers' own after any course of calls, and no copy per token."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from models import mixer, student_of, tiny
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from linearize.modeling.growing_layer import GrowingLayer, use_growing_layers
from linearize.ops.growing_softmax import LEAST

G, D, V = 3, 5, 7


def some(rows: int, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    keys, values = (torch.randn(rows, G, tokens, dim, generator=generator) for dim in (D, V))
    return keys, values


def equal(ours: GrowingLayer, theirs: DynamicLayer) -> bool:
    assert ours.get_seq_length() == theirs.get_seq_length()
    pairs = ((ours.keys, theirs.keys), (ours.values, theirs.values))
    return all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("seed", range(6))
def test_any_course_of_calls_gives_the_tensors_of_transformers(seed: int) -> None:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    ours, theirs, rows, done = GrowingLayer(), DynamicLayer(), 2, set()
    for _ in range(60):
        what = draw.choice(["update"] * 5 + ["crop", "reorder", "repeat", "select", "copy", "reset"])
        if ours.get_seq_length() < 3:
            what = "update"
        done.add(what)
        if what == "update":
            new = some(rows, draw.choice([1, 1, 1, 4, 100]), generator)
            with torch.no_grad():
                updated = [layer.update(*(x.clone() for x in new)) for layer in (ours, theirs)]
            assert all(torch.equal(a, b) for a, b in zip(*updated, strict=True))
        elif what == "copy":
            ours, theirs = copy.deepcopy(ours), copy.deepcopy(theirs)
        elif what == "reset":
            ours.reset(), theirs.reset()
            continue
        else:
            order = torch.tensor([draw.randrange(rows) for _ in range(rows)])
            calls = {
                "crop": ("crop", -2),
                "reorder": ("reorder_cache", order),
                "repeat": ("batch_repeat_interleave", 1),
                "select": ("batch_select_indices", order),
            }
            name, argument = calls[what]
            for layer in (ours, theirs):
                getattr(layer, name)(argument)
        assert equal(ours, theirs)
    assert len(done) == 7


@torch.no_grad()
def test_a_token_does_not_copy_the_past_until_the_memory_is_full() -> None:
    layer, generator = GrowingLayer(), torch.Generator().manual_seed(1)
    first = layer.update(*some(1, 30, generator))[0]
    places = [layer.update(*some(1, 1, generator))[0].data_ptr() for _ in range(LEAST)]
    assert set(places) == {first.data_ptr()}
    assert layer.update(*some(1, 1, generator))[0].data_ptr() != first.data_ptr()
    layer.crop(-5)
    kept = layer.keys
    assert kept is not None and layer.update(*some(1, 2, generator))[0].data_ptr() == kept.data_ptr()


@torch.no_grad()
def test_two_caches_that_go_on_from_one_do_not_write_over_each_other() -> None:
    """A shallow copy shares keys and values with its original."""
    layer, generator = GrowingLayer(), torch.Generator().manual_seed(2)
    layer.update(*some(1, 9, generator))
    other, (a, b) = copy.copy(layer), (some(1, 1, generator) for _ in "ab")
    first = layer.update(*a)[0]
    second = other.update(*b)[0]
    assert torch.equal(first[:, :, 9:], a[0]) and torch.equal(second[:, :, 9:], b[0])
    assert torch.equal(first[:, :, :9], second[:, :, :9])


def test_with_gradients_keys_are_joined_and_the_past_keeps_its_gradient() -> None:
    layer, generator = GrowingLayer(), torch.Generator().manual_seed(3)
    k, v = some(1, 4, generator)
    k.requires_grad_()
    layer.update(k, v)
    layer.update(*some(1, 2, generator))[0].square().sum().backward()
    assert k.grad is not None and torch.equal(k.grad, 2 * k.detach())
    with torch.no_grad():
        assert layer.update(*some(1, 1, generator))[0].shape[2] == 7
    with torch.inference_mode():
        assert layer.update(*some(1, 1, generator))[0].shape[2] == 8
    with torch.no_grad():
        assert layer.update(*some(1, 1, generator))[0].shape[2] == 9


def test_a_hybrid_takes_it_in_its_own_cache_and_in_an_empty_one_that_is_given() -> None:
    student = student_of(tiny("llama"), [mixer(window=3), None, mixer(window=3)])
    ids = torch.arange(12)[None] % 50
    with torch.no_grad():
        own = student(ids, use_cache=True).past_key_values
        empty = DynamicCache(config=student.config)
        student(ids, use_cache=True, past_key_values=empty)
        expected = student.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False)
        actual = student.generate(ids, max_new_tokens=8, do_sample=False)
    for cache in (own, empty):
        assert [type(layer) is GrowingLayer for layer in cache.layers] == [False, True, False]
    assert torch.equal(actual, expected)
    filled = use_growing_layers(own).layers[1]
    assert filled is own.layers[1]  # what holds tokens stays

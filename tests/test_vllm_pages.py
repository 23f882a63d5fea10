"""A mixer's state in pages of bytes goes on as if it had never left: what the vLLM plugin keeps of a sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import mixer, tiny
from torch import Tensor

from linearize.errors import InputError
from linearize.mixers import AttentionShape, LayerMixer, Mixer, MixerConfig
from linearize.mixers.retrieval_heads import RetrievalHeadsConfig
from linearize.ops import tensors
from linearize.ops.layout import Layout
from linearize.serving.vllm.pages import StateMemory, page_bytes, page_layouts
from linearize.serving.vllm.steps import Step, as_slice

SHAPE = AttentionShape(num_heads=6, num_kv_heads=3, head_dim=10, value_dim=14, model_dim=30)
T = 37
MIXERS: list[MixerConfig] = [
    mixer("lolcats"),
    mixer("lolcats", num_sinks=3, window_shape="sliding", window=5),
    mixer("lolcats", store=5, num_sinks=2),
    mixer("lolcats", window=0),
    mixer("sliding_window", window=3),
    *(mixer(name) for name in ("gla", "mamba", "mamba2", "gated_delta_net", "retention")),
]


def ids(config: MixerConfig) -> str:
    return "-".join(str(value) for value in config.model_dump().values() if isinstance(value, str | int))[:40]


def built(config: MixerConfig) -> tuple[Mixer, AttentionShape]:
    shape = SHAPE if config.name in ("lolcats", "sliding_window", "gla") else with_equal_values()  # type: ignore[attr-defined]
    torch.manual_seed(3)
    made = config.build(shape)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape) / max(parameter.shape[-1], 1) ** 0.5)
    return made, shape


def with_equal_values() -> AttentionShape:
    return AttentionShape(num_heads=6, num_kv_heads=3, head_dim=10, value_dim=10, model_dim=30)


def inputs(made: Mixer, rows: int) -> tuple[Tensor, ...]:
    """Inputs of `rows` texts, as `run` takes them."""
    torch.manual_seed(5)
    shape = made.shape
    if isinstance(made, LayerMixer):
        return made.project(torch.randn(rows, T, shape.model_dim))
    heads = [
        (shape.num_heads, shape.head_dim),
        (shape.num_kv_heads, shape.head_dim),
        (shape.num_kv_heads, shape.value_dim),
    ]
    keys = [(shape.num_kv_heads, shape.head_dim)] if getattr(made, "needs_keys", False) else []
    return tuple(torch.randn(rows, count, T, dim) for count, dim in heads + keys)


def run(made: Any, parts: tuple[Tensor, ...], layout: Layout, state: Any) -> tuple[Tensor, Any]:
    if isinstance(made, LayerMixer):
        return made.mix(*parts, layout=layout, state=state)
    return made(*parts, layout=layout, state=state, scaling=0.4)


def memory_of(config: MixerConfig, shape: AttentionShape, pages: int) -> StateMemory:
    """Pages with noise in them, each longer than it need be."""
    layout = page_layouts([config], [shape], torch.float32)[0]
    return layout.memory(torch.randint(256, (pages, layout.num_bytes + 64), dtype=torch.uint8))


@pytest.mark.parametrize("config", MIXERS, ids=ids)
@torch.no_grad()
def test_chunks_and_single_tokens_over_pages_give_the_outputs_of_one_pass(config: MixerConfig) -> None:
    """Two texts in pages 4 and 1, read in chunks of unequal lengths, then token by token in one batch."""
    made, shape = built(config)
    whole = inputs(made, 2)
    expected, _ = run(made, whole, Layout(), None)
    memory, pages, time = memory_of(config, shape, 6), torch.tensor([4, 1]), made.time_dim
    before = [view.view(torch.uint8).clone() for view in memory.views_PX]
    read = [0, 0]
    for row, parts in enumerate([[3, 1, 2, 13], [1, 5]]):
        for count in parts:
            part = tuple(x[row : row + 1].narrow(time, read[row], count) for x in whole)
            page = pages[row : row + 1]
            state = made.plain(memory.read(page), position=read[row]) if read[row] else None
            y, after = run(made, part, Layout(start=read[row]), state)
            memory.write(page, made.fixed(after))
            at = expected[row : row + 1].narrow(time, read[row], count)
            torch.testing.assert_close(y, at, rtol=1e-4, atol=1e-4)
            read[row] += count
    for turn in range(9):
        position = torch.tensor(read)[:, None]
        part = tuple(torch.stack([x[row].narrow(time - 1, read[row], 1) for row in (0, 1)]) for x in whole)
        y, after = run(made, part, Layout(position_BT=position, tail=0), memory.read(pages))
        if turn % 2:
            memory.write(pages, after)
        else:
            made.put_step(memory.states, pages, after)
        at = torch.stack([expected[row].narrow(time - 1, read[row], 1) for row in (0, 1)])
        torch.testing.assert_close(y, at, rtol=1e-4, atol=1e-4)
        read = [count + 1 for count in read]
    others = [page for page in range(6) if page not in (4, 1)]
    for view, then in zip(memory.views_PX, before, strict=True):  # as bytes: noise may be NaN
        assert torch.equal(view.view(torch.uint8)[others], then[others])


@pytest.mark.parametrize("config", MIXERS, ids=ids)
@torch.no_grad()
def test_zeros_are_the_state_before_the_first_token(config: MixerConfig) -> None:
    """And sequences in pages of one distance are computed in the memory of the pages, each at its own position."""
    made, shape = built(config)
    whole, pages, time = inputs(made, 3), slice(1, 6, 2), made.time_dim
    expected, _ = run(made, whole, Layout(), None)
    memory = memory_of(config, shape, 7)
    others = [view.view(torch.uint8)[::2].clone() for view in memory.views_PX]
    for x in tensors(memory.shared(pages)):
        x.zero_()
    read = [0, 0, 0]
    for turn in range(T + 20):
        ready = [row for row in range(3) if turn >= 7 * row and read[row] < T]
        if not ready:
            break
        at = pages if len(ready) == 3 else slice(1 + 2 * ready[0], 2 + 2 * ready[-1], 2)
        part = tuple(torch.stack([x[row].narrow(time - 1, read[row], 1) for row in ready]) for x in whole)
        position = torch.tensor([[read[row]] for row in ready])
        y, after = run(made, part, Layout(position_BT=position, tail=0), memory.shared(at))
        memory.write_shared(at, after)
        right = torch.stack([expected[row].narrow(time - 1, read[row], 1) for row in ready])
        torch.testing.assert_close(y, right, rtol=1e-4, atol=1e-4)
        for row in ready:
            read[row] += 1
    assert read == [T] * 3
    for view, then in zip(memory.views_PX, others, strict=True):
        assert torch.equal(view.view(torch.uint8)[::2], then)


def test_all_layers_have_pages_of_the_largest_size() -> None:
    plan = [mixer("lolcats"), None, mixer("sliding_window"), mixer("lolcats")]
    layouts = page_layouts(plan, [with_equal_values()] * 4, torch.float32)
    assert sorted(layouts) == [0, 2, 3] and layouts[0] is layouts[3]
    assert page_bytes(list(layouts.values())) == layouts[0].num_bytes > layouts[2].num_bytes
    half = page_layouts(plan, [with_equal_values()] * 4, torch.bfloat16)
    assert half[2].num_bytes < layouts[2].num_bytes


def test_heads_that_keep_the_whole_text_are_refused() -> None:
    teacher = tiny("llama")
    plan = [mixer("lolcats"), RetrievalHeadsConfig(groups=(1,)), None]
    with pytest.raises(InputError, match=r"layer 1 \(retrieval_heads\) .*linearize generate"):
        page_layouts(plan, [with_equal_values()] * teacher.config.num_hidden_layers, torch.float32)


def test_a_step_tells_single_tokens_from_chunks() -> None:
    """Five sequences: one token of an old one, the only token of a new one, a chunk, none, and a first chunk."""
    step = Step.of([0, 1, 2, 7, 7, 10], [9, 1, 12, 4, 3], torch.tensor([6, 2, 5, 0, 3]))
    assert step.decodes is not None and step.decodes.first_N is not None
    assert (step.decodes.pages, step.decodes.in_order) == (slice(2, 7, 4), False)
    assert step.decodes.token_N.tolist() == [1, 0] and step.decodes.page_N.tolist() == [2, 6]
    assert step.decodes.first_N.tolist() == [True, False]
    assert step.decodes.layout.position_BT is not None and step.decodes.layout.position_BT.tolist() == [[0], [8]]
    chunks = [(one.start, one.stop, one.past, one.page_1.tolist(), one.layout.start) for one in step.chunks]
    assert chunks == [(2, 7, 7, [5], 7), (7, 10, 0, [3], 0)]
    last = Step.of([0, 4, 5], [4, 30], torch.tensor([1, 8]))
    assert last.decodes is not None and (last.decodes.pages, last.decodes.token_N.tolist()) == (slice(8, 9, 1), [4])
    assert last.decodes.first_N is None and Step.of([0, 4], [4], torch.tensor([1])).decodes is None


def test_pages_that_no_slice_takes_stay_in_the_order_of_their_tokens() -> None:
    step = Step.of([0, 1, 2, 3], [5, 6, 7], torch.tensor([4, 1, 2]))
    assert step.decodes is not None and step.decodes.pages is None and step.decodes.in_order
    assert step.decodes.page_N.tolist() == [4, 1, 2] and step.decodes.token_N.tolist() == [0, 1, 2]
    assert as_slice([3, 5, 5]) is None and as_slice([2, 3, 5]) is None and as_slice([2, 5, 8]) == slice(2, 9, 3)

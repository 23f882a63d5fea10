"""The contract of every mixer in the table, (a) to (f) of the design, on the module alone and inside a student."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from models import left_padded, mixer, student_of, text, tiny
from torch import Tensor
from transformers import DynamicCache

from linearize.mixers import MIXERS, AttentionShape, LayerMixer, Mixer, MixerConfig
from linearize.mixers.layer_mixer import LayerMixerConfig
from linearize.mixers.retrieval_heads import RetrievalHeadsConfig
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.cache import MixerCacheLayer
from linearize.modeling.projections import attention_weights
from linearize.ops.layout import Layout

B, H, G, D, V, T = 2, 6, 3, 5, 7, 47
M = 11
SHAPE = AttentionShape(num_heads=H, num_kv_heads=G, head_dim=D, value_dim=V, model_dim=M)
EQUAL = {"mamba"}  # mixers that need values as wide as keys
FP32 = {"rtol": 0, "atol": 1e-4}  # of logits in the order of 6: rounding of three layers, on any processor
FP64 = {"rtol": 1e-9, "atol": 1e-9}
SCORES: dict[str, Any] = {"scaling": 0.61, "softcap": 3.0}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "lolcats": [
        {},
        {"window": 5, "window_shape": "sliding", "num_sinks": 2, "affine": True},
        {"window": 0, "feature_map": "elu"},
        {"window": 0, "feature_map": "t2r", "shift": "shared"},
        {"window": 3, "feature_map": "exp", "num_sinks": 1, "shift": "shared"},
        {"window": 3, "num_sinks": 1, "store": 5, "shift": "shared"},
        {"window": 4, "feature_map": "gain", "store": 3, "affine": True},
    ],
    "sliding_window": [{}, {"window": 6, "window_shape": "terraced", "num_sinks": 3}],
    "mamba": [{}, {"repeat": "after"}],
    "mamba2": [{}, {"repeat": "after", "conv_taps": 3}],
    "gated_delta_net": [{}, {"repeat": "after"}],
}
HEADS = [
    RetrievalHeadsConfig(groups=(1,), mixer=mixer("lolcats", num_sinks=1, shift="shared")),
    RetrievalHeadsConfig(groups=(0, 2), mixer=mixer("lolcats", feature_map="gain", store=4)),
    RetrievalHeadsConfig(groups=(2,), mixer=mixer("gla")),
    RetrievalHeadsConfig(groups=(0, 1, 2), mixer=mixer("sliding_window")),
]
CONFIGS = [*(mixer(name, **settings) for name in MIXERS for settings in VARIANTS.get(name, [{}])), *HEADS]


def name(config: MixerConfig) -> str:
    """What a case is called: mixer and settings."""
    if isinstance(config, RetrievalHeadsConfig):
        return f"heads-{config.groups}-{name(config.mixer)}"
    return "-".join(map(str, (config.name, *config.model_dump(exclude_unset=True).values())))


every_mixer = pytest.mark.parametrize("config", CONFIGS, ids=name)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def shape_for(config: MixerConfig) -> AttentionShape:
    return replace(SHAPE, value_dim=D) if config.name in EQUAL else SHAPE


def build(config: MixerConfig, dtype: torch.dtype = torch.float64) -> Mixer:
    torch.manual_seed(1)
    built = config.build(shape_for(config)).to(dtype)
    for parameter in built.parameters():
        scale = 0.5 / parameter.shape[-1] ** 0.5 if parameter.dim() == 2 else 0.5  # two dimensions: a projection
        parameter.add_(scale * torch.randn_like(parameter))
    return built


def inputs(mixer: Mixer, *, rows: int = B, tokens: int = T, seed: int = 2) -> list[Tensor]:
    """What the mixer is called with: hidden states, or q, k, v (and keys), in the dtype of its parameters."""
    torch.manual_seed(seed)
    dtype = next((x.dtype for x in mixer.parameters()), torch.float64)
    if isinstance(mixer, LayerMixer):
        return [torch.randn(rows, tokens, M, dtype=dtype)]
    sizes = [(H, D), (G, D), (G, V), *([(G, D)] if mixer.needs_keys else [])]
    return [torch.randn(rows, n, tokens, d, dtype=dtype) for n, d in sizes]


def cut(mixer: Mixer, sequences: list[Tensor], start: int, stop: int) -> list[Tensor]:
    return [x.narrow(mixer.time_dim, start, stop - start) for x in sequences]


def run(mixer: Mixer, sequences: list[Tensor], cuts: list[int]) -> tuple[Tensor, Any]:
    """Outputs and state when the sequence is cut at these tokens."""
    state, parts, tokens = None, [], sequences[0].shape[mixer.time_dim]
    scores = {} if isinstance(mixer, LayerMixer) else SCORES
    for a, b in itertools.pairwise([0, *cuts, tokens]):
        y, state = mixer(*cut(mixer, sequences, a, b), layout=Layout(a), state=state, **scores)
        parts.append(y)
    return torch.cat(parts, dim=mixer.time_dim), state


def raw(mixer: Mixer, sequences: list[Tensor]) -> list[Tensor]:
    """The inputs that `advance` takes."""
    return list(mixer.project(*sequences)) if isinstance(mixer, LayerMixer) else sequences[1:]


def same_state(actual: Any, expected: Any, tolerance: float) -> None:
    tensors: list[list[Tensor]] = []
    for state in (actual, expected):
        tensors.append([])
        state.map_batch(lambda x: tensors[-1].append(x) or x)
    assert len(tensors[0]) == len(tensors[1]) > 0
    for x, y in zip(*tensors, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@lru_cache
def student(config: MixerConfig, dtype: torch.dtype = torch.float32, **changes: Any) -> LinearizedForCausalLM:
    """A student for each dtype: `to` would change the one that other tests hold."""
    return student_of(tiny("llama", attention="sdpa", num_hidden_layers=2, **changes), config).to(dtype)


@every_mixer
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=str)
def test_a_cutting_anywhere_changes_nothing(config: MixerConfig, dtype: torch.dtype, tolerance: float) -> None:
    built = build(config, dtype)
    sequences = [x.to(dtype) for x in inputs(built)]
    whole, end = run(built, sequences, [])
    assert whole.shape == ((B, T, M) if isinstance(built, LayerMixer) else (B, H, T, V)) and whole.dtype == dtype
    for cuts in ([1], [T - 1], [5, 6, 29], [33], list(range(1, T))):
        y, state = run(built, sequences, cuts)
        torch.testing.assert_close(y, whole, rtol=tolerance, atol=tolerance)
        same_state(state, end, tolerance)
    advanced = built.advance(*cut(built, raw(built, sequences), 0, 20), layout=Layout())
    advanced = built.advance(*cut(built, raw(built, sequences), 20, T), layout=Layout(20), state=advanced)
    same_state(advanced, end, tolerance)


@every_mixer
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FP64), (torch.float32, FP32)], ids=["fp64", "fp32"])
def test_a_student_prefills_in_chunks_and_decodes_as_in_one_pass(
    config: MixerConfig, dtype: torch.dtype, tolerance: dict[str, float]
) -> None:
    model, ids = student(config, dtype), text(2, T)
    whole = model(ids).logits
    for sizes in ([2, 1, 35, 9], [3, *[1] * (T - 3)]):
        cache, parts = None, []
        for part in ids.split(sizes, dim=1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache, parts = out.past_key_values, [*parts, out.logits]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, **tolerance)


@every_mixer
@pytest.mark.parametrize("sizes", [[T], [9, 1, 37]], ids=["whole", "cut"])
def test_b_left_padding_changes_nothing(config: MixerConfig, sizes: list[int]) -> None:
    model, lengths = student(config, torch.float64), [31, T, 3]
    ids, mask = left_padded(text(3, T), lengths)
    cache, parts, seen = None, [], 0
    for part in ids.split(sizes, dim=1):
        seen += part.shape[1]
        out = model(part, attention_mask=mask[:, :seen], past_key_values=cache, use_cache=True)
        cache, parts = out.past_key_values, [*parts, out.logits]
    logits = torch.cat(parts, dim=1)
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, T - length :]).logits[0]
        torch.testing.assert_close(logits[row, T - length :], alone, **FP64)


@every_mixer
def test_b_batch_order_changes_nothing(config: MixerConfig) -> None:
    built, order = build(config), torch.tensor([2, 0, 1])
    sequences = inputs(built, rows=3)
    y, state = run(built, sequences, [20])
    shuffled, after = run(built, [x[order] for x in sequences], [20])
    torch.testing.assert_close(shuffled, y[order], rtol=0, atol=1e-12)
    same_state(after, state.map_batch(lambda x: x[order]), 1e-12)


@every_mixer
def test_b_packing_changes_nothing(config: MixerConfig) -> None:
    model, documents = student(config, torch.float64), [[11, 1, 32, 3], [30, 17]]
    ids = text(2, T)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in documents])
    whole = model(ids, position_ids=positions).logits
    for row, lengths in enumerate(documents):
        apart = [model(part[None]).logits[0] for part in ids[row].split(lengths)]
        torch.testing.assert_close(whole[row], torch.cat(apart), **FP64)
    one_row = positions[:1]
    torch.testing.assert_close(model(ids, position_ids=one_row).logits[0], whole[0], **FP64)


@every_mixer
def test_c_nothing_stays_on_the_module(config: MixerConfig) -> None:
    built = build(config)
    sequences = inputs(built)

    def picture() -> dict[str, Any]:
        contents: dict[str, Any] = {}
        for name, module in built.named_modules():
            tensors = itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
            contents |= {f"{name}.{key}": value.clone() for key, value in tensors}
            contents |= {f"{name}!{key}": repr(value) for key, value in vars(module).items() if key[0] != "_"}
        return contents

    before = picture()
    run(built, sequences, [13])
    built.advance(*raw(built, sequences), layout=Layout())
    after = picture()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value) if isinstance(value, Tensor) else after[name] == value, name


@every_mixer
def test_c_sequences_that_take_turns_do_not_meet(config: MixerConfig) -> None:
    model = student(config, torch.float64)
    texts, caches, logits = [text(1, T, seed=3), text(1, T, seed=4)], [None, None], [[], []]
    for part in range(0, T, 6):
        for which in (0, 1):
            out = model(texts[which][:, part : part + 6], past_key_values=caches[which], use_cache=True)
            caches[which] = out.past_key_values
            logits[which].append(out.logits)
    for ids, parts in zip(texts, logits, strict=True):
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, **FP64)


@every_mixer
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize(("calls", "dropped"), [([5], 2), ([1], 1), ([8, 1, 4], 6), ([3, 2], 5), ([6, 6], 0)])
def test_d_a_rollback_leaves_no_trace(config: MixerConfig, padded: bool, calls: list[int], dropped: int) -> None:
    """The same cache, with and without draft tokens that are dropped again, goes on to the same logits."""
    model, prefix, true, wrong = student(config, torch.float64), 17, text(2, T), text(2, T, seed=99)
    mask = left_padded(true, [T, T - 11])[1] if padded else torch.ones(2, T, dtype=torch.long)
    kept = sum(calls) - dropped

    def step(cache: DynamicCache | None, ids: Tensor, start: int) -> tuple[DynamicCache, Tensor]:
        end = start + ids.shape[1]
        out = model(ids, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        return out.past_key_values, out.logits

    drafted = torch.cat([true[:, : prefix + kept], wrong[:, prefix + kept :]], dim=1)
    cache, _ = step(None, true[:, :prefix], 0)
    cache.activate_past_recording()
    for round_ in range(2):
        start = prefix if round_ == 0 else prefix + kept
        source = drafted if round_ == 0 else torch.cat([true[:, : start + 2], wrong[:, start + 2 :]], dim=1)
        for size in calls if round_ == 0 else [4]:
            cache, _ = step(cache, source[:, start : start + size], start)
            start += size
        cache.crop(-(dropped if round_ == 0 else 2))
    end = prefix + kept + 2
    assert cache.get_seq_length() == end
    _, continued = step(cache, true[:, end : end + 7], end)
    _, expected = step(None, true[:, : end + 7], 0)
    live = mask[:, end : end + 7, None]
    torch.testing.assert_close(continued * live, expected[:, end:] * live, **FP64)


@every_mixer
def test_d_the_state_itself_is_never_undone(config: MixerConfig) -> None:
    """After the crop of all guesses the committed state is the same object: nothing was copied, nothing recomputed."""
    model, ids = student(config), text(1, T)
    cache = model(ids[:, :20], use_cache=True).past_key_values
    states = [layer.state for layer in cache.layers]
    cache.activate_past_recording()
    model(ids[:, 20:29], past_key_values=cache)
    cache.crop(-9)
    assert [layer.state for layer in cache.layers] == states
    assert all(layer.pending is None and layer.get_seq_length() == 20 for layer in cache.layers)


@every_mixer
def test_d_dropping_more_than_is_held_is_refused(config: MixerConfig) -> None:
    model, ids = student(config), text(1, T)
    cache = model(ids[:, :20], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="activate_past_recording"):
        cache.crop(-1)
    cache.activate_past_recording()
    model(ids[:, 20:24], past_key_values=cache)
    cache.crop(-1)
    with pytest.raises(ValueError, match="cannot drop 1 token"):
        cache.crop(-1)
    assert cache.get_seq_length() == 23
    model(ids[:, 23:25], past_key_values=cache)
    with pytest.raises(ValueError, match=r"cannot drop 3 tokens.* 2 are held"):
        cache.crop(-3)


@every_mixer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_e_the_stated_cost_is_what_is_held(config: MixerConfig, dtype: torch.dtype) -> None:
    built = build(config, dtype)
    cost = built.cost(torch.finfo(dtype).bits // 8)
    sizes, lengths = [], (100, 101, 102, 103, 104, 105, 106, 107, 400)
    for tokens in lengths:
        _, state = run(built, [x.to(dtype) for x in inputs(built, rows=1, tokens=tokens)], [])
        sizes.append(state.num_bytes)
    assert max(size - cost.bytes_per_token * n for size, n in zip(sizes, lengths, strict=True)) == cost.state_bytes
    assert (cost.bytes_per_token > 0) == (config in HEADS)
    assert cost.flops_per_token > 0 or config is HEADS[-1]
    _, state = run(built, [x.to(dtype) for x in inputs(built, rows=3, tokens=100)], [])
    assert state.num_bytes == 3 * sizes[0]


@pytest.mark.parametrize("config", [c for c in CONFIGS if c not in HEADS], ids=name)
def test_e_the_cache_of_a_student_stops_growing(config: MixerConfig) -> None:
    model = student(config, max_position_embeddings=2048)
    cache, held = None, {}
    for end in range(60, 1201, 60):
        cache = model(text(1, 60, seed=end), past_key_values=cache, use_cache=True).past_key_values
        held[end] = [layer.num_bytes for layer in cache.layers]
    assert held[1200] == held[60] and all(held[60])
    stated = next(iter(model.mixers().values())).cost(4).state_bytes
    assert all(0 < size <= stated for sizes in held.values() for size in sizes)


@every_mixer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_f_it_starts_on_the_teachers_weights_device_and_dtype(config: MixerConfig, dtype: torch.dtype) -> None:
    teacher = tiny("llama", attention="sdpa", num_hidden_layers=2).to(dtype)
    model = LinearizedForCausalLM.from_teacher(teacher, [config] * 2)
    shared = {id(x) for x in teacher.parameters()}
    assert all((id(x) in shared) != (".mixer." in name) for name, x in model.named_parameters())
    assert {x.device for x in model.parameters()} == {teacher.device}
    out = model(text(2, T), use_cache=True)
    assert out.logits.dtype == dtype
    for layer in out.past_key_values.layers:
        assert isinstance(layer, MixerCacheLayer)
        tensors: list[Tensor] = []
        layer.state.map_batch(lambda x, seen=tensors: seen.append(x) or x)
        assert {x.dtype for x in tensors} <= {dtype, torch.promote_types(dtype, torch.float32)}


@pytest.mark.parametrize("config", [c for c in CONFIGS if issubclass(type(c), LayerMixerConfig)], ids=name)
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen2", "phi3", "gpt2"])
def test_f_a_layer_mixer_starts_from_the_teachers_projections(config: MixerConfig, family: str) -> None:
    teacher = tiny(family, num_hidden_layers=2)
    model = LinearizedForCausalLM.from_teacher(teacher, [None, config])
    shape, site = model.config.attention_shapes()[1], model.config.attention[1]
    weights = attention_weights(teacher.get_submodule(site), shape)
    own = [x for x in model.mixers()[1].parameters() if x.dim() == 2]

    def has(rows: Tensor) -> bool:
        starts = [(x, i) for x in own if x.shape[1] == rows.shape[1] for i in range(len(x) - len(rows) + 1)]
        return any(torch.equal(x[i : i + len(rows)], rows) for x, i in starts)

    assert all(has(rows) for rows in (weights.q, weights.k, weights.v, weights.o))
    anew = LinearizedForCausalLM.from_teacher(teacher, [None, config.model_copy(update={"initialise": "random"})])
    own = [x for x in anew.mixers()[1].parameters() if x.dim() == 2]
    assert not any(has(rows) for rows in (weights.q, weights.k, weights.v, weights.o))


@pytest.mark.parametrize("config", [c for c in CONFIGS if issubclass(type(c), LayerMixerConfig)], ids=name)
def test_the_mixing_matrix_is_what_the_layer_does_between_values_and_outputs(config: MixerConfig) -> None:
    """Causal, and of one entry per pair of tokens; a document sees nothing of the one before."""
    built = build(config)
    (hidden,) = inputs(built)
    positions = torch.cat([torch.arange(20), torch.arange(T - 20)])[None]
    matrix = built.matrix(hidden, layout=Layout(position_BT=positions))
    assert matrix.shape == (B, H, T, T) and bool(matrix.isfinite().all())
    outside = torch.ones(T, T, dtype=torch.bool).triu(1)
    outside[20:, :20] = True
    assert bool((matrix[..., outside] == 0).all()) and bool((matrix[..., ~outside] != 0).any())


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.name == "lolcats" and c.window], ids=name)
def test_both_branches_are_there_where_the_mixer_has_two(config: MixerConfig) -> None:
    """Guards the tests above: window alone and linear branch alone differ from both together, so neither is dead."""
    model, ids = student(config), text(1, T)
    logits = {branch: model(ids, branch=branch).logits for branch in ("both", "window", "linear")}
    assert all((logits["both"] - logits[other]).abs().max() > 1e-3 for other in ("window", "linear"))

"""Time of one decoded token at a long context: student with its own cache, teacher with a static (preallocated) one.

A token's cost does not depend on what the caches hold, so the teacher's is filled with random keys and values instead
of a prefill of the whole context; the student reads a text long enough that its ring and its sums are full. Students
are timed over whole blocks of their window, so that the folding of a block into the sums has its share. `op`: one
layer's attention alone, keys and values put into the cache included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, StaticCache

from benchmarks.op_speed import OURS
from benchmarks.timing import SEED, parser, publish, random_llama
from linearize.evaluation.speed import cache_bytes
from linearize.evaluation.speed.running import Timing, interleaved
from linearize.mixers import MIXERS
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.cache_argument import cache_of, with_cache
from linearize.ops.layout import Layout

BLOCK = 64  # tokens of a student that are timed at a time
Runs = dict[str, Callable[[], Any]]


def measure(
    teacher: PreTrainedModel, *, context: int, repeats: int, mixers: Sequence[str], block: int = BLOCK
) -> list[dict[str, Any]]:
    """One row per mixer: seconds per token of both, their cache bytes, how many times as fast the student is; the same
    for one layer's operation. Everything is timed in turn."""
    slow, static = _teacher_step(teacher, context, repeats)
    runs: Runs = {"teacher": slow, "teacher op": _softmax_op(teacher, static, context)}
    caches: dict[str, Any] = {}
    for mixer in mixers:
        plan = [MIXERS["lolcats"](**OURS[mixer])] * teacher.config.num_hidden_layers
        student = LinearizedForCausalLM.from_teacher(teacher, plan).eval()
        run, caches[mixer] = _student_step(student, context)
        runs[mixer] = _times(run, block)
        runs[f"{mixer} op"] = _times(_mixer_op(student, caches[mixer]), block)
    with torch.inference_mode():
        result = interleaved(runs, repeats)
    times = {name: _one(timing, 1 if name.startswith("teacher") else block) for name, timing in result.items()}
    return [
        {
            "context": context,
            "mixer": mixer,
            "parameters": sum(p.numel() for p in teacher.parameters()),
            "cache_bytes": {"teacher": cache_bytes(static), "student": cache_bytes(caches[mixer])},
            "times": {"teacher": vars(times["teacher"]), "student": vars(times[mixer])},
            "op_times": {"teacher": vars(times["teacher op"]), "student": vars(times[f"{mixer} op"])},
            "speedup": times["teacher"].seconds / times[mixer].seconds,
            "speedup_cpu": times["teacher"].cpu_seconds / times[mixer].cpu_seconds,
            "op_speedup": times["teacher op"].seconds / times[f"{mixer} op"].seconds,
            "op_speedup_cpu": times["teacher op"].cpu_seconds / times[f"{mixer} op"].cpu_seconds,
        }
        for mixer in mixers
    ]


def _times(run: Callable[[], Any], count: int) -> Callable[[], Any]:
    def many() -> None:
        for _ in range(count):
            run()

    return many


def _one(timing: Timing, count: int) -> Timing:
    return Timing(**{name: seconds / count for name, seconds in vars(timing).items()})


def _token(model: PreTrainedModel, count: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(model.config.get_text_config().vocab_size, (1, count), generator=generator)


@torch.inference_mode()
def _teacher_step(model: PreTrainedModel, context: int, repeats: int) -> tuple[Callable[[], Any], StaticCache]:
    cache = StaticCache(config=model.config, max_cache_len=context + repeats + 1)
    ids = _token(model)
    model(input_ids=ids, use_cache=True, **with_cache(model, cache))
    layer: Any
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(context)
    return lambda: model(input_ids=ids, use_cache=True, **with_cache(model, cache)), cache


def _softmax_op(model: PreTrainedModel, cache: StaticCache, context: int) -> Callable[[], Any]:
    """SDPA over the first layer's cache, query heads grouped as transformers does for one token."""
    layer: Any = cache.layers[0]
    q, k, v = _projected(model)
    mask = (torch.arange(layer.keys.shape[2]) <= context)[None]
    place = torch.tensor([context])

    def run() -> Tensor:
        layer.keys.index_copy_(2, place, k)
        layer.values.index_copy_(2, place, v)
        groups = q.reshape(1, k.shape[1], -1, q.shape[3])
        return F.scaled_dot_product_attention(groups, layer.keys, layer.values, attn_mask=mask)

    return run


def _projected(model: PreTrainedModel) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of one token in one layer."""
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(SEED)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    q, k, v = (torch.randn(1, count, 1, config.head_dim, generator=generator) for count in heads)
    return q, k, v


def _mixer_op(student: LinearizedForCausalLM, cache: Any) -> Callable[[], Any]:
    """The first layer's mixer, continuing from its state."""
    mixer: Any = student.mixers()[0]
    (q, k, v), state = _projected(student.lm), cache.layers[0].state
    with torch.inference_mode():
        decoder = mixer.decoder(q, k, scaling=q.shape[3] ** -0.5, layout=Layout(state.next), state=state)
    if decoder is not None:
        return lambda: decoder.step(q, k, v)

    def steps() -> Iterator[None]:
        nonlocal state
        for at in range(state.next, 2**62):
            _, state = mixer(q, k, v, scaling=q.shape[3] ** -0.5, layout=Layout(at), state=state)
            yield

    going = steps()
    return lambda: next(going)


@torch.inference_mode()
def _student_step(model: Any, context: int) -> tuple[Callable[[], Any], Any]:
    window = max(entry["window"] for entry in model.config.plan if entry is not None)
    read = min(context, 4 * window + window // 2)
    cache = cache_of(model(input_ids=_token(model.lm, read), use_cache=True, logits_to_keep=1))
    ids = _token(model.lm)
    return lambda: model(input_ids=ids, use_cache=True, **with_cache(model, cache)), cache


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and publish."""
    options = parser(__doc__)
    options.set_defaults(repeats=3)
    options.add_argument("--context", type=int, nargs="+", default=[1024, 8192, 32768, 131072])
    options.add_argument("--hidden", type=int, default=576)
    options.add_argument("--layers", type=int, default=30)
    options.add_argument("--heads", type=int, default=9)
    options.add_argument("--kv-heads", type=int, default=3)
    options.add_argument("--head-dim", type=int, default=64)
    options.add_argument("--vocab", type=int, default=16384)
    options.add_argument("--mixer", choices=sorted(OURS), nargs="+", default=sorted(OURS))
    chosen = options.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    size = {name: getattr(chosen, name) for name in ("hidden", "layers", "heads", "kv_heads", "head_dim", "vocab")}
    teacher = random_llama(**size, context=max(chosen.context) + 4 * BLOCK * (chosen.repeats + 2))
    rows = [
        row
        for context in chosen.context
        for row in measure(teacher, context=context, repeats=chosen.repeats, mixers=chosen.mixer)
    ]
    setting = {
        "batch": 1,
        "dtype": "float32",
        "threads": chosen.threads,
        "model": size,
        "tokens_timed_at_a_time": {"teacher": 1, "student": BLOCK},
        "mixers": {name: OURS[name] for name in chosen.mixer},
    }
    publish("student at least as fast from 256 tokens on, 5 times at 16384, more beyond", setting, rows, chosen.out)


if __name__ == "__main__":
    main()

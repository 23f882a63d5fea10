"""Time of one decoded token at a long context: student with its own cache, teacher with a static (preallocated) one.

A token's cost does not depend on what the caches hold, so the teacher's is filled with random keys and values instead
of a prefill of the whole context; the student reads a text long enough that its ring and its sums are full.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache

from linearize.benchmarks.op_speed import OURS
from linearize.benchmarks.timing import SEED, parser, publish, random_llama
from linearize.evaluation.speed import cache_bytes
from linearize.evaluation.speed.timing import interleaved
from linearize.mixers import MIXERS
from linearize.modeling import LinearizedForCausalLM


def measure(teacher: PreTrainedModel, *, context: int, repeats: int, mixer: str) -> dict[str, Any]:
    """Seconds per token of both, their cache bytes, and how many times as fast the student is."""
    plan = [MIXERS["lolcats"](**OURS[mixer])] * teacher.config.num_hidden_layers
    student = LinearizedForCausalLM.from_teacher(teacher, plan).eval()
    slow, static = _teacher_step(teacher, context, repeats)
    fast, own = _student_step(student, context)
    with torch.inference_mode():
        times = interleaved({"teacher": slow, "student": fast}, repeats)
    return {
        "context": context,
        "mixer": mixer,
        "parameters": sum(p.numel() for p in teacher.parameters()),
        "cache_bytes": {"teacher": cache_bytes(static), "student": cache_bytes(own)},
        "times": {name: vars(timing) for name, timing in times.items()},
        "speedup": times["teacher"].seconds / times["student"].seconds,
        "speedup_cpu": times["teacher"].cpu_seconds / times["student"].cpu_seconds,
    }


def _token(model: PreTrainedModel, count: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(model.config.get_text_config().vocab_size, (1, count), generator=generator)


@torch.inference_mode()
def _teacher_step(model: PreTrainedModel, context: int, repeats: int) -> tuple[Callable[[], Any], StaticCache]:
    cache = StaticCache(config=model.config, max_cache_len=context + repeats + 1)
    ids = _token(model)
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    layer: Any
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(context)
    return lambda: model(input_ids=ids, past_key_values=cache, use_cache=True), cache


@torch.inference_mode()
def _student_step(model: Any, context: int) -> tuple[Callable[[], Any], Any]:
    window = max(entry["window"] for entry in model.config.plan if entry is not None)
    read = min(context, 4 * window + window // 2)
    cache = model(input_ids=_token(model.lm, read), use_cache=True, logits_to_keep=1).past_key_values
    ids = _token(model.lm)
    return lambda: model(input_ids=ids, past_key_values=cache, use_cache=True), cache


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and publish."""
    options = parser(__doc__)
    options.set_defaults(repeats=70)  # more than a window: the folding of a block into the sums is among the tokens
    options.add_argument("--context", type=int, nargs="+", default=[1024, 16384])
    options.add_argument("--hidden", type=int, default=512)
    options.add_argument("--layers", type=int, default=24)
    options.add_argument("--heads", type=int, default=8)
    options.add_argument("--kv-heads", type=int, default=8)
    options.add_argument("--head-dim", type=int, default=128)
    options.add_argument("--vocab", type=int, default=8192)
    options.add_argument("--mixer", choices=sorted(OURS), nargs="+", default=sorted(OURS))
    chosen = options.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    size = {name: getattr(chosen, name) for name in ("hidden", "layers", "heads", "kv_heads", "head_dim", "vocab")}
    teacher = random_llama(**size, context=max(chosen.context) + 2 * chosen.repeats)
    rows = [
        measure(teacher, context=context, repeats=chosen.repeats, mixer=mixer)
        for context in chosen.context
        for mixer in chosen.mixer
    ]
    setting = {"batch": 1, "dtype": "float32", "model": size, "mixers": {name: OURS[name] for name in chosen.mixer}}
    publish("student at least 5 times as fast at a context of 16384", setting, rows, chosen.out)


if __name__ == "__main__":
    main()

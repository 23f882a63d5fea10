"""How the prefill time of a student grows with the text: linear is 4 times from 4096 to 16384 tokens, quadratic 16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.op_speed import OURS
from benchmarks.timing import parser, publish, random_llama
from linearize.evaluation.speed.running import interleaved
from linearize.mixers import MIXERS
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.cache_argument import with_cache


def measure(model: Any, lengths: Sequence[int], repeats: int, chunk: int) -> dict[str, Any]:
    """Seconds of a prefill with a cache, in chunks of at most `chunk` tokens (transformers' `prefill_chunk_size`), for
    each length, and their growth from the first to the last."""
    with torch.inference_mode():
        times = interleaved({str(length): _run(model, length, chunk) for length in lengths}, repeats)
    first, last = times[str(lengths[0])], times[str(lengths[-1])]
    return {
        "chunk": chunk,
        "times": {name: vars(timing) for name, timing in times.items()},
        "growth": last.seconds / first.seconds,
        "growth_cpu": last.cpu_seconds / first.cpu_seconds,
    }


def _run(model: Any, length: int, chunk: int) -> Callable[[], Any]:
    ids = torch.randint(model.lm.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))

    def prefill() -> Any:
        cache = DynamicCache(config=model.config)
        for part in ids.split(chunk, dim=1):
            model(input_ids=part, use_cache=True, **with_cache(model, cache), logits_to_keep=1)

    return prefill


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and publish."""
    options = parser(__doc__)
    options.set_defaults(repeats=3)
    options.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384])
    options.add_argument("--chunk", type=int, nargs="+", default=[4096], help="tokens per forward; each in turn")
    options.add_argument("--hidden", type=int, default=512)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--heads", type=int, default=8)
    options.add_argument("--kv-heads", type=int, default=2)
    options.add_argument("--vocab", type=int, default=8192)
    chosen = options.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    size = {name: getattr(chosen, name) for name in ("hidden", "layers", "heads", "kv_heads", "vocab")}
    teacher = random_llama(**size, context=max(chosen.tokens))
    rows = []
    for mixer, config in OURS.items():
        student = LinearizedForCausalLM.from_teacher(teacher, [MIXERS["lolcats"](**config)] * chosen.layers).eval()
        rows += [{"mixer": mixer, **measure(student, chosen.tokens, chosen.repeats, chunk)} for chunk in chosen.chunk]
    setting = {"batch": 1, "dtype": "float32", "model": size, "mixers": OURS}
    publish("growth at most 5 from 4096 to 16384 tokens", setting, rows, chosen.out)


if __name__ == "__main__":
    main()

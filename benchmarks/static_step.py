"""Static steps and the growing cache: a decoded token, and the verification of K draft tokens after K accepted ones.

On a GPU static steps are replays of CUDA graphs (the first call records them, untimed); on a CPU they only run, which
shows what fixed shapes cost by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import SEED, parser, publish, random_llama
from linearize.errors import unknown
from linearize.evaluation.speed.running import interleaved
from linearize.mixers import MIXERS
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.cache_argument import cache_of
from linearize.modeling.static.step import StaticStep

Runs = dict[str, Callable[[], Any]]


def measure(
    teacher: Any, *, mixer: str | None, batch: int, draft_tokens: Sequence[int], context: int, repeats: int
) -> dict[str, Any]:
    """Seconds of each cache and the ratio of the growing cache's to the static one's; `mixer` None: the teacher."""
    model = teacher
    if mixer is not None:
        plan = [MIXERS[mixer]() for _ in range(teacher.config.num_hidden_layers)]
        model = LinearizedForCausalLM.from_teacher(teacher, plan).eval()
    generator = torch.Generator().manual_seed(SEED)
    prompts = torch.randint(teacher.config.vocab_size, (batch, context), generator=generator).to(teacher.device)
    capacity = context + (max(draft_tokens) + 1) * (repeats + 8)
    with torch.inference_mode():
        runs: Runs = {
            "token, growing": growing_token(model, prompts),
            "token, static": static_token(model, prompts, capacity),
        }
        for count in draft_tokens:
            runs[f"{count} draft tokens, growing"] = growing_verification(model, prompts, count)
            runs[f"{count} draft tokens, static"] = static_verification(model, prompts, count, capacity)
        times = interleaved(runs, repeats, warmup=2)
    return {
        "model": mixer or "teacher",
        "times": {name: vars(timing) for name, timing in times.items()},
        "times_as_fast": ratios({name: timing.seconds for name, timing in times.items()}),
        "times_as_fast_cpu": ratios({name: timing.cpu_seconds for name, timing in times.items()}),
    }


def ratios(seconds: Mapping[str, float]) -> dict[str, float]:
    """The ratios of what is timed with both caches."""
    kinds = [name.removesuffix(", growing") for name in seconds if name.endswith(", growing")]
    return {kind: seconds[f"{kind}, growing"] / seconds[f"{kind}, static"] for kind in kinds}


def growing_token(model: Any, prompts: Tensor) -> Callable[[], Any]:
    """One token through transformers' own cache."""
    cache: Any = cache_of(model(prompts, use_cache=True, logits_to_keep=1))
    return lambda: model(prompts[:, :1], cache=cache)


def growing_verification(model: Any, prompts: Tensor, count: int) -> Callable[[], Any]:
    """A token and its draft tokens, all kept."""
    cache: Any = cache_of(model(prompts, use_cache=True, logits_to_keep=1))
    cache.activate_past_recording()

    def run() -> None:
        model(prompts[:, : count + 1], cache=cache)
        cache.crop(0)

    return run


def static_token(model: Any, prompts: Tensor, capacity: int) -> Callable[[], Any]:
    """One token through a static cache."""
    step = StaticStep(model, batch=prompts.shape[0], capacity=capacity, rollback=False)
    step.prefill(prompts)
    return lambda: step.step(prompts[:, :1])


def static_verification(model: Any, prompts: Tensor, count: int, capacity: int) -> Callable[[], Any]:
    """A token and its draft tokens, all kept."""
    rows, width = prompts.shape[0], count + 1
    step = StaticStep(model, batch=rows, width=width, capacity=capacity)
    step.prefill(prompts)
    step.step(prompts[:, :width])
    return lambda: step.step(prompts[:, :width], [width] * rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and publish."""
    options = parser(__doc__)
    options.set_defaults(repeats=15)
    options.add_argument("--draft-tokens", type=int, nargs="+", default=[4, 8])
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--context", type=int, default=200)
    options.add_argument("--hidden", type=int, default=768)
    options.add_argument("--layers", type=int, default=12)
    options.add_argument("--heads", type=int, default=12)
    options.add_argument("--kv-heads", type=int, default=12)
    options.add_argument("--vocab", type=int, default=16384)
    options.add_argument("--mixer", nargs="*", default=sorted(MIXERS))
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, float32 elsewhere"
    )
    chosen = options.parse_args(arguments)
    if wrong := sorted(set(chosen.mixer) - set(MIXERS)):
        raise unknown("mixer", wrong[0], MIXERS)
    torch.set_num_threads(chosen.threads)
    size = {name: getattr(chosen, name) for name in ("hidden", "layers", "heads", "kv_heads", "vocab")}
    dtype = chosen.dtype or ("float32" if chosen.device == "cpu" else "bfloat16")
    teacher: Any = random_llama(**size, context=chosen.context + 100 * chosen.repeats)
    teacher = teacher.to(device=chosen.device, dtype=getattr(torch, dtype))
    settings = {name: getattr(chosen, name) for name in ("batch", "draft_tokens", "context", "repeats")}
    rows = [measure(teacher, mixer=mixer, **settings) for mixer in (None, *chosen.mixer)]
    setting = {"device": chosen.device, "dtype": dtype, "model": size, "threads": chosen.threads, **settings}
    publish(
        "a decode that a GPU replays: what it gains there, and what fixed shapes cost a CPU", setting, rows, chosen.out
    )


if __name__ == "__main__":
    main()

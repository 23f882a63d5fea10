"""Cost of verifying K draft tokens after K accepted ones, in single-token steps of the same model.

A verification is one call: the accepted tail goes into the state, K new tokens come out with their logits. All K are
then accepted, so that the next verification has a tail of K tokens. The single-token step is plain decoding, with
nothing recorded and nothing packed. All are timed in turn in one run, each as it is and `packed`, as the loop runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import SEED, parser, publish, random_llama
from linearize.errors import unknown
from linearize.evaluation.speed.running import interleaved
from linearize.mixers import MIXERS
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.cache_argument import cache_of
from linearize.modeling.prepacked_linear import packed_projections

Call = Callable[[Tensor], Any]


def measure(
    teacher: Any, *, mixer: str, kept: int, draft_tokens: Sequence[int], context: int, repeats: int
) -> dict[str, Any]:
    """Seconds of a plain step and of a verification for each K, and how many steps the latter is worth.

    `kept`: every how many layers one keeps softmax attention (0: none does).
    """
    layers = range(teacher.config.num_hidden_layers)
    plan = [None if kept and layer % kept == kept - 1 else MIXERS[mixer]() for layer in layers]
    student: Any = LinearizedForCausalLM.from_teacher(teacher, plan).eval()
    generator = torch.Generator().manual_seed(SEED)
    prompt = torch.randint(teacher.config.vocab_size, (1, context), generator=generator)
    with torch.inference_mode():
        calls = _calls(student, prompt, draft_tokens)
        with packed_projections(twin := copy.deepcopy(student)):
            calls |= {f"packed {name}": call for name, call in _calls(twin, prompt, draft_tokens).items()}
            times = interleaved(calls, repeats)
    steps = {name: timing.seconds / times["step"].seconds for name, timing in times.items() if name != "step"}
    return {
        "mixer": mixer,
        "kept_every": kept or None,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "times": {name: vars(timing) for name, timing in times.items()},
        "steps": steps,
        "steps_cpu": {name: times[name].cpu_seconds / times["step"].cpu_seconds for name in steps},
    }


def _calls(student: Any, prompt: Tensor, draft_tokens: Sequence[int]) -> dict[str, Callable[[], Any]]:
    """A plain step, and a verification for each K."""
    step = _plain(student, prompt)
    calls: dict[str, Callable[[], Any]] = {"step": lambda: step(prompt[:, :1])}
    for count in draft_tokens:
        run = _verification(student, prompt, count)
        calls[str(count)] = lambda run=run, ids=prompt[:, :count]: run(ids)  # type: ignore[misc]
    return calls


def _plain(student: Any, prompt: Tensor) -> Call:
    cache: Any = cache_of(student(prompt, use_cache=True, logits_to_keep=1))
    return lambda ids: student(ids, cache=cache)


def _verification(student: Any, prompt: Tensor, draft_tokens: int) -> Call:
    cache: Any = cache_of(student(prompt, use_cache=True, logits_to_keep=1))
    cache.activate_past_recording()

    def run(ids: Tensor) -> None:
        assert ids.shape[1] == draft_tokens
        student(ids, cache=cache)
        cache.crop(0)

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and publish."""
    options = parser(__doc__)
    options.set_defaults(repeats=15)
    options.add_argument("--draft-tokens", type=int, nargs="+", default=[4, 6, 8])
    options.add_argument("--context", type=int, default=200)
    options.add_argument("--hidden", type=int, default=768)
    options.add_argument("--layers", type=int, default=12)
    options.add_argument("--heads", type=int, default=12)
    options.add_argument("--kv-heads", type=int, default=12)
    options.add_argument("--vocab", type=int, default=16384)
    options.add_argument("--mixer", nargs="+", default=sorted(MIXERS))
    options.add_argument("--kept", type=int, default=0, help="every how many layers one keeps softmax attention")
    chosen = options.parse_args(arguments)
    if wrong := sorted(set(chosen.mixer) - set(MIXERS)):
        raise unknown("mixer", wrong[0], MIXERS)
    torch.set_num_threads(chosen.threads)
    size = {name: getattr(chosen, name) for name in ("hidden", "layers", "heads", "kv_heads", "vocab")}
    teacher = random_llama(**size, context=chosen.context + 100 * chosen.repeats)
    settings = {name: getattr(chosen, name) for name in ("kept", "draft_tokens", "context", "repeats")}
    rows = [measure(teacher, mixer=mixer, **settings) for mixer in chosen.mixer]
    setting = {"batch": 1, "dtype": "float32", "model": size, "context": chosen.context, "threads": chosen.threads}
    publish("a verification of 4 to 8 tokens costs less than 2 single-token steps", setting, rows, chosen.out)


if __name__ == "__main__":
    main()

"""A model of Llama-3-8B's shape with random weights on a GPU, student against teacher: prefill, decode, training, and
the largest batch with its throughput at 4096 generated tokens.

Weights are drawn on the device, so that nothing is downloaded. Both decode by replayed CUDA graphs over preallocated
memory. The student shares the teacher's weights; for the largest batch each is alone on the device.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.generation import GenerationWorkload, throughput
from benchmarks.on_gpu import Clock, arguments, device_for, facts, ratio, timings_json
from benchmarks.throughput import plan_of
from benchmarks.timing import SEED, parser, publish_each
from linearize.evaluation.speed.running import Timing
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.static.step import StaticStep

STEPS = 16  # decoded between two readings of the clock
LOSS_TOKENS = 128  # with logits in a training step: those of a whole long text do not fit beside it
SMALL = {
    "hidden": 24, "mlp": 40, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 61, "context": [9], "repeats": 1,
    "generated": 40, "fills": [8, 20], "most": 3, "budget_bytes": 40 * 2**20,
}  # fmt: skip


def random_teacher(chosen: Any, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Built without memory, then filled where it is to run."""
    settings: dict[str, Any] = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "attn_implementation": "sdpa",
    }
    config = LlamaConfig(
        **settings,
        hidden_size=chosen.hidden,
        intermediate_size=chosen.mlp,
        num_hidden_layers=chosen.layers,
        num_attention_heads=chosen.heads,
        num_key_value_heads=chosen.kv_heads,
        vocab_size=chosen.vocab,
        max_position_embeddings=2 * max([*chosen.context, chosen.generated]),
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1) if "norm" in name else parameter.normal_(0, 0.02, generator=generator)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # no checkpoint holds its buffers
    made: PreTrainedModel = model.eval()
    return made


def prefill_run(model: Any, ids_1T: Tensor) -> Callable[[], Any]:
    """A prompt, read at once."""
    return lambda: model(ids_1T, use_cache=True, logits_to_keep=1)


def decode_run(model: Any, ids_1T: Tensor, tokens: int) -> Callable[[], Any]:
    """So many tokens after a prompt, one by one; replayed graphs on a GPU."""
    step = StaticStep(model, batch=1, capacity=ids_1T.shape[1] + 1024, rollback=False)
    step.prefill(ids_1T)
    token = ids_1T[:, :1].clone()

    def run() -> None:
        for _ in range(tokens):
            step.step(token)

    return run


def train_run(model: Any, ids_1T: Tensor) -> Callable[[], Any]:
    """Forward and backward through all weights, activations computed again in the backward pass."""

    def run() -> None:
        logits = model(ids_1T[:, :-1], use_cache=False, logits_to_keep=min(LOSS_TOKENS, ids_1T.shape[1] - 1)).logits
        targets = ids_1T[0, -logits.shape[1] :]
        torch.nn.functional.cross_entropy(logits[0].float(), targets).backward()
        model.zero_grad(set_to_none=True)

    return run


def side_by_side(clock: Clock, models: dict[str, Any], context: int, chosen: Any) -> Iterator[dict[str, Any]]:
    """A row for prefill, decode and training at one length: milliseconds, tokens per second, the student's speed-up."""
    vocab = chosen.vocab
    generator = torch.Generator(clock.device).manual_seed(SEED + context)
    ids = torch.randint(vocab, (1, context), generator=generator, device=clock.device)
    tokens = 2 if chosen.interpret else STEPS
    kinds: dict[str, tuple[int, Callable[[Any], Callable[[], Any]]]] = {
        "prefill": (context, partial(prefill_run, ids_1T=ids)),
        "decode": (tokens, partial(decode_run, ids_1T=ids, tokens=tokens)),
        "training step": (context, partial(train_run, ids_1T=ids)),
    }
    for kind, (counted, make) in kinds.items():
        learns = kind == "training step"
        with torch.set_grad_enabled(learns):
            for model in models.values():
                prepared(model, learns)
            runs = {name: _made_once(partial(make, model)) for name, model in models.items()}
            times = clock.interleaved(runs, chosen.repeats, warmup=2)
        speed = {name: counted / x.seconds for name, x in times.items() if isinstance(x, Timing)}
        row = {"what": kind, "context": context, "milliseconds": timings_json(times), "tokens_per_second": speed}
        del runs
        free(clock.device)
        yield row | {"speedup": ratio(times, "teacher", "student")}


def prepared(model: Any, learns: bool) -> None:
    """For training or for inference; gradient checkpointing only where a backward pass comes."""
    model.train(learns)
    model.requires_grad_(learns)
    base = getattr(model, "lm", model)
    if learns:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    elif base.is_gradient_checkpointing:
        base.gradient_checkpointing_disable()


def _made_once(make: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
    """A run that is set up at its first call: a failure there is reported like any failure of a run."""
    made: list[Callable[[], Any]] = []

    def run() -> Any:
        if not made:
            made.append(make())
        return made[0]()

    return run


def largest(model: PreTrainedModel, name: str, chosen: Any, device: torch.device) -> dict[str, Any]:
    """Largest batch and tokens per second in the device's memory, `benchmarks.generation`."""
    budget = chosen.budget_bytes or int(0.95 * torch.cuda.get_device_properties(device).total_memory)
    span = 4 if chosen.interpret else STEPS
    workload = GenerationWorkload(
        generated=chosen.generated, fills=tuple(chosen.fills), span=span, budget=budget, most=chosen.most
    )
    prepared(model, False)
    row = throughput(model, workload, name=name)
    row.pop("ways", None)
    free(device)
    return {"what": "largest batch", **row}


def free(device: torch.device) -> None:
    """Give back what nobody holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(clock: Clock, chosen: Any, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """All rows, each as soon as it is measured."""
    teacher = random_teacher(chosen, clock.device, dtype)
    alone = [largest(teacher, "teacher", chosen, clock.device)] if chosen.generated else []
    yield from alone
    student = LinearizedForCausalLM.from_teacher(teacher, plan_of(chosen.student, chosen.layers))
    for context in chosen.context:
        yield from side_by_side(clock, {"teacher": teacher, "student": student}, context, chosen)
    if not alone:
        return
    del teacher  # its weights are the student's; its caches are gone
    alone.append(largest(student, chosen.student, chosen, clock.device))
    yield alone[-1]
    pairs = {key: [row.get(key) for row in alone] for key in ("tokens_per_second", "batch")}
    times = {f"{key}_ratio": new / old for key, (old, new) in pairs.items() if old and new}
    yield {"what": "largest batch, student over teacher", **times}


def main(argv: Sequence[str] | None = None) -> None:
    """Run and publish; says so in one line where there is no GPU."""
    options = parser(__doc__)
    options.set_defaults(repeats=5)
    options.add_argument("--student", default="lolcats", help="mixer or mixer@share-of-softmax-layers")
    options.add_argument("--context", type=int, nargs="*", default=[1024, 4096, 8192, 16384, 32768])
    options.add_argument("--hidden", type=int, default=4096)
    options.add_argument("--mlp", type=int, default=14336)
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--heads", type=int, default=32)
    options.add_argument("--kv-heads", type=int, default=8)
    options.add_argument("--vocab", type=int, default=128256)
    options.add_argument("--generated", type=int, default=4096, help="tokens that rows write; 0: no largest batch")
    options.add_argument("--fills", type=int, nargs="+", default=[256, 2048, 4096], help="where steps are timed")
    options.add_argument("--most", type=int, default=4096, help="the most rows to try")
    options.add_argument("--budget-bytes", type=int, help="default: 95%% of the device's memory")
    chosen = arguments(options, argv, SMALL)
    device = device_for(chosen, "benchmarks.model_gpu", argv)
    if device is None:
        return
    dtype = torch.float32 if chosen.interpret else torch.bfloat16
    setting = {key: value for key, value in vars(chosen).items() if key != "out"}
    setting |= {"dtype": str(dtype), "steps": STEPS, "loss_tokens": LOSS_TOKENS, **facts(device)}
    asked = "3 times the teacher's throughput and 64 times its batch at 4096 tokens"
    publish_each(asked, setting, measure(Clock(device), chosen, dtype), chosen.out)


if __name__ == "__main__":
    main()

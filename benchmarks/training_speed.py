"""Tokens per second of a recipe's stages against the least work that they ask for, and where the rest of the time goes.

The least work: products of the teacher's pass (without the head in a stage that needs no logits), of the student's
forward pass and of the gradients of what lies above a trained parameter, softmax attention's triangle, and three times
a mixer's decoding (forward, and gradients of both factors). The peak: the best square product of the same run.

    python -m benchmarks.training_speed --teacher DIR --out benchmarks/training_speed.json
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedModel

import linearize
from benchmarks.peak import matmul_peak
from benchmarks.timing import SEED, parser, publish
from linearize.mixers import LayerMixer
from linearize.modeling import LinearizedForCausalLM
from linearize.training.config import Batch
from linearize.training.step import Stepper

PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
KINDS = {
    "softmax attention": {
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    },
    "copies and casts": {"aten::copy_", "aten::cat", "aten::_to_copy", "aten::clone", "aten::fill_", "aten::zero_"},
    "softmax over the vocabulary or features": {
        "aten::_softmax", "aten::_log_softmax", "aten::exp", "aten::exp_", "aten::exp2",
        "aten::_softmax_backward_data", "aten::_log_softmax_backward_data",
    },
    "views": {"aten::as_strided", "aten::slice", "aten::view", "aten::select", "aten::unbind", "aten::transpose",
              "aten::flatten", "aten::narrow", "aten::expand", "aten::reshape", "aten::unflatten", "aten::t"},
}  # fmt: skip


def linear_flops(modules: Iterable[nn.Module]) -> int:
    """Of one token through all linear layers among these modules, adapters left out."""
    layers = {id(m): m for m in modules if isinstance(m, nn.Linear) and m.out_features > 1}
    return sum(2 * layer.weight.numel() for layer in layers.values())


def least_flops(teacher: Any, student: LinearizedForCausalLM, tokens: int, *, logits: bool) -> float:
    """Of a step over one row. `logits`: the stage compares distributions and trains in all layers; else attention
    outputs, with the teacher's hidden states alone."""
    head = linear_flops([teacher.get_output_embeddings()])
    blocks = linear_flops(teacher.modules()) - head
    attention, mixers = 0.0, 0.0
    for mixer in student.mixers().values():
        shape: Any = mixer.shape
        assert not isinstance(mixer, LayerMixer), "mixers in the place of the whole module have products of their own"
        attention += 2 * shape.num_heads * (shape.head_dim + shape.value_dim) * (tokens + 1) / 2
        mixers += 3 * mixer.cost(4).flops_per_token
    passes = 3 if logits else 1  # teacher, student, gradients of its hidden states
    return tokens * (passes * blocks + (3 * head if logits else 0) + attention + mixers)


def batch_of(vocabulary: int, rows: int, tokens: int) -> Batch:
    """Random text."""
    ids = torch.randint(3, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(SEED))
    return {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(tokens).repeat(rows, 1)}


def shares(step: Any) -> dict[str, float]:
    """Shares of the time of one step by kind of operation; `Python` is what no operation accounts for."""
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    wall = time.perf_counter() - began
    seconds: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        own = event.self_cpu_time_total / 1e6
        if not event.key.startswith("aten::"):
            continue
        known = (kind for kind, names in KINDS.items() if event.key in names)
        kind = {"aten::mm": "products of linear layers", "aten::addmm": "products of linear layers"}.get(event.key)
        seconds[kind or ("products of mixers" if event.key in PRODUCTS else next(known, "elementwise and sums"))] += own
    seconds["Python"] = max(0.0, wall - sum(seconds.values()))
    total = sum(seconds.values())
    return {kind: round(value / total, 3) for kind, value in sorted(seconds.items(), key=lambda item: -item[1])}


def measure(teacher: PreTrainedModel, recipe: str, number: int, precision: str, chosen: Any) -> dict[str, Any]:
    """One row: a stage at one precision."""
    loaded: Any = linearize.load_recipe(recipe)
    stage = loaded.stages[number].model_copy(update={"batch": chosen.rows, "precision": precision})
    teacher.requires_grad_(False)
    student = LinearizedForCausalLM.from_teacher(teacher, [loaded.plan.mixer] * teacher.config.num_hidden_layers)
    run, batch = stage.build(student, teacher), batch_of(teacher.config.vocab_size, chosen.rows, chosen.tokens)
    if hasattr(run, "calibrate"):
        run.calibrate(batch)
    least = chosen.rows * least_flops(teacher, student, chosen.tokens, logits=stage.name != "attention_transfer")
    stepper, count = Stepper(run, stage, alone=True), iter(range(10**6))

    def step() -> None:
        stepper.step(batch, number=next(count), lr=1e-4)

    step()
    times = []
    for _ in range(chosen.repeats):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    peak = matmul_peak(torch.bfloat16 if precision == "bf16" else torch.float32)
    best, where = min(times), shares(step)
    run.finish()
    return {
        "recipe": recipe, "stage": stage.name, "precision": precision,
        "tokens_per_second": chosen.rows * chosen.tokens / best,
        "seconds": [min(times), max(times)], "least_gflop": least / 1e9, "peak_gflops": peak,
        "share_of_peak": least / 1e9 / best / peak, "shares_of_time": where,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and publish."""
    options = parser(__doc__)
    options.set_defaults(repeats=3)
    options.add_argument("--teacher", required=True, help="folder of the teacher")
    options.add_argument("--recipe", nargs="+", default=["window-linear"])
    options.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    options.add_argument("--tokens", type=int, default=2048)
    options.add_argument("--rows", type=int, default=1)
    chosen = options.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    torch.set_flush_denormal(True)
    rows = []
    for recipe in chosen.recipe:
        for number in range(len(linearize.load_recipe(recipe).stages)):
            for precision in chosen.precision:
                teacher = AutoModelForCausalLM.from_pretrained(chosen.teacher, dtype=torch.float32).eval()
                rows.append(measure(teacher, recipe, number, precision, chosen))
    setting = {key: str(value) for key, value in vars(chosen).items() if key != "out"}
    publish("60% of the matmul peak in attention transfer, 50% in LoRA with KL", setting, rows, chosen.out)


if __name__ == "__main__":
    main()

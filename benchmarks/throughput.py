"""Tokens per second of whole models that write long texts, each at the largest batch in one memory: students, teacher.

The memory holds weights, caches and a step's activations. The teacher runs in its best way (preallocated or growing
cache, eager or fused attention). A student is named by its mixer, and `mixer@share` where a share of the layers, evenly
spread, keeps softmax attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.generation import GenerationWorkload, throughput
from benchmarks.op_speed import OURS
from benchmarks.timing import parser, publish, random_llama
from linearize.errors import InputError, unknown
from linearize.mixers import MIXERS, MixerConfig
from linearize.modeling import LinearizedForCausalLM
from linearize.numbers import parse_size, size_text

STUDENTS = ("lolcats", "window-linear", "mamba2@0.5", "gated_delta_net@0.25")


def plan_of(student: str, layers: int) -> list[MixerConfig | None]:
    """The plan of `mixer` or `mixer@share`, the share of layers that keep softmax attention.

    Raises:
        InputError: a mixer that is not known, or a share out of range.
    """
    name, _, share = student.partition("@")
    if name not in OURS and name not in MIXERS:
        raise unknown("mixer", name, [*MIXERS, *OURS])
    try:
        kept = round(float(share or 0) * layers)
    except ValueError:
        kept = -1
    if not 0 <= kept < layers:
        raise InputError(f"{student}: the share of layers that keep softmax attention is from 0 to less than 1")
    keeping = {(2 * index + 1) * layers // (2 * kept) for index in range(kept)}
    mixer = MIXERS["lolcats"](**OURS[name]) if name in OURS else MIXERS[name]()
    return [None if layer in keeping else mixer for layer in range(layers)]


def compare(
    teacher: PreTrainedModel, students: Mapping[str, Sequence[MixerConfig | None]], workload: GenerationWorkload
) -> list[dict[str, Any]]:
    """The teacher's row first, then the students' with `speedup` (`_cpu`): tokens per second over the teacher's.

    A student is made from the teacher's own weights and let go before the next one.
    """
    rows = [throughput(teacher, workload, name="teacher")]
    for name, plan in students.items():
        student = LinearizedForCausalLM.from_teacher(teacher, plan).eval()
        row = throughput(student, workload, name=name)
        row["kept_layers"] = [layer for layer, mixer in enumerate(plan) if mixer is None]
        for kind in ("", "_cpu"):
            own, other = row.get(f"tokens_per_second{kind}"), rows[0].get(f"tokens_per_second{kind}")
            row[f"speedup{kind}"] = own / other if own and other else None
        rows.append(row)
        del student
        if teacher.device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def summary(rows: Sequence[Mapping[str, Any]], workload: GenerationWorkload) -> str:
    """One line for people."""
    parts = []
    for row in rows:
        speed = row.get("tokens_per_second")
        if speed is None:
            parts.append(f"{row['model']}: {row['reason']}")
            continue
        times = f", {row['speedup']:.1f}x" if row.get("speedup") else ""
        parts.append(f"{row['model']} {speed:.0f} tokens/s (batch {row['batch']}{times})")
    return f"{workload.generated} tokens in {size_text(workload.budget)}: " + "; ".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and publish."""
    usual = GenerationWorkload()
    options = parser(__doc__)
    options.set_defaults(repeats=usual.span)  # steps timed at each fill
    options.add_argument("--generated", type=int, default=usual.generated, help="tokens that each row writes")
    options.add_argument(
        "--fills", type=int, nargs="+", default=list(usual.fills), help="where --repeats steps are timed"
    )
    options.add_argument("--budget", default="2GB", help="memory of weights, caches and activations")
    options.add_argument("--most", type=int, default=usual.most, help="the most rows to try")
    options.add_argument("--student", nargs="*", default=list(STUDENTS), help="mixer or mixer@share-of-softmax-layers")
    options.add_argument("--hidden", type=int, default=768)
    options.add_argument("--layers", type=int, default=12)
    options.add_argument("--heads", type=int, default=12)
    options.add_argument("--kv-heads", type=int, default=12)
    options.add_argument("--head-dim", type=int, help="default: hidden / heads")
    options.add_argument("--vocab", type=int, default=16384)
    options.add_argument("--device", default="cpu")
    options.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    chosen = options.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    torch.set_flush_denormal(True)
    workload = GenerationWorkload(
        generated=chosen.generated,
        fills=tuple(chosen.fills),
        span=chosen.repeats,
        budget=parse_size(chosen.budget),
        most=chosen.most,
    )
    plans = {name: plan_of(name, chosen.layers) for name in chosen.student}
    size = {name: getattr(chosen, name) for name in ("hidden", "layers", "heads", "kv_heads", "head_dim", "vocab")}
    teacher: Any = random_llama(**size, context=chosen.generated + 2)
    rows = compare(teacher.to(device=chosen.device, dtype=getattr(torch, chosen.dtype)), plans, workload)
    setting = {
        "device": chosen.device,
        "dtype": chosen.dtype,
        "threads": chosen.threads,
        "parameters": sum(parameter.numel() for parameter in teacher.parameters()),
        "model": size,
        "mixers": {name: OURS[name] for name in chosen.student if name in OURS},
        "writing": {**vars(workload), "fills_measured": workload.stops},
    }
    asked = "whole-model throughput of the student at least 3 times the teacher's, aim 10 times"
    publish(asked, setting, rows, chosen.out, line=summary(rows, workload))


if __name__ == "__main__":
    main()

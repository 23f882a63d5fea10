"""Times of one version of the package, so that two versions can be compared in turn. Prints one JSON object.

    for i in 1 2 3 4; do for tree in BEFORE AFTER; do PYTHONPATH=$tree/src python benchmarks/paired_versions.py \\
        --teacher DIR --data FILE; done; done

Seconds of processor time on one thread: forward and backward over 1024 tokens, 64 tokens generated after 256, and a
thousand tokens of each stage of a conversion. Uses nothing but what every version of the package has.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import linearize
from linearize.mixers import MIXERS
from linearize.modeling import LinearizedForCausalLM

SHAPE = LlamaConfig(
    vocab_size=512, hidden_size=576, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=9,
    num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
)  # fmt: skip
REPEATS = 5


def clock(work: Callable[[], object]) -> float:
    """Median processor time of `REPEATS` calls after one that does not count."""
    work()
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return median(times)


def student_times(name: str) -> dict[str, float]:
    """Training and generation of a random student with this mixer in all layers."""
    teacher = LlamaForCausalLM(SHAPE).eval().requires_grad_(False)
    student = LinearizedForCausalLM.from_teacher(teacher, [MIXERS[name]()] * SHAPE.num_hidden_layers)
    for parameter in student.mixer_parameters().values():
        parameter.requires_grad_(True)
    ids = torch.randint(3, SHAPE.vocab_size, (1, 1024))

    def step() -> None:
        student(input_ids=ids, use_cache=False).logits.sum().backward()
        for parameter in student.parameters():
            parameter.grad = None

    times = {f"{name}: forward and backward, 1024 tokens": clock(step)}
    generate: Any = student.eval().generate
    generation = student.generation_config
    generation.eos_token_id, generation.pad_token_id = None, 0
    prompt, mask = ids[:, :256], torch.ones(1, 256, dtype=torch.long)
    with torch.no_grad():
        times[f"{name}: 64 tokens after 256"] = clock(
            lambda: generate(prompt, attention_mask=mask, max_new_tokens=64, do_sample=False)
        )
    return times


def conversion_times(teacher: str, data: str) -> dict[str, float]:
    """Seconds of a thousand tokens of each stage of the default recipe."""
    stage = {"tokens": 20480, "batch": 4}
    overrides = {f"stages.{number}.{key}": value for number in (0, 1) for key, value in stage.items()}
    overrides |= {"data.length": 256, "data.max_heldout_tokens": 8192}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "student"
        linearize.convert(teacher, recipe="window-linear", data=[data], out=out, overrides=overrides)
        report = json.loads((out / "report.json").read_text("utf-8"))
    return {f"convert: {stage['name']}": 1000 * stage["seconds"] / stage["tokens"] for stage in report["stages"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    times: dict[str, float] = {}
    for name in ("lolcats", "mamba2", "gated_delta_net"):
        times |= student_times(name)
    print(json.dumps(times | conversion_times(options.teacher, options.data)))


if __name__ == "__main__":
    main()

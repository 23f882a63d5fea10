"""What the benchmarks share: interleaved timing, a random Llama of a given size, and one JSON file with provenance."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from linearize.evaluation.report import provenance
from linearize.files import atomic_write_text

SEED = 0


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one thing that was timed several times: median, lowest and highest, of the wall clock; and the median
    of the processor time, which other programs on the machine disturb less."""

    seconds: float
    lowest: float
    highest: float
    cpu_seconds: float


def interleaved(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Timing]:
    """Time all runs in turn, `repeats` times round after one untimed round, so that disturbances hit all alike."""
    for run in runs.values():
        run()
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            began, began_cpu = time.perf_counter(), time.process_time()
            run()
            wall[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - began_cpu)
    return {
        name: Timing(
            seconds=statistics.median(times),
            lowest=min(times),
            highest=max(times),
            cpu_seconds=statistics.median(cpu[name]),
        )
        for name, times in wall.items()
    }


def random_llama(
    *, hidden: int, layers: int, heads: int, kv_heads: int, context: int, vocab: int, head_dim: int | None = None
) -> PreTrainedModel:
    """A Llama with random weights, fp32, MLP width 8/3 of the hidden size rounded up to 64, tied embeddings.

    `head_dim`: None is hidden / heads.
    """
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=-(-hidden * 8 // 3 // 64) * 64,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim or hidden // heads,
            max_position_embeddings=context,
            vocab_size=vocab,
            tie_word_embeddings=True,
        )
    ).eval()


def parser(what: str | None) -> argparse.ArgumentParser:
    """Options that all benchmarks have."""
    made = argparse.ArgumentParser(description=(what or "").splitlines()[0])
    made.add_argument("--out", type=Path, help="JSON file to write; the result is printed in any case")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads that torch uses")
    made.add_argument("--repeats", type=int, default=5)
    return made


def publish(asked: str, setting: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], out: Path | None) -> None:
    """Print the result, and write it where asked: what was asked, the setting, the rows, the birth certificate."""
    document = {"asked": asked, "setting": dict(setting), "rows": list(rows), "provenance": provenance(seed=SEED)}
    text = json.dumps(document, indent=2) + "\n"
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(out, text)

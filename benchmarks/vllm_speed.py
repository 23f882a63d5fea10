"""Tokens per second of students and teachers in vLLM, at several numbers of sequences; run by a Python that has it.

    python -m benchmarks.vllm_speed MODEL [MODEL ...] --batch 1,8 --prompt 64 --new 64 --out vllm_speed.json

Each model is loaded in a process of its own. Decoding is timed from the first token to the last: a run of `new` tokens
less one of a single token, of the same prompts (random tokens), the median of `--repeat` such pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch

from linearize.metrics.report import provenance


def measure(model: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second by number of sequences, and bytes that a sequence keeps in converted layers."""
    import vllm

    most = max(chosen.batch)
    llm = vllm.LLM(
        model,
        dtype=chosen.dtype,
        skip_tokenizer_init=True,
        enforce_eager=chosen.eager,
        max_model_len=chosen.prompt + chosen.new,
        max_num_seqs=most,
        enable_prefix_caching=False,
    )
    words = min(llm.llm_engine.model_config.get_vocab_size(), 10**6)
    prompts = torch.randint(3, words, (most, chosen.prompt), generator=torch.Generator().manual_seed(0)).tolist()

    def seconds(rows: int, new: int) -> float:
        params = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": ids} for ids in prompts[:rows]], params, use_tqdm=False)
        return time.perf_counter() - start

    results: dict[str, Any] = {"vllm": vllm.__version__, "decode": {}, "prefill": {}}
    for rows in chosen.batch:
        seconds(rows, 2)
        first = [seconds(rows, 1) for _ in range(chosen.repeat)]
        whole = [seconds(rows, chosen.new) for _ in range(chosen.repeat)]
        spans = [more - less for more, less in zip(whole, first, strict=True)]
        results["decode"][rows] = rows * (chosen.new - 1) / statistics.median(spans)
        results["prefill"][rows] = rows * chosen.prompt / statistics.median(first)
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    results["state_bytes"] = sum(getattr(layer, "page_bytes", 0) for layer in layers)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; with one model and no `--out`, in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--batch", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens written after each")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args(argv)
    if len(chosen.models) == 1 and chosen.out is None:
        print(json.dumps(measure(chosen.models[0], chosen)))
        return 0
    options = [f"--{name}={getattr(chosen, name)}" for name in ("prompt", "new", "repeat", "dtype")]
    options += [f"--batch={','.join(map(str, chosen.batch))}", "--eager" if chosen.eager else "--no-eager"]
    results: dict[str, Any] = {
        "models": {},
        "provenance": provenance(["benchmarks.vllm_speed", *chosen.models, *options], seed=0),
    }
    for model in chosen.models:
        command = [sys.executable, "-m", "benchmarks.vllm_speed", model, *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results["models"][Path(model).name] = numbers = json.loads(done.stdout.strip().splitlines()[-1])
        print(Path(model).name, json.dumps(numbers))
    if chosen.out is not None:
        chosen.out.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

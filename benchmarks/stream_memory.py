"""Peak memory of a streamed conversion: a teacher larger than its bound, and the same blocks in models of any depth.

    python -m benchmarks.stream_memory --folder SCRATCH --out benchmarks/stream_memory.json

Random Llamas of 12, 24 and 48 layers are written, and converted by `linearize convert --stream` with one layer a block,
each in a process of its own. Where control groups of version 1 can be made, the process and its page cache live in one
of `--limit` bytes; elsewhere `RLIMIT_DATA` bounds what the process allocates. `peak_rss` is the process's own peak
(VmHWM), `anonymous` what it holds beyond file pages.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from linearize.metrics.report import provenance
from linearize.modeling.io.weight_files import ShardedWriter
from linearize.storage.atomic import atomic_write_text

CGROUP = Path("/sys/fs/cgroup/memory")
SHAPE = {"hidden_size": 1536, "intermediate_size": 3072, "num_attention_heads": 12, "num_key_value_heads": 6}
VOCABULARY = 259


def write_teacher(folder: Path, layers: int, *, dtype: torch.dtype = torch.float32, **shape: int) -> int:
    """A random Llama with a tokenizer of bytes, written tensor by tensor; returns the bytes of its weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write_tokenizer(folder)
    sizes: dict[str, Any] = {**SHAPE, **shape}
    config = LlamaConfig(
        num_hidden_layers=layers, vocab_size=VOCABULARY, max_position_embeddings=512, bos_token_id=256,
        eos_token_id=257, tie_word_embeddings=False, dtype=dtype, **sizes,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    entries = {name: (dtype, tuple(p.shape)) for name, p in model.named_parameters()}
    writer, generator = ShardedWriter(folder, entries, 300_000_000), torch.Generator().manual_seed(0)
    drawn: dict[tuple[int, ...], torch.Tensor] = {}  # one for each shape: layers are alike, which memory does not see
    for name, (_, size) in entries.items():
        if size not in drawn:
            scale = size[-1] ** -0.5
            drawn[size] = torch.ones(size) if len(size) == 1 else torch.randn(size, generator=generator) * scale
        writer.write(name, drawn[size])
    writer.close()
    return sum(torch.Size(size).numel() * dtype.itemsize for _, size in entries.values())


def _write_tokenizer(folder: Path) -> None:
    """One token per byte, and begin, end and padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    tokenizer.add_special_tokens(special)
    names = dict(zip(("bos_token", "eos_token", "pad_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def command(teacher: Path, text: Path, out: Path, *, tokens: int, length: int, block: int) -> list[str]:
    """`linearize convert --stream` with few tokens."""
    settings = {
        "data.length": length, "data.max_heldout_tokens": 2 * length, "stages.0.block": block,
        "stages.0.tokens": tokens, "stages.0.batch": 2, "stages.0.micro_batch": 1, "stages.0.evaluate_every": 0.5,
        "stages.0.precision": "fp32", "stages.1.tokens": 0, "plan.mixer.feature_dim": 32, "plan.mixer.window": 16,
    }  # fmt: skip
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    base = [sys.executable, "-m", "linearize", "convert", str(teacher), "--data", str(text), "--out", str(out)]
    return [*base, "--stream", "--overwrite", "--device", "cpu", *sets]


def run_bounded(arguments: Sequence[str], limit: int | None) -> dict[str, Any]:
    """Run a command under a bound; its peaks in bytes, and the kind of bound."""
    group = _make_group(limit) if limit else None
    bound = None if limit is None else f"cgroup v1, {limit} bytes" if group else f"RLIMIT_DATA, {limit} bytes"

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))
        elif limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "MPLBACKEND": "Agg"}
    begun = time.monotonic()
    process = subprocess.Popen(
        arguments, env=environment, preexec_fn=enter, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    output, _ = process.communicate()
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = round(time.monotonic() - begun, 1)
    results: dict[str, Any] = {"exit": process.returncode, "seconds": seconds, "bound": bound}
    results["peak_rss_of_all_children"] = usage.ru_maxrss * 1024
    if group is not None:
        results["cgroup_peak"] = int((group / "memory.max_usage_in_bytes").read_text())
        results["cgroup_failures"] = int((group / "memory.failcnt").read_text())
        group.rmdir()
    if process.returncode != 0:
        results["output"] = output[-2000:]
    return results


def _make_group(limit: int) -> Path | None:
    """A control group of this size, None where none can be made."""
    group = CGROUP / f"linearize-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
    except OSError:
        return None
    return group


def measure(folder: Path, layers: int, limit: int, *, tokens: int, length: int, block: int) -> dict[str, Any]:
    """One teacher of random weights: written, converted under the bound in a fresh process, removed."""
    teacher, text, out = folder / "teacher", folder / "text.txt", folder / "student"
    size = write_teacher(teacher, layers)
    text.write_text("\n\n".join(f"Document {i}: " + "the quick brown fox. " * (3 + i % 7) for i in range(120)))
    arguments = command(teacher, text, out, tokens=tokens, length=length, block=block)
    probe = [sys.executable, "-m", "benchmarks.stream_memory", "--run", json.dumps(arguments)]
    done = subprocess.run([*probe, "--limit", str(limit)], capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result["peak_rss"] = result.pop("peak_rss_of_all_children")
    result |= {"layers": layers, "weights_bytes": size, "block": block}
    if (out / "report.json").is_file():
        report = json.loads((out / "report.json").read_text())
        result |= {key: report[key] for key in ("teacher_loss", "swap_loss", "student_loss")}
        result["student_bytes"] = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    for path in (teacher, out):
        shutil.rmtree(path, ignore_errors=True)
    return result


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 24, 48])
    parser.add_argument("--limit", type=int, default=10**9)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--block", type=int, default=1)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run_bounded(json.loads(options.run), options.limit)))
        return
    if options.folder is None or options.out is None:
        parser.error("--folder and --out are needed")
    options.folder.mkdir(parents=True, exist_ok=True)
    sizes = {"tokens": options.tokens, "length": options.length, "block": options.block}
    results: list[dict[str, Any]] = []
    for layers in options.layers:
        results.append(measure(options.folder, layers, options.limit, **sizes))
        peaks = [each["peak_rss"] for each in results]
        result = {
            "limit_bytes": options.limit, **sizes, "runs": results,
            "largest_over_smallest_peak": round(max(peaks) / min(peaks), 4), "provenance": provenance(),
        }  # fmt: skip
        atomic_write_text(options.out, json.dumps(result, indent=2) + "\n")
        print(json.dumps(results[-1], indent=2), flush=True)


if __name__ == "__main__":
    main()

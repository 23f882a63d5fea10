"""Tokens per second of students and teachers in the same vLLM, by number of sequences and context; run by a Python that
has vLLM.

    python -m benchmarks.vllm_speed run MODEL [MODEL ...] --sequences 1,8,32 --context 256,2048,8192 --out FILE
    python -m benchmarks.vllm_speed page FILE      # the table of docs/vllm.md

Decoding alone is timed: a run of `--new` tokens and one less a run of a single one, of the same prompts, each the
median of `--repeat`. All sequences of a case share the beginning of their text, which vLLM's prefix cache holds, and
end in 16 tokens of their own. That favours models with a cache: 32 sequences of 8k tokens read one and the same memory
(0.4 GB for SmolLM2-135M) where texts of their own would take 12 GB. Each model and context has a process of its own,
each case a time limit, and the file is written after each case.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch

from benchmarks.smollm2_page import table
from benchmarks.timing import SEED, publish_each
from linearize.errors import InputError
from linearize.storage.atomic import atomic_write_text

OWN = 16  # last tokens of each prompt, which no other has
PAGE = Path(__file__).parent.parent / "docs" / "vllm.md"
START, END = "<!-- speed: python -m benchmarks.vllm_speed page FILE -->", "<!-- end of speed -->"
LOADING = 300.0  # seconds that a model may take to load and to read the shared text


def measure(model: str, chosen: argparse.Namespace) -> None:
    """Print one JSON object for each number of sequences, of one model at one context."""
    import vllm

    (context,), most = chosen.context, max(chosen.sequences)
    llm = vllm.LLM(
        model,
        dtype=chosen.dtype,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=context + chosen.new + 1,
        max_num_seqs=most,
        enable_prefix_caching=True,
        block_size=chosen.block,
    )
    generator = torch.Generator().manual_seed(SEED)
    words = min(llm.llm_engine.model_config.get_vocab_size(), 10**6)
    shared = torch.randint(3, words, (context - OWN,), generator=generator).tolist()
    own = torch.randint(3, words, (most, OWN), generator=generator).tolist()

    def run(rows: int, new: int) -> tuple[float, int]:
        """Seconds, and tokens that were in the prefix cache."""
        params = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": [*shared, *ids]} for ids in own[:rows]]
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start, sum(output.num_cached_tokens or 0 for output in outputs)

    prefill = context / run(1, 1)[0]
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    common = {
        "vllm": vllm.__version__,
        "state_bytes": sum(getattr(layer, "page_bytes", 0) for layer in layers),
        "prefill_tokens_per_second": round(prefill, 1),
    }
    for rows in chosen.sequences:
        run(rows, 2)
        first = [run(rows, 1) for _ in range(chosen.repeat)]
        whole = [run(rows, chosen.new + 1) for _ in range(chosen.repeat)]
        spans = sorted(more - less for (more, _), (less, _) in zip(whole, first, strict=True))
        speeds = [rows * chosen.new / max(span, 1e-9) for span in reversed(spans)]
        numbers = {
            "sequences": rows,
            "decode_tokens_per_second": round(statistics.median(speeds), 2),
            "range": [round(speeds[0], 2), round(speeds[-1], 2)],
            "cached_share": round(first[-1][1] / (rows * context), 3),
        }
        print(json.dumps(common | numbers), flush=True)


def cases(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All cases, each as it ends; a case that takes too long ends its process, and with it those of more sequences."""
    for context in chosen.context:
        for model in chosen.models:
            name = {"model": Path(model).resolve().name, "context": context}
            options = [f"--{option}={getattr(chosen, option)}" for option in ("new", "repeat", "dtype", "block")]
            options += [f"--sequences={','.join(map(str, chosen.sequences))}", f"--context={context}"]
            command = [sys.executable, "-m", "benchmarks.vllm_speed", "one", model, *options]
            process = subprocess.Popen(command, stdout=subprocess.PIPE)
            try:
                left = list(chosen.sequences)
                for line in lines(process, LOADING + chosen.limit, chosen.limit):
                    row = json.loads(line) | name
                    left.remove(row["sequences"])
                    print(json.dumps(row), file=sys.stderr, flush=True)
                    yield row
                why = "stopped" if process.wait() else None
            except TimeoutError:
                why = f"no end within {chosen.limit:.0f} s"
            finally:
                process.kill()
                process.wait()
            for rows in left:
                yield name | {"sequences": rows, "error": why or "no result"}


def lines(process: subprocess.Popen[bytes], first: float, following: float) -> Iterator[str]:
    """Lines of JSON that a process prints.

    Raises:
        TimeoutError: the next one took longer than so many seconds.
    """
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    buffer, deadline = b"", time.monotonic() + first
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            part = process.stdout.read()
            if part == b"":
                return
            buffer += part or b""
            *whole, buffer = buffer.split(b"\n")
            for line in whole:
                if line.startswith(b"{"):
                    yield line.decode()
                    deadline = time.monotonic() + following


def page(file: Path) -> None:
    """Put the table of a result into docs/vllm.md."""
    document = json.loads(file.read_text("utf-8"))
    rows = document["rows"]
    sequences = sorted({row["sequences"] for row in rows})
    cells = {(row["model"], row["context"], row["sequences"]): row for row in rows}

    def cell(model: str, context: int, count: int) -> str:
        row = cells.get((model, context, count), {"error": "not run"})
        return row["error"] if "error" in row else f"{row['decode_tokens_per_second']:.1f}"

    body = [
        [f"{context:,}", model, *(cell(model, context, count) for count in sequences)]
        for context in sorted({row["context"] for row in rows})
        for model in dict.fromkeys(row["model"] for row in rows)
    ]
    born = document["provenance"]
    where = f"{born['hardware']['cpu']}, {born['hardware']['threads']} threads; `{file.name}`; `{born['command']}`"
    parts = [START, "", table(["context", "model", *(f"{n} sequences" for n in sequences)], body), "", where, "", END]
    text = PAGE.read_text("utf-8")
    if START not in text or END not in text:
        raise InputError(f"{PAGE} has no {START}: put it and {END} where the table belongs")
    atomic_write_text(PAGE, text.split(START)[0] + "\n".join(parts) + text.split(END)[1])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""

    def numbers(text: str) -> list[int]:
        return sorted(int(part) for part in text.split(","))

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, words in (("run", "measure"), ("one", "one model at one context, in this process")):
        options = verbs.add_parser(verb, help=words)
        options.add_argument("models", nargs="+", metavar="MODEL")
        options.add_argument("--sequences", type=numbers, default=[1, 8, 32])
        options.add_argument("--context", type=numbers, default=[256, 2048, 8192], help="tokens of each prompt")
        options.add_argument("--new", type=int, default=16, help="tokens that are timed")
        options.add_argument("--repeat", type=int, default=3)
        options.add_argument("--limit", type=float, default=240, help="seconds for each case")
        options.add_argument("--dtype", default="float32")
        options.add_argument("--block", type=int, default=32, help="tokens of a block of vLLM's cache")
        options.add_argument("--out", type=Path)
    verbs.add_parser("page", help="write the table into docs/vllm.md").add_argument("file", type=Path)
    chosen = parser.parse_args(argv)
    if chosen.verb == "page":
        page(chosen.file)
    elif chosen.verb == "one":
        measure(chosen.models[0], chosen)
    else:
        keys = ("new", "repeat", "dtype", "block", "limit")
        asked = "decoded tokens per second in one vLLM, teacher and student; all sequences share a cached prefix"
        publish_each(asked, {key: getattr(chosen, key) for key in keys}, cases(chosen), chosen.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

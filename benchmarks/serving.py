"""Measure `linearize serve` from outside: many clients against one, and the wait for a first token behind a history.

    python -m benchmarks.serving measure STUDENT --clients 4 --seconds 30 --history 20000 --out FILE
    python -m benchmarks.serving load STUDENT --clients 64 --seconds 120 --teacher TEACHER \\
        --against transformers vllm vllm-teacher --vllm-python PYTHON --out benchmarks/serving/load.json --page

Both start servers of their own. Tokens per second count the tokens of answers; memory is the processes'.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.serving_load import OTHERS, events, resident_mb, run
from linearize.metrics.report import provenance
from linearize.storage.atomic import atomic_write_text

WORDS = """
    the a river house light stone morning garden small old green walked found under over near quiet city window
    letter door road water night summer of and with without because then slowly again never always bright heavy
""".split()  # noqa: SIM905 (a list of words is longer)


def text(words: int, seed: int) -> str:
    """Random words."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


@contextmanager
def server(arguments: list[str]) -> Iterator[tuple[str, int]]:
    """A server at a free port: its address and process."""
    command = [sys.executable, "-m", "linearize", "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if " at http" in line:
                yield line.split(" at ")[1].split(";")[0], process.pid
                return
            print(line, end="", file=sys.stderr)
        raise SystemExit("the server did not start")
    finally:
        process.terminate()
        process.wait()


async def timed(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Stream one answer: its text, usage, and the seconds to the first token and to the end."""
    start, first, answer, usage = time.perf_counter(), None, "", None
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async for event in events(client, path, body):
        for choice in event["choices"]:
            part = choice.get("text") or choice.get("delta", {}).get("content") or ""
            if first is None and (part or choice["finish_reason"]):
                first = time.perf_counter() - start
            answer += part
        usage = event.get("usage") or usage
    assert usage is not None and first is not None
    return {"text": answer, "usage": usage, "first": first, "seconds": time.perf_counter() - start}


async def load(url: str, pid: int, args: argparse.Namespace, clients: int, seconds: float) -> dict[str, Any]:
    """So many clients, each with one request after the other, for so long."""
    tokens = requests = errors = 0
    firsts: list[float] = []
    begun, memory = time.perf_counter(), [resident_mb(pid)]

    async def one(number: int) -> None:
        nonlocal tokens, requests, errors
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            count = 0
            while time.perf_counter() - begun < seconds:
                count += 1
                prompt = text(args.prompt_words, 1000 * number + count)
                body = {"prompt": prompt, "max_tokens": args.new_tokens, "ignore_eos": True, "temperature": 0.7}
                try:
                    got = await timed(client, "/v1/completions", body)
                except (httpx.HTTPError, RuntimeError):
                    errors += 1
                    continue
                requests += 1
                tokens += got["usage"]["completion_tokens"]
                firsts.append(got["first"])
                memory.append(resident_mb(pid))

    await asyncio.gather(*map(one, range(clients)))
    taken = time.perf_counter() - begun
    return {
        "clients": clients,
        "seconds": round(taken, 1),
        "requests": requests,
        "errors": errors,
        "tokens_per_second": round(tokens / taken, 1),
        "first_token_seconds_median": round(sorted(firsts)[len(firsts) // 2], 3) if firsts else None,
        "memory_mb": {"start": round(memory[0]), "most": round(max(memory)), "end": round(resident_mb(pid))},
    }


async def history(url: str, tokens: int, turns: int) -> dict[str, Any]:
    """The first token's wait in turn 1 and in the last turn, whose messages have the same length, with a history of
    `tokens` before the last one; the turns between read the history."""
    messages: list[dict[str, str]] = []
    rows: list[dict[str, Any]] = []
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        for turn in range(1, turns + 1):
            left = tokens - (rows[-1]["prompt_tokens"] if rows else 0)
            words = 40 if turn in (1, turns) else max(10, round(0.9 * left / (turns - turn)))
            messages.append({"role": "user", "content": text(words, turn)})
            got = await timed(client, "/v1/chat/completions", {"messages": messages, "max_tokens": 8, "temperature": 0})
            messages.append({"role": "assistant", "content": got["text"]})
            prompt, resumed = got["usage"]["prompt_tokens"], got["usage"]["prompt_tokens_details"]["cached_tokens"]
            rows.append({"turn": turn, "prompt_tokens": prompt, "read_tokens": prompt - resumed, "first": got["first"]})
    first, last = rows[0], rows[-1]
    ratio = last["first"] / first["first"]
    return {"turns": rows, "last_over_first": round(ratio, 2), "history_tokens": rows[-2]["prompt_tokens"]}


async def measure(url: str, pid: int, args: argparse.Namespace) -> dict[str, Any]:
    """All of it."""
    await load(url, pid, args, 1, 0.01)  # warm up
    one = await load(url, pid, args, 1, args.seconds / 3)
    many = await load(url, pid, args, args.clients, args.seconds)
    speedup = round(many["tokens_per_second"] / one["tokens_per_second"], 2)
    return {
        "one_by_one": one,
        "together": many,
        "times_as_fast": speedup,
        "conversation": await history(url, args.history, args.turns),
    }


def conversation(args: argparse.Namespace) -> None:
    """The first measurement: print it and write it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as states:
        arguments = [args.model, "--slots", str(args.clients), "--state-dir", states]
        arguments += ["--context", str(2 * args.history + 1024)]
        arguments += ["--adapter", args.adapter] if args.adapter else []
        with server(arguments) as (url, pid):
            result = asyncio.run(measure(url, pid, args))
    document = {"model": args.adapter or args.model, **result, "provenance": provenance(seed=0)}
    print(json.dumps(document, indent=2))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(args.out, json.dumps(document, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one, many = verbs.add_parser("measure", help="one server"), verbs.add_parser("load", help="several servers")
    for options, clients, words, new in ((one, 8, 60, 64), (many, 64, 60, 32)):
        options.add_argument("model")
        options.add_argument("--adapter")
        options.add_argument("--clients", type=int, default=clients)
        options.add_argument("--seconds", type=float, default=30)
        options.add_argument("--prompt-words", type=int, default=words)
        options.add_argument("--new-tokens", type=int, default=new)
        options.add_argument("--out", type=Path)
    one.add_argument("--history", type=int, default=20_000, help="tokens before the last turn")
    one.add_argument("--turns", type=int, default=10)
    many.add_argument("--against", nargs="*", choices=OTHERS, default=[])
    many.add_argument("--teacher", help="what servers serve that do not know students")
    many.add_argument("--vllm-python", help="an interpreter that has vLLM and linearize")
    many.add_argument("--slots", type=int, help="answers that are decoded together; default: as many as clients")
    many.add_argument("--dtype", default="float32", help="of the other servers")
    many.add_argument("--page", action="store_true", help="put the table into docs/serve.md")
    args = parser.parse_args(argv)
    if args.verb == "measure":
        conversation(args)
        return
    if {"transformers", "vllm-teacher"} & set(args.against) and args.teacher is None:
        parser.error("--against transformers and vllm-teacher serve a teacher: give --teacher")
    if {"vllm", "vllm-teacher"} & set(args.against) and args.vllm_python is None:
        parser.error("--against vllm: give --vllm-python")
    args.words = WORDS
    run(args)


if __name__ == "__main__":
    main()

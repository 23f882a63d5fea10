"""Many clients at once against `linearize serve` and other servers, each for the same time: see `benchmarks.serving`.

Tokens are counted on the client's side, by the tokenizer, as they have arrived when time is up; answers that are still
being written then are cut off and are no errors. Memory is that of the server's processes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from pydantic import BaseModel

from benchmarks.smollm2_page import table
from linearize.metrics.report import provenance
from linearize.modeling.io.teacher import load_tokenizer
from linearize.storage.atomic import atomic_write_text

PAGE = Path(__file__).parent.parent / "docs" / "serve.md"
START, END = "<!-- load: python -m benchmarks.serving load -->", "<!-- end of load -->"
STARTING = 600.0  # seconds that a server may take to answer
OTHERS = ("transformers", "vllm", "vllm-teacher")


@dataclass(frozen=True, kw_only=True)
class Server:
    """How a server is started at a port. `extra`: what its requests have besides."""

    name: str
    model: str
    command: tuple[str, ...]
    extra: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


async def events(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The events of one streamed answer. Raises RuntimeError for an answer or an event that is an error."""
    async with client.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            raise RuntimeError((await response.aread()).decode())
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event: dict[str, Any] = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(str(event["error"]))
            yield event


class Load(BaseModel):
    """What one server did under so many clients. `memory_mb`: by seconds since the start. `error`: why it was not
    measured."""

    server: str
    model: str
    clients: int
    seconds: float = 0
    answers: int = 0
    errors: int = 0
    first_error: str | None = None
    tokens_per_second: float = 0
    first_token_median: float | None = None
    memory_mb: dict[str, int] = {}
    error: str | None = None

    @property
    def growth(self) -> float | None:
        """Of the memory, from a quarter of the time (when all clients are served) to the end, as a share."""
        marks = [self.memory_mb.get(key) for key in ("quarter", "end")]
        return None if not marks[0] or marks[1] is None else round(marks[1] / marks[0] - 1, 3)


def servers(args: argparse.Namespace, states: str) -> list[Server]:
    """`linearize serve`, and those that it is compared with."""
    own = ["--adapter", args.adapter] if args.adapter else []
    context = str(args.prompt_words * 4 + args.new_tokens + 64)
    ignore = {"ignore_eos": True}
    linearize = [
        sys.executable,
        "-m",
        "linearize",
        "serve",
        args.model,
        *own,
        "--slots",
        str(args.slots or args.clients),
    ]
    linearize += ["--context", context, "--state-dir", states, "--state-memory", "200MB", "--port", "{port}"]
    made = [Server(name="linearize", model=args.adapter or args.model, command=tuple(linearize), extra=ignore)]
    for name in args.against:
        model = args.model if name == "vllm" else args.teacher
        if name == "transformers":
            program = str(Path(sys.executable).parent / "transformers")
            command = [program, "serve", model, "--device", "cpu", "--dtype", args.dtype, "--port", "{port}"]
            made.append(Server(name="transformers serve", model=model, command=tuple(command)))
            continue
        command = [args.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", "{port}"]
        command += [
            "--dtype",
            args.dtype,
            "--max-model-len",
            context,
            "--max-num-seqs",
            str(args.slots or args.clients),
        ]
        kind = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
        made.append(Server(name="vllm", model=model, command=(*command, "--enforce-eager"), extra=ignore,
                           environment=kind))  # fmt: skip
    return made


@contextmanager
def running(server: Server, log: Path) -> Iterator[tuple[str, int]]:
    """A server at a free port: address and process, once it answers.

    Raises:
        RuntimeError: it stopped, or did not answer in time; with its last line.
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [part.format(port=port) for part in server.command]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | server.environment, start_new_session=True
        )
        try:
            begun = time.monotonic()
            while not _answers(url):
                if process.poll() is not None or time.monotonic() - begun > STARTING:
                    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
                    raise RuntimeError(f"did not start: {lines[-1][:200] if lines else process.returncode}")
                time.sleep(0.5)
            yield url, process.pid
        finally:
            with suppress(ProcessLookupError):  # all have ended
                os.killpg(process.pid, signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(30)
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def resident_mb(pid: int) -> int:
    """Memory of a process and of those that it started."""
    parents, sizes = dict[int, int](), dict[int, int]()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                lines = (entry / "status").read_text("ascii", "replace").splitlines()
            except OSError:
                continue
            fields = dict(line.split(":", 1) for line in lines if ":" in line)
            parents[int(entry.name)] = int(fields["PPid"])
            sizes[int(entry.name)] = int(fields.get("VmRSS", "0 kB").split()[0])
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return round(sum(sizes.get(one, 0) for one in family) / 1e3)


async def load(url: str, pid: int, server: Server, tokenizer: Any, args: argparse.Namespace, clients: int) -> Load:
    """So many clients, each with one request after the other, until time is up."""
    result = Load(server=server.name, model=Path(server.model).name, clients=clients)
    firsts: list[float] = []
    texts: list[str] = []
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        name = server.model
        if server.name != "transformers serve":  # which lists what is in the cache of the Hub
            name = (await client.get("/v1/models")).json()["data"][0]["id"]

        async def one(number: int) -> None:
            count = 0
            while True:
                count += 1
                words = random.Random(1000 * number + count).choices(args.words, k=args.prompt_words)
                body = {"model": name, "prompt": " ".join(words), "max_tokens": args.new_tokens, "temperature": 0.7}
                place = len(texts)
                texts.append("")
                try:
                    await answer(body | server.extra | {"stream": True}, place)
                    result.answers += 1
                except (httpx.HTTPError, RuntimeError, ValueError) as error:
                    result.errors += 1
                    result.first_error = result.first_error or f"{type(error).__name__}: {str(error)[:200]}"
                    await asyncio.sleep(0.1)

        async def answer(body: dict[str, Any], place: int) -> None:
            start, begun = time.perf_counter(), False
            async for event in events(client, "/v1/completions", body):
                for choice in event["choices"]:
                    part = choice.get("text") or ""
                    texts[place] += part
                    if part and not begun:
                        begun = True
                        firsts.append(time.perf_counter() - start)

        async def memory() -> None:
            result.memory_mb["start"] = resident_mb(pid)
            await asyncio.sleep(args.seconds / 4)
            result.memory_mb["quarter"] = resident_mb(pid)

        start = time.perf_counter()
        tasks = [asyncio.create_task(work) for work in (memory(), *map(one, range(clients)))]
        await asyncio.wait(tasks, timeout=args.seconds)
        result.seconds = round(time.perf_counter() - start, 1)
        result.memory_mb["end"] = resident_mb(pid)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts if text)
    result.tokens_per_second = round(tokens / result.seconds, 1)
    result.first_token_median = round(statistics.median(firsts), 3) if firsts else None
    return result


def run(args: argparse.Namespace) -> None:
    """All servers, one after the other; the file and the table have what was measured so far after each."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are stopped
    tokenizer, rows = load_tokenizer(args.model), list[Load]()
    with tempfile.TemporaryDirectory() as place:
        for server in servers(args, f"{place}/states"):
            counts = [1, args.clients] if server.name == "linearize" else [args.clients]
            try:
                with running(server, Path(place) / "log") as (url, pid):
                    asyncio.run(load(url, pid, server, tokenizer, argparse.Namespace(**vars(args) | {"seconds": 2}), 1))
                    for clients in counts:
                        rows.append(asyncio.run(load(url, pid, server, tokenizer, args, clients)))
                        print(rows[-1].model_dump_json(), flush=True)
            except (RuntimeError, OSError, httpx.HTTPError) as error:
                model = Path(server.model).name
                rows.append(Load(server=server.name, model=model, clients=args.clients, error=str(error)[:200]))
                print(rows[-1].model_dump_json(), flush=True)
            document: dict[str, Any] = {"rows": [row.model_dump() | {"growth": row.growth} for row in rows]}
            setting = {key: getattr(args, key) for key in ("seconds", "prompt_words", "new_tokens", "dtype")}
            document |= {"setting": setting, "provenance": provenance(seed=0)}
            if args.out is not None:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                atomic_write_text(args.out, json.dumps(document, indent=2) + "\n")
    if args.page:
        page(rows, document)


def page(rows: list[Load], document: dict[str, Any]) -> None:
    """Put the table into docs/serve.md."""
    lines = []
    for row in rows:
        if row.error is not None:
            lines.append([f"{row.server}, {row.model}", str(row.clients), row.error, "", "", "", ""])
            continue
        memory = ", ".join(str(row.memory_mb.get(key, "")) for key in ("start", "quarter", "end"))
        first = "" if row.first_token_median is None else f"{row.first_token_median:.2f} s"
        lines.append([
            f"{row.server}, {row.model}", str(row.clients), f"{row.tokens_per_second:.1f}", first, str(row.answers),
            str(row.errors), memory,
        ])  # fmt: skip
    born, setting = document["provenance"], document["setting"]
    words = (
        f"{setting['seconds']:.0f} s each, prompts of {setting['prompt_words']} words, {setting['new_tokens']} tokens "
        f"asked for; {born['hardware']['cpu']}, {born['hardware']['threads']} threads, shared with the clients; "
        f"`python -m {born['command'].replace('serving.py', 'benchmarks.serving')}`"
    )
    head = ["server", "clients", "tokens/s", "first token", "answers", "errors", "MB at start, a quarter, end"]
    text = PAGE.read_text("utf-8")
    middle = "\n".join([START, "", table(head, lines), "", words, "", END])
    atomic_write_text(PAGE, text.split(START)[0] + middle + text.split(END)[1])

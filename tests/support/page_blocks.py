"""The code of the documentation's pages: its blocks with their markers, and a way to run them.

A block is what a fence holds, or indented lines that begin with a command. The comment before it says what tests do:

    <!-- runs -->               it runs, in one folder and one namespace with the page's other blocks, in their order
    <!-- not run: REASON -->    it does not
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from task_files import DEFINITIONS

from linearize.cli.main import main
from linearize.recipes import load_recipe
from linearize.training.dataset_stage import DatasetStageConfig

CODE = ("python", "py", "bash", "sh", "console", "shell")
COMMAND = re.compile(r"^(?:linearize|pip|python3?|torchrun|vllm|lm_eval|mlx_lm\S*|curl|export|accelerate) ")
BENCHMARK = re.compile(r"^python -m (benchmarks\.\w+)|^python (scripts/\w+\.py)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"(?:^(?: {4}\S.*)\n)+", re.MULTILINE)
_MARKER = re.compile(r"<!-- (runs|not run: \S[^>]*) -->\s*$")

ELSEWHERE = {
    r"pip install": "the environment is installed already; scripts/fresh_user.py starts from an empty one",
    r"linearize demo": "some minutes; tests/test_demo.py runs it on little text",
    r"linearize eval .*--suite lolcats": "61 tasks; tests/test_tasks_section.py runs each kind on made-up files",
    r"linearize eval .*--tasks": "fetches tasks from the Hub; tests/test_own_tasks.py has a local one",
    r"python -m linearize\.lm_eval": "the same",
}
"""Commands that are left out of the blocks that run, and why; by a pattern of how they begin."""
SMALLER: dict[str, list[str]] = {
    "convert": ["--device", "cpu"],
    "generate": ["--max-new-tokens", "8"],
    "eval": ["--tokens", "3k"],
    "bench": ["--context", "32,64", "--batch", "1,2", "--new-tokens", "4", "--repeats", "1"],
}
"""Options that make a command small, after those of the page."""
SMALLER_MEMORY = "40M"  # in the place of what `bench --memory` names, which it fills


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "linearize"]
LM_EVAL = ["--include_path", str(DEFINITIONS), "--limit", "4"]  # local files in place of the Hub's


@dataclass(frozen=True)
class PageBlock:
    """`language` is empty for a fence that names none. `marker`: `runs`, `not run: REASON`, or empty."""

    page: Path
    line: int
    language: str
    code: str
    marker: str

    @property
    def is_code(self) -> bool:
        """Whether people copy it to run it: Python, or lines for a shell."""
        return self.language in CODE or (not self.language and bool(COMMAND.match(self.code)))

    @property
    def benchmarks(self) -> list[str]:
        """The modules and scripts of the repository, where each command is one of them; else empty."""
        matches = [BENCHMARK.match(line) for line in self.code.replace("\\\n", " ").splitlines()]
        return [match[1] or match[2] for match in matches if match] if all(matches) else []


def blocks_of(page: Path) -> list[PageBlock]:
    """The blocks of a page in order."""
    text = page.read_text("utf-8")
    places = [(match.start(), match[1], match[2]) for match in _FENCE.finditer(text)]
    outside = _FENCE.sub(lambda match: re.sub(r"[^\n]", "x", match[0]), text)
    for match in _INDENTED.finditer(outside):
        if text[: match.start()].endswith("\n\n"):
            places.append((match.start(), "", re.sub("^ {4}", "", match[0], flags=re.MULTILINE)))
    blocks = []
    for start, language, code in sorted(places):
        marker = _MARKER.search(text[:start])
        blocks.append(PageBlock(page, text.count("\n", 0, start) + 1, language, code, marker[1] if marker else ""))
    return blocks


@dataclass
class PageRun:
    """Runs the blocks of a page in the current folder.

    `namespace` is that of the Python blocks. `port` takes the place of 8000. `environment`: of programs that are not
    linearize.
    """

    namespace: dict[str, Any] = field(default_factory=dict)
    port: int = 8000
    environment: dict[str, str] | None = None
    _server: subprocess.Popen[str] | None = None

    def block(self, block: PageBlock) -> None:
        """Run one block; AssertionError where a command fails."""
        code = block.code.replace("127.0.0.1:8000", f"127.0.0.1:{self.port}")
        if block.language in ("python", "py"):
            exec(compile("\n" * block.line + code, str(block.page), "exec", dont_inherit=True), self.namespace)
            return
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and not any(re.match(pattern, line) for pattern in ELSEWHERE):
                self._command(line, words)

    def _command(self, line: str, words: list[str]) -> None:
        if words[:2] == ["linearize", "serve"]:
            self._serve(words[2:])
        elif words[0] == "linearize":
            run_verb(words[1:])
        elif words[0] == "torchrun":
            self._program(line, [*TORCHRUN, *small(words[words.index("convert") :]), *SMALLER["convert"]])
        else:
            self._program(line, [sys.executable, "-m", *words, *LM_EVAL] if words[0] == "lm_eval" else words)

    def _program(self, line: str, words: list[str]) -> None:
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout[-1000:]}{done.stderr[-2000:]}"

    def _serve(self, words: list[str]) -> None:
        """The page's first server stays for its requests; another one starts and ends."""
        server = started([*words, "--port", str(0 if self._server else self.port)])
        if self._server is None:
            self._server = server
        else:
            ended(server)

    def stop(self) -> None:
        """End the server, if one runs."""
        if self._server is not None:
            ended(self._server)
            self._server = None


def started(words: list[str]) -> subprocess.Popen[str]:
    """`linearize serve` with these arguments, once it has said where it is."""
    command = [sys.executable, "-m", "linearize", "serve", *words, "--slots", "2", "--device", "cpu"]
    server = subprocess.Popen([*command, "--state-dir", "states"], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    lines = list(itertools.takewhile(lambda line: " at http://127.0.0.1:" not in line, server.stderr))
    assert server.poll() is None, lines
    return server


def ended(server: subprocess.Popen[str]) -> None:
    """Ask a server to stop, which it does with exit code 0."""
    server.terminate()
    assert server.wait(30) == 0
    assert server.stderr is not None
    server.stderr.close()


@contextlib.contextmanager
def page_run(**options: Any) -> Iterator[PageRun]:
    """A `PageRun` whose server is ended with the block."""
    run = PageRun(**options)
    try:
        yield run
    finally:
        run.stop()


def run_verb(words: list[str]) -> None:
    """A command of linearize as on a page, on little text; `> FILE` is where the output goes."""
    target = words[words.index(">") + 1] if ">" in words else None
    words = words[: words.index(">")] if target else words
    verb, *rest = words
    if "--memory" in rest and verb == "bench":
        rest[rest.index("--memory") + 1] = SMALLER_MEMORY
    arguments = [verb, *(small(rest) if verb == "convert" else rest), *SMALLER.get(verb, [])]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed) if target else contextlib.nullcontext():
        assert main(arguments) == 0, f"linearize {shlex.join(arguments)}"
    if target:
        Path(target).write_text(printed.getvalue(), "utf-8")


def small(words: list[str]) -> list[str]:
    """The arguments of a conversion, with few tokens for each stage that the page does not skip."""
    name = words[words.index("--recipe") + 1] if "--recipe" in words else "window-linear"
    stages = load_recipe(name).stages
    settings = ["data.length=64"]
    for number, stage in enumerate(stages):
        if not isinstance(stage, DatasetStageConfig):
            settings += [f"stages.{number}.tokens=1k", f"stages.{number}.batch=4"]
            settings += [f"stages.{number}.length=64"] if stage.length else []
    if "self" in words:
        settings += ["data.self_tokens=8k", "data.self_max_new_tokens=64"]
    skipped = {word.partition("=")[0] for word in words if word.endswith(".tokens=0")}
    settings = [key for key in settings if key.partition("=")[0] not in skipped]
    changed = {key.partition("=")[0] for key in settings}
    kept: list[str] = []
    for word in words:
        if word.partition("=")[0] in changed and kept[-1:] == ["--set"]:
            kept.pop()
        else:
            kept.append(word)
    return [*kept, *(part for key in settings for part in ("--set", key))]

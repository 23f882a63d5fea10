"""Functions that task definitions call: rows from a file beside the definition, code tried, literals compared.

A copy of this file is left beside the definitions, so that lm-eval's own command can use the folder: it imports nothing
of this package.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TIME_LIMIT = 3.0  # seconds for one program
MEMORY_LIMIT = 2 << 30  # bytes
LONGEST_ANSWER = 10_000  # characters
MARK = "all tests passed"


def splits(*, local: Mapping[str, str], **metadata: Any) -> dict[str, Any]:
    """A data set of JSON lines: `local` maps splits to files beside this one. lm-eval hands its metadata on as well."""
    import datasets

    found = {}
    for split, name in local.items():
        lines = (Path(__file__).parent / name).read_text(encoding="utf-8").split("\n")
        found[split] = datasets.Dataset.from_list([json.loads(line) for line in lines if line])
    return found


def build_predictions(resps: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The prompt with what the model wrote behind it, which is a whole program."""
    return [[doc["prompt"] + text for text in texts] for texts, doc in zip(resps, docs, strict=True)]


def pass_at_k(references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int]) -> dict[str, float]:
    """The share of items solved by the first of k answers (k = 1); each program runs in a process of its own."""
    if list(k) != [1]:
        raise ValueError(f"only k = 1 is measured here, given {k}")
    passed = [passes(f"{texts[0]}\n{test}") for test, texts in zip(references, predictions, strict=True)]
    return {"pass@1": sum(passed) / len(passed)}


def passes(program: str, *, seconds: float = TIME_LIMIT) -> bool:
    """Whether a program runs to its last line in time. Not a sandbox: it has the rights of whoever starts it."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", f"{program}\nprint({MARK!r})"],
                cwd=folder,
                env={"PATH": "", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_limit,
            )
        except (OSError, ValueError):  # a null byte in the program, or one too long for a command line
            return False
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return code == 0 and output.read().decode(errors="replace").rstrip().endswith(MARK)


def _limit() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


def literal_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the text between the answer's tags is the literal that the function returns."""
    answer = results[0].split("[/ANSWER]")[0].strip()[:LONGEST_ANSWER]
    return {"exact_match": float(same_literal(_right_side(answer), doc["output"]))}


def _right_side(answer: str) -> str:
    """What stands behind `==` in an assertion; the text itself where it is none."""
    try:
        (statement,) = ast.parse(answer).body
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return answer
    if isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Compare):
        return ast.get_source_segment(answer, statement.test.comparators[-1]) or answer
    return answer


def same_literal(answer: str, truth: str) -> bool:
    """Equal as Python literals; as text where one of them is none. Nothing is executed."""
    if len(answer) > LONGEST_ANSWER:
        return False
    try:
        return bool(ast.literal_eval(answer) == ast.literal_eval(truth))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return answer == truth

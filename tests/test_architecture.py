"""The shape of the package: imports point one way, `import linearize` stays light, files stay small."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "linearize"

# A module may import only from packages with a smaller number, and from its own package.
LAYERS = {
    "errors": 0,
    "version": 0,
    "memory": 0,
    "phases": 0,
    "registry": 1,
    "numbers": 1,
    "tables": 1,
    "storage": 2,
    "ops": 2,
    "mixers": 3,
    "modeling": 4,
    "training": 5,
    "decoding": 5,
    "metrics": 6,
    "recipes": 7,
    "conversion": 8,
    "planning": 9,
    "evaluation": 9,
    "serving": 9,
    "demo": 10,
    "cli": 11,
    "lm_eval": 12,
    "__init__": 13,
    "__main__": 14,
}
EXTRAS = [
    "trl",
    "lm_eval",
    "openai",
    "fla",
    "triton",
    "fastapi",
    "uvicorn",
    "prometheus_client",
    "vllm",
    "wandb",
    "tensorboard",
]
NOT_AT_IMPORT = [*EXTRAS, "matplotlib", "datasets", "peft", "typer"]


def imported(code: str, package: tuple[str, ...] = ()) -> Iterator[str]:
    """The parts of `linearize` that code imports, anywhere in it: `ops`, ...; the package itself is `__init__`.

    `package` is where the code stands, below `linearize`, for relative imports.
    """
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(("linearize", *package)[: len(package) + 2 - node.level]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            whole = origin == "linearize"
            names = [f"linearize.{alias.name}" for alias in node.names] if whole else [origin]
        else:
            continue
        for name in names:
            root, *below = name.split(".")
            if root == "linearize":
                yield below[0] if below and below[0] in LAYERS else "__init__"


def modules() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if "__pycache__" not in path.parts)


def layer_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize(
    ("code", "package", "layers"),
    [
        ("import linearize.ops.layout as layout", (), ["ops"]),
        ("from linearize.mixers import MIXERS", (), ["mixers"]),
        ("from linearize import storage, load", (), ["storage", "__init__"]),
        ("import linearize", (), ["__init__"]),
        ("def f():\n    from linearize.cli.main import app", (), ["cli"]),
        ("from .base import Mixer", ("mixers",), ["mixers"]),
        ("from ..ops import layout", ("mixers",), ["ops"]),
        ("import torch, linearizer", (), []),
    ],
)
def test_imports_are_found(code: str, package: tuple[str, ...], layers: list[str]) -> None:
    assert list(imported(code, package)) == layers


def test_every_module_has_a_layer() -> None:
    unplaced = {layer_of(path) for path in modules()} - set(LAYERS)
    assert not unplaced, f"give {sorted(unplaced)} a place in LAYERS and in docs/architecture.md"


def test_imports_point_one_way() -> None:
    wrong = []
    for path in modules():
        own, package = layer_of(path), path.relative_to(SOURCE).parts[:-1]
        for target in imported(path.read_text("utf-8"), package):
            if target != own and LAYERS[target] >= LAYERS.get(own, 0):
                wrong.append(f"{path.relative_to(SOURCE)} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_files_and_functions_stay_small() -> None:
    big = []
    for path in modules():
        text = path.read_text("utf-8")
        if text.count("\n") > 400:
            big.append(f"{path.relative_to(SOURCE)}: {text.count(chr(10))} lines, at most 400")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > 80:
                    big.append(f"{path.relative_to(SOURCE)}: {node.name} has {length} lines, at most 80")
    assert not big, "\n".join(big)


MEASURE = """
import json, sys, time
import torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
before, start = set(sys.modules), time.process_time()
import linearize
print(json.dumps({"seconds": time.process_time() - start, "loaded": sorted(sys.modules), "before": sorted(before)}))
"""


def measure() -> dict:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def test_import_is_light_and_needs_no_extra() -> None:
    run = measure()
    assert "linearize" not in run["before"]
    loaded = sorted(set(NOT_AT_IMPORT) & (set(run["loaded"]) - set(run["before"])))  # torch takes triton where it is
    assert not loaded, f"`import linearize` also imports {loaded}"
    seconds = run["seconds"]
    for _ in range(2):  # best of three, as a busy machine only makes it slower
        seconds = seconds if seconds < 0.2 else min(seconds, measure()["seconds"])
    assert seconds < 0.2  # beyond torch and transformers, as the design promises


def roads() -> dict[str, list[tuple[str, str]]]:
    """The roads of docs/architecture.md: title to rows of file and function."""
    text = (SOURCE.parents[1] / "docs" / "architecture.md").read_text("utf-8")
    text = text[text.index("## Three roads") : text.index("## Packages")]
    tables = {}
    for title, table in re.findall(r"\n(One [^\n]+):\n\n((?:\|[^\n]*\n)+)", text):
        tables[title] = re.findall(r"\| \d \| `([^`]+)` \| `([^`]+)` \|", table)
    return tables


THROUGH_TRANSFORMERS = {  # called by the teacher's modules, which a student keeps
    ("modeling/student.py", "modeling/attention.py"),
    ("modeling/forward_call.py", "modeling/attention.py"),
    ("decoding/generate.py", "modeling/student.py"),
    ("decoding/speculative/cached_model.py", "modeling/student.py"),
    ("training/stages/attention_transfer.py", "mixers/window_mixer.py"),
    ("modeling/cache.py", "mixers/window_mixer.py"),
    ("training/step.py", "training/stages/attention_transfer.py"),
}


@pytest.mark.parametrize("title", sorted(roads()))
def test_a_road_is_at_most_eight_files_that_call_each_other(title: str) -> None:
    rows = roads()[title]
    assert 4 <= len(rows) <= 8 and len({path for path, _ in rows}) == len(rows)
    for path, function in rows:
        tree = ast.parse((SOURCE / path).read_text("utf-8"))
        names = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert function in names, f"{path} has no {function}"
    for (caller, _), (called, function) in pairwise(rows):
        text = (SOURCE / caller).read_text("utf-8")
        assert re.search(rf"\b{function}\b", text) or (caller, called) in THROUGH_TRANSFORMERS, f"{caller} -> {called}"

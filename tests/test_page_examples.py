"""The examples of README.md and docs/ run as they are written, in a folder that has what they name.

The pages' own marks say which do; `page_blocks.py` has the few ways in which a command differs from its page.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Repository, running_hub, use_hub
from models import tiny
from page_blocks import blocks_of, page_run, run_verb
from task_files import DEFINITIONS, write_data
from transformers import AutoModelForCausalLM, AutoTokenizer

import linearize
from linearize.demo.run import TEACHER
from linearize.evaluation.suites import SUITES, Suite
from linearize.recipes import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
API = ROOT / "docs" / "api.md"  # made from scripts/api_examples.py, which tests/test_api_page.py runs
RUN = [page for page in PAGES if any(block.marker == "runs" for block in blocks_of(page))]

PLACES: dict[str, dict[str, str]] = {
    "README": {
        "TEACHER": "teacher",
        "path/or/hub-id": "teacher",
        "draft": "teacher",
        **dict.fromkeys("abc", "student"),
    },
    "evaluation": dict.fromkeys(["student", "a", "b", "c"], "student"),
    "export": {"STUDENT": "student", "MAMBA2_HYBRID": "mamba2", "GATED_DELTA_HYBRID": "gated_delta"},
    "finetuning": {"student": "student"},
    "hub": {"TEACHER": "teacher"},
    "serve": {"TEACHER": "teacher", "student": "student", "adapter": "adapter"},
    "speculation": {"TARGET": "teacher", "TEACHER": "teacher", "STUDENT": "student"},
}
"""What the folders that a page names are; on other pages TEACHER alone is there."""


def names_of(page: str) -> dict[str, Any]:
    """What the Python of a page takes for given."""
    texts = [f"one cat sat on mat number {n} and saw {n * 7} birds" for n in range(8)]
    if page == "finetuning":
        good, bad = [" yes it did"] * 8, [" no never, not even once"] * 8
        return {"texts": texts, "prompts": texts[:2] * 4, "good_answers": good, "bad_answers": bad}
    if page == "speculation":
        target, tokenizer = (
            AutoModelForCausalLM.from_pretrained("TARGET").eval(),
            AutoTokenizer.from_pretrained("TARGET"),
        )
        prompts = [tokenizer(text, return_tensors="pt")["input_ids"] for text in texts[:2]]
        ids = torch.arange(3, 25).view(2, 11)
        return {
            "target": target, "draft": AutoModelForCausalLM.from_pretrained("TARGET").eval(), "prompts": prompts,
            "student": linearize.load("STUDENT"), "input_ids": ids, "attention_mask": torch.ones_like(ids),
        }  # fmt: skip
    return {"linearize": linearize}


# every block


def test_every_block_runs_or_says_why_not() -> None:
    wanting = []
    for page in PAGES:
        for block in blocks_of(page):
            if block.is_code and not block.marker and not block.benchmarks and page != API:
                wanting.append(f"{page.name}:{block.line}: {block.code.splitlines()[0]}")
    assert not wanting, "put <!-- runs --> or <!-- not run: REASON --> before it"


def test_marks_are_before_blocks() -> None:
    for page in PAGES:
        marks = sum(line.startswith(("<!-- runs", "<!-- not run")) for line in page.read_text("utf-8").splitlines())
        assert marks == sum(bool(block.marker) for block in blocks_of(page)), page.name


def test_measurements_name_scripts_that_exist() -> None:
    named = {name for page in PAGES for block in blocks_of(page) for name in block.benchmarks}
    assert len(named) > 9
    for name in named:
        assert (ROOT / (name if name.endswith(".py") else f"{name.replace('.', '/')}.py")).is_file(), name


def test_a_block_without_a_mark_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n```python\na = 1\n```\n\n<!-- runs -->\n```bash\nlinearize x\n```\n"
        "\n    linearize y\n    linearize z\n\n"
        "text\n\n    y = x\n\n<!-- not run: hours -->\n\n    pip install x\n\n```\nlinearize w\n```\n"
        "\n```yaml\na: 1\n```\n"
        "\n    python -m benchmarks.kills --a \\\n      b\n"
    )
    blocks = blocks_of(page)
    assert [(block.language, block.line, block.is_code, block.marker) for block in blocks] == [
        ("python", 3, True, ""), ("bash", 8, True, "runs"), ("", 12, True, ""), ("", 17, False, ""),
        ("", 21, True, "not run: hours"), ("", 23, True, ""), ("yaml", 27, False, ""), ("", 31, True, ""),
    ]  # fmt: skip
    assert blocks[2].code == "linearize y\nlinearize z\n" and blocks[-1].benchmarks == ["benchmarks.kills"]


# the pages


def write_stories(path: Path) -> None:
    """Stories of a few sentences of known words."""
    choose = random.Random(3).choice
    who, what = ["Tom", "Lily", "the red cat", "a big dog", "Ann"], ["box", "ball", "hat", "tree", "house", "park"]
    did = ["ran to the", "saw a", "sat on the", "played with the", "looked at a little"]

    def sentence() -> str:
        return f"{choose(who)} {choose(did)} {choose(what)} and {choose(who)} {choose(did)} {choose(what)}."

    stories = [" ".join(sentence() for _ in range(9)) for _ in range(120)]
    path.write_text("\n\n".join(stories))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, its student, the same as an adapter, and hybrids for native exports; with tokenizers."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(TEACHER, folder / "teacher")
    write_stories(folder / "stories.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command = ["convert", str(folder / "teacher"), "--data", str(folder / "stories.txt")]
        for name, option in (("student", "--overwrite"), ("adapter", "--adapter-only")):
            run_verb([*command, "--out", name, option])
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    for name, family, mixer in (("mamba2", "llama", "mamba2"), ("gated_delta", "qwen3", "gated_delta_net")):
        teacher = tiny(family, attention="sdpa", vocab_size=len(tokenizer))
        student = linearize.convert_model(teacher, {"mixer": {"name": mixer}, "layers": [0, 2]})
        student.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make the current folder what a page expects."""

    def prepare(page: str) -> None:
        monkeypatch.chdir(tmp_path)
        shutil.copy(made / "stories.txt", "stories.txt")
        Path("benchmarks").mkdir()
        Path("benchmarks/tasks").symlink_to(DEFINITIONS)
        for name, kind in PLACES.get(page, {"TEACHER": "teacher"}).items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(made / kind, name)

    return prepare


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


SIZES: dict[str, dict[str, Any]] = {
    "branches": {"tokens": 200, "layer_tokens": 200, "context_tokens": 200, "contexts": (16, 32), "decode_tokens": 16},
    "cloze": {"items": 8},
    "recall": {"lengths": (64,), "depths": (0.5,), "items": 1, "keys": (1,), "queries": 1, "needles": 0, "values": 0},
    "speed": {"contexts": (32,), "repeats": 1, "new_tokens": 2, "prefill_repeats": 1, "check_tokens": 20},
}


def smaller(suite: Suite) -> Suite:
    """The sections of a suite at the smallest sizes."""
    sections = tuple(section.model_copy(update=SIZES.get(section.NAME, {})) for section in suite.sections)
    return replace(suite, sections=sections)


def at_small_sizes(convert: Callable[..., Any]) -> Callable[..., Any]:
    """`linearize.convert` with few tokens for each stage."""

    def run(*arguments: Any, recipe: Recipe | str = "window-linear", **options: Any) -> Any:
        recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
        stages = range(len(recipe.stages))
        sizes = {f"stages.{n}.{key}": value for n in stages for key, value in (("tokens", 1000), ("batch", 4))}
        return convert(*arguments, recipe=recipe.override({"data.length": 64, **sizes}), device="cpu", **options)

    return run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_a_page_runs_from_top_to_bottom(
    page: Path, made: Path, place: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for needed in {"finetuning": ["trl"], "serve": ["openai", "lm_eval"]}.get(page.stem, []):
        pytest.importorskip(needed)
    place(page.stem)
    monkeypatch.setitem(SUITES, "quick", smaller(SUITES["quick"]))
    monkeypatch.setattr(linearize, "convert", at_small_sizes(linearize.convert))
    environment = {**os.environ, "LINEARIZE_EVAL_DATA": str(write_data(tmp_path / "items"))}
    options: dict[str, Any] = {"namespace": names_of(page.stem), "port": free_port(), "environment": environment}
    blocks = [block for block in blocks_of(page) if block.marker == "runs"]
    with running_hub() as hub, page_run(**options) as run:
        if page.stem == "hub":
            use_hub(hub, monkeypatch, tmp_path / "cache")
            for name, branch, kind in (("MODEL", "v1.0", "teacher"), ("STUDENT", "main", "student")):
                files = {path.name: path.read_bytes() for path in (made / kind).iterdir() if path.is_file()}
                hub.repositories[f"ORGANISATION/{name}"] = Repository()
                hub.repositories[f"ORGANISATION/{name}"].commit(files, branch)
        for block in blocks:
            run.block(block)

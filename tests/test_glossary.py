"""The words that the code gave up do not come back as names, and `docs/glossary.md` is a table that can be read."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "linearize"
GLOSSARY = ROOT / "docs" / "glossary.md"

# Endings of paths of files that have another name now, and that name.
FILES = {
    "ops/forms.py": "ops/dispatch.py",
    "ops/packed.py": "ops/varlen.py",
    "ops/products.py": "ops/matmul.py",
    "ops/pieces.py": "ops/blocking.py",
    "window_linear/few.py": "multi_token.py",
    "window_linear/room.py": "ring_buffer.py",
    "window_linear/slab.py": "chunk_group.py",
    "window_linear/piece.py": "head_block.py",
    "modeling/packed.py": "prepacked_linear.py",
    "modeling/rows.py": "ragged_cache.py",
    "modeling/statistics.py": "attention_capture.py",
    "streaming/papers.py": "conversion/outputs.py",
    "recipes/together.py": "conversion/distributed.py",
    "recipes/recipe.py": "recipes/schema.py",
    "recipes/preparation.py": "conversion/prepare.py",
    "recipes/base_weights.py": "conversion/checks.py",
    "blockwise/filling.py": "hidden_writer.py",
    "blockwise/claims.py": "leases.py",
    "blockwise/parts.py": "block_result.py",
    "training/supply.py": "data/train_dataset.py",
    "training/footprint.py": "memory_simulation.py",
    "stages/other_teacher.py": "external_teacher.py",
    "speculative/reader.py": "cached_model.py",
    "speculative/graphs.py": "graphed_model.py",
    "speculative/scores.py": "logits_processing.py",
    "speculative/auto.py": "draft_length.py",
    "speculative/chooser.py": "adaptive_draft_length.py",
    "speculative/experience.py": "acceptance_stats.py",
    "speculative/products.py": "weight_layout.py",
    "io/four_bits.py": "nf4.py",
}

# Names of classes, functions and variables that are gone from the whole package, and the word to use.
NAMES = {
    "Asked": "Query",
    "Claim": "Lease",
    "Claims": "leases",
    "Contestant": "EvalModel",
    "Ending": "LMHead",
    "Filler": "HiddenWriter",
    "Kept": "ResultCache",
    "Loan": "SharedShards",
    "MANY": "a name that says what is bounded",
    "Reader": "CachedModel",
    "Readout": "SplitModel",
    "Room": "RingBuffer",
    "ScoreRules": "logits_processing",
    "Setting": "EvalContext",
    "Shown": "SectionView",
    "Slab": "ChunkGroup",
    "TrainingText": "TrainDataset",
    "WIDEST": "a name that says what is bounded",
    "Walk": "StreamedForward",
    "Walker": "StreamedForward",
    "Way": "RunConfig",
    "Writing": "GenerationWorkload",
    "cannot": "unsupported",
    "check_together": "check_processes",
    "chooser": "AdaptiveDraftLength",
    "experience": "AcceptanceStats",
    "filling": "hidden_writer",
    "footprint": "memory_simulation",
    "forms": "backends",
    "hopeless": "pruned",
    "never": "always",
    "other_teacher": "external_teacher",
    "papers": "outputs",
    "readout": "split_model",
    "refuses": "why_not_chosen",
    "run_loaded": "train_loaded_blocks",
    "share_out": "shard_models",
    "showing": "present",
    "slab": "chunk_group",
    "supply": "train_dataset",
    "take_parts": "load_trained_blocks",
    "train_parts": "train_streamed_blocks",
    "write_papers": "write_student_files",
    "FEW_TOKENS": "a name that says what is bounded",
    "Part": "BlockResult",
    "Piece": "HeadBlock",
    "Tile": "StateTile",
    "pieces": "head_blocks",
    "room": "ring_buffer",
}

# Words that say nothing of what they name, or are pictures where the field has a term.
VAGUE = {
    "told", "tell", "found", "given", "said", "wanted", "guess", "guesses", "papers", "piece", "pieces", "room", "slab",
    "slabs",
}  # fmt: skip
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "benchmarks" / "README.md"]
PROSE = ("beside", "guess", "guesses", "is no folder", "lies in", "slab", "slabs", "stands in", "tell", "told")


def modules() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if "__pycache__" not in path.parts)


def defined(code: str) -> Iterator[str]:
    """The names that code gives to classes, functions, arguments, variables and attributes."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def test_names_are_seen_wherever_they_are_given() -> None:
    code = """
class A:
    def b(self, c, *, d=1):
        self.e = f = 2
        with open("g") as h, open("i") as (j, k):
            return [l for l in m.n if (o := l)]
"""
    assert set(defined(code)) == {"A", "b", "self", "c", "d", "e", "f", "h", "j", "k", "l", "o"}


def test_files_keep_their_new_names() -> None:
    paths = [path.relative_to(SOURCE).as_posix() for path in modules()]
    back = [f"{path}: call it {new}" for path in paths for old, new in FILES.items() if f"/{path}".endswith(f"/{old}")]
    assert not back, "\n".join(back)


def test_words_given_up_do_not_come_back() -> None:
    back = []
    for path in modules():
        where = path.relative_to(SOURCE)
        names = {*defined(path.read_text("utf-8")), path.stem}
        back += [f"{where}: {name}, say {NAMES[name]}" for name in sorted(names & set(NAMES))]
    assert not back, "\n".join(back)


@pytest.mark.parametrize("folder", ["src/linearize", "tests", "benchmarks", "scripts"])
def test_names_say_what_they_name(folder: str) -> None:
    back = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        where = path.relative_to(ROOT).as_posix()
        back += [f"{where}: {name}" for name in sorted(set(defined(path.read_text("utf-8"))) & VAGUE)]
    assert not back, "\n".join(back)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_in_plain_words(page: Path) -> None:
    lines = [(n, line) for n, line in enumerate(page.read_text("utf-8").splitlines(), 1) if line[:1] != ">"]
    used = [f"{n}: {line}" for n, line in lines if re.search(rf"\b({'|'.join(PROSE)})\b", line)]  # but quotations
    assert not used, "\n".join(used)


def entries() -> list[tuple[str, ...]]:
    lines = [line for line in GLOSSARY.read_text("utf-8").splitlines() if line.startswith("| ")]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines[1:]]


def test_the_glossary_is_a_sorted_table_of_two_columns() -> None:
    rows = entries()
    words = [row[0] for row in rows]
    assert 50 <= len(rows) <= 80 and all(len(row) == 2 for row in rows)
    assert words == sorted(set(words), key=str.lower)


@pytest.mark.parametrize(("word", "meaning"), entries())
def test_a_meaning_is_one_plain_sentence(word: str, meaning: str) -> None:
    assert meaning[0].isupper() and meaning.endswith(".") and not re.search(r"\. [A-Z]", meaning)
    assert len(meaning) <= 110
    used = set(re.findall(r"[a-z_]+", meaning.lower()))
    assert not used & VAGUE

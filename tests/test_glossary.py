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
    "chooser": "AdaptiveDraftLength",
    "filling": "hidden_writer",
    "footprint": "memory_simulation",
    "forms": "backends",
    "other_teacher": "external_teacher",
    "papers": "outputs",
    "share_out": "shard_models",
    "check_together": "check_processes",
    "run_loaded": "train_loaded_blocks",
    "supply": "train_dataset",
    "take_parts": "load_trained_blocks",
    "train_parts": "train_streamed_blocks",
    "write_papers": "write_student_files",
    # Still in the code at the time of writing; a line becomes active when its rename is merged.
    # "Asked": "Query",
    # "Claim": "Lease",
    # "Claims": "leases",
    # "Contestant": "EvalModel",
    # "Ending": "LMHead",
    # "FEW_TOKENS": "MAX_MULTI_TOKEN",
    # "Filler": "HiddenWriter",
    # "Kept": "ResultCache",
    # "Loan": "SharedShards",
    # "MANY": "a name that says what is bounded",
    # "DatasetStageConfig": "DatasetStageConfig",
    # "Part": "BlockResult",
    # "Piece": "HeadBlock",
    # "Reader": "CachedModel",
    # "Room": "RingBuffer",
    # "ScoreRules": "logits_processing",
    # "Setting": "EvalContext",
    # "Shown": "SectionView",
    # "Slab": "ChunkGroup",
    # "Tile": "Stat",
    # "TrainingText": "TrainDataset",
    # "WIDEST": "a name that says what is bounded",
    # "Walk": "StreamedForward",
    # "Walker": "StreamedForward",
    # "Way": "RunConfig",
    # "Writing": "GenerationWorkload",
    # "cannot": "unsupported",
    # "experience": "AcceptanceStats",
    # "few": "multi_token",
    # "hopeless": "pruned",
    # "never": "always",
    # "own": "unshare",
    # "pieces": "head_blocks",
    # "readout": "chunked_logits",
    # "refuses": "why_not_chosen",
    # "room": "ring_buffer",
    # "showing": "present",
    # "slab": "chunk_group",
    # "tap": "attention_override",
}

# Words that say nothing of what they name, and the packages that are free of them.
VAGUE = ("told", "tell", "found", "given")
FREE_OF_VAGUE = (
    "cli",
    "conversion",
    "decoding",
    "mixers",
    "modeling",
    "ops",
    "planning",
    "recipes",
    "storage",
    "training",
    # "demo", "evaluation", "metrics": when they are free of them
)


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
        if where.parts[0] in FREE_OF_VAGUE:
            back += [f"{where}: {name}, say what it is" for name in sorted(names & set(VAGUE))]
    assert not back, "\n".join(back)


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
    assert not used & {name.lower() for name in NAMES}
    assert not used & set(VAGUE)

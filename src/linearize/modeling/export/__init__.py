"""Students written for programs without linearize: as architectures that engines know, or with their own code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.errors import InputError, unknown
from linearize.modeling import LinearizedForCausalLM, load
from linearize.modeling.export import granite_hybrid, qwen3_5, remote_code
from linearize.modeling.export.common import Source, logit_difference
from linearize.modeling.export.readme import readme
from linearize.storage.atomic import atomic_folder, check_free
from linearize.storage.files import check_apart, expand_home

__all__ = ["EXPORTS", "Export", "export_student"]

SCRIPTS = "It's 12345 o'clock,\n\n  हिन्दी में, ภาษาไทย, العَرَبِيَّة, 中文 1.5x -> é\u0301!"


@dataclass(frozen=True, kw_only=True)
class Export:
    """One target: `misfit(source)` says why a student cannot be written (None: it can), `write(student, source,
    folder)` writes it. `native`: an architecture of transformers; otherwise the folder carries code."""

    misfit: Callable[[Source], str | None]
    write: Callable[[Any, Source, Path], None]
    native: bool


EXPORTS: dict[str, Export] = {
    "granite-hybrid": Export(misfit=granite_hybrid.misfit, write=granite_hybrid.write, native=True),
    "qwen3.5": Export(misfit=qwen3_5.misfit, write=qwen3_5.write, native=True),
    "hf": Export(misfit=remote_code.misfit, write=remote_code.write, native=False),
}


def export_student(
    student_or_path: LinearizedForCausalLM | str | Path,
    to: str,
    out: str | Path,
    *,
    overwrite: bool = False,
    tokenizer: Any = None,
) -> Path:
    """Write a student as `to`, one of `EXPORTS`; returns the folder, which loads without linearize.

    A native folder is loaded again and its logits compared with the student's before it gets its name. `tokenizer`:
    None: that of the student's folder.

    Raises:
        InputError: an unknown target, an output folder that exists, no student, or a student that does not fit (with
            the reason and the nearest target that takes it).
    """
    if to not in EXPORTS:
        raise unknown("export target", to, EXPORTS)
    out = Path(expand_home(out)).resolve()
    check_free(out, overwrite)
    student = student_or_path
    if not isinstance(student, LinearizedForCausalLM):
        student = expand_home(student)
        check_apart(out, student)
        tokenizer = tokenizer or _tokenizer(student)
        student = load(student)
    source = Source.of(student)
    if reason := EXPORTS[to].misfit(source):
        raise InputError(f"{reason}: use --to {nearest(source)}")
    with atomic_folder(out, overwrite) as folder:
        EXPORTS[to].write(student, source, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        difference = logit_difference(student, folder) if EXPORTS[to].native else None
        same = tokenizer is None or same_tokens(tokenizer, folder)
        (folder / "README.md").write_text(readme(to, source, out.name, difference, same), "utf-8")
    return out


def nearest(source: Source) -> str:
    """The first target of the table that takes a student; native ones come first."""
    return next(name for name, export in EXPORTS.items() if export.misfit(source) is None)


def same_tokens(tokenizer: Any, folder: Path) -> bool:
    """Whether `AutoTokenizer` reads the folder's tokenizer as the one given: for some architectures transformers puts
    a splitting rule of its own in the place of the one that was saved."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError):
        return False
    return bool(found(SCRIPTS)["input_ids"] == tokenizer(SCRIPTS)["input_ids"])


def _tokenizer(path: str | Path) -> Any:
    """The tokenizer beside a student, or None where there is none."""
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_dir() and not any(folder.glob("*token*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError):
        return None

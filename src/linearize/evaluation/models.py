"""Loads the models of an evaluation: the teacher first, then the students, each under a unique name."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from linearize.decoding.loading import is_student, load_any
from linearize.errors import InputError
from linearize.evaluation.context import EvalModel
from linearize.evaluation.held_out import Origin
from linearize.modeling.io.model_source import find_model
from linearize.storage.files import expand_home

TEACHER = "teacher"
_WEIGHTS = ("*.json", "*.safetensors", "*.gguf", "tokenizer*", "*.model")


def load_models(
    models: Sequence[str], teacher: str | None, origins: Sequence[Origin], device: str | None, notes: list[str]
) -> tuple[EvalModel, ...]:
    """Teacher and students; a plain model without a teacher is measured alone, as the teacher.

    `teacher` None: the one that the students' reports name; where it cannot be loaded, `notes` gets a line.
    Raises InputError for a path that is not a model, and for tokenizers that differ.
    """
    for path in [*models, *([teacher] if teacher else [])]:
        find_model(path)
    if teacher is None and len(models) == 1 and not is_student(models[0]):
        return (_load(models[0], TEACHER, "teacher", device),)
    loaded = []
    if (named := teacher or recorded_teacher(origins)) is not None:
        try:
            loaded.append(_load(named, TEACHER, "teacher", device))
        except (InputError, OSError) as error:
            if teacher is not None:
                raise
            notes.append(f"the recorded teacher {named} cannot be loaded, name one with --teacher ({error})")
    for name, path in zip(unique_names(models), models, strict=True):
        loaded.append(_load(path, name, "student", device))
    _check_tokenizers(loaded)
    return tuple(loaded)


def recorded_teacher(origins: Sequence[Origin]) -> str | None:
    """The teacher that the students' own reports name. Raises InputError if they name different ones."""
    named = {expand_home(origin.report.teacher): origin.path for origin in origins if origin.report is not None}
    if len(named) > 1:
        pairs = ", ".join(f"{path} of {teacher}" for teacher, path in named.items())
        raise InputError(f"students of different teachers ({pairs}): name the one to compare with by --teacher")
    return next(iter(named), None)


def unique_names(paths: Sequence[str]) -> list[str]:
    """A short name per path: its last part, numbered where two are the same."""
    names: list[str] = []
    for path in paths:
        short = Path(path).resolve().name if Path(path).exists() else path.rstrip("/").rsplit("/", 1)[-1]
        taken = {TEACHER, *names}
        numbered = (short, *(f"{short}-{i}" for i in range(2, len(paths) + 2)))
        names.append(next(name for name in numbered if name not in taken))
    return names


def _load(path: str, name: str, role: Literal["teacher", "student"], device: str | None) -> EvalModel:
    model, tokenizer = load_any(path, device=device)
    return EvalModel(
        name=name, role=role, path=path, model=model, tokenizer=tokenizer, fingerprint=_fingerprint(path, model.config)
    )


def _fingerprint(path: str, config: object) -> str:
    """Changes with a folder's files, or a GGUF file, by name, size and time of change; or with a Hub model's commit."""
    folder = Path(expand_home(path))
    if not folder.exists():
        return f"{path}@{getattr(config, '_commit_hash', None)}"
    files = sorted({file for pattern in _WEIGHTS for file in folder.glob(pattern)}) if folder.is_dir() else [folder]
    stamps = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(stamps).encode()).hexdigest()[:20]


def _check_tokenizers(eval_models: Sequence[EvalModel]) -> None:
    first = eval_models[0]
    for other in eval_models[1:]:
        if other.tokenizer.get_vocab() != first.tokenizer.get_vocab():
            raise InputError(
                f"{other.path}: its vocabulary is not that of {first.path}, so they cannot be compared on the same "
                "tokens; name the student's own teacher"
            )

"""Loads models and text of an evaluation: teacher and students, and documents that no student was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.decoding.loading import is_student, load_any
from linearize.errors import InputError
from linearize.evaluation.context import EvalModel
from linearize.evaluation.numbers import Role
from linearize.metrics.report import ConversionReport, read_report
from linearize.modeling.io.adapter_folder import is_adapter_folder
from linearize.modeling.io.model_source import find_model
from linearize.storage.files import expand_home, read_text
from linearize.training.data.loading import DataConfig, Document, load_documents, local_spec, split
from linearize.training.data.pseudo_labels import pseudo_labeller
from linearize.training.data.sampling import self_sampler

TEACHER = "teacher"
_WEIGHTS = ("*.json", "*.safetensors", "*.gguf", "tokenizer*", "*.model")
SEEN = (
    "{seen}: {who} was trained on it; give other text, or exactly the data of its conversion in the same order, "
    "of which only the held-out part is used"
)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How models are loaded; see `linearize.load`."""

    device: str | None = None
    dtype: torch.dtype | str | None = None
    device_map: str | dict[str, Any] | None = None
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """How a model was made, from the files in its folder; empty for a model that is not a student."""

    path: str
    report: ConversionReport | None = None
    data: DataConfig | None = None

    @classmethod
    def read(cls, path: str | Path) -> Origin:
        """From the folder's `report.json` and `recipe.yaml`. Raises InputError where one is there and not valid."""
        if not is_student(path):
            return cls(path=str(path))
        return cls(path=str(path), report=read_report(path), data=_data_config(Path(path)))


def held_out_documents(
    specs: Sequence[str],
    origins: Sequence[Origin],
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel | None,
    notes: list[str],
) -> list[Document]:
    """The documents of `specs` that no student of `origins` was trained on; says in `notes` which part that is.

    What the teacher wrote for a conversion (`self`, `pseudo:`) it writes again, or reads from its cache.
    Raises InputError for text that a student was trained on, and for students that held out different parts of it.
    """
    local_specs = [local_spec(spec) for spec in specs]
    sources = {
        origin.path: ([local_spec(spec) for spec in origin.report.data], origin.data)
        for origin in origins
        if origin.report is not None
    }
    own = {path: config for path, (data, config) in sources.items() if data == local_specs and config is not None}
    for path, (data, _) in sources.items():
        seen = [spec for spec in local_specs if spec in data]
        if seen and path not in own:
            raise InputError(SEEN.format(seen=", ".join(seen), who=path))
    config = next(iter(own.values()), None)
    if any(_drawing(other) != _drawing(config) for other in own.values()):
        raise InputError(f"{', '.join(own)}: they held out different parts of their text; give other text with --data")
    settings = config or DataConfig()
    documents = load_documents(
        [_located(spec, origins) for spec in local_specs],
        tokenizer,
        sample=self_sampler(teacher, tokenizer, settings) if teacher is not None else None,
        answer=pseudo_labeller(teacher, tokenizer, settings) if teacher is not None else None,
        answer_only=settings.answer_only,
    )
    if config is None:
        return documents
    notes.append("the held-out part of the data that the student was made from")
    return split(documents, config).heldout


def first_documents(
    documents: Sequence[Document], *, tokens: int, limit: int | None, notes: list[str]
) -> list[Document]:
    """At least one document, then whole ones up to about `tokens` tokens and at most `limit` of them."""
    chosen: list[Document] = []
    total = 0
    for document in documents:
        if chosen and (total + len(document) > tokens or len(chosen) == limit):
            bound = f"{tokens} tokens" if len(chosen) != limit else f"{limit} documents"
            notes.append(f"the first {len(chosen)} of {len(documents)} documents (at most {bound})")
            break
        chosen.append(document)
        total += len(document)
    return chosen


def _located(spec: str, origins: Sequence[Origin]) -> str:
    """Return where the file that a report names is: as named, or relative to the student's folder."""
    if Path(spec).exists() or Path(spec).is_absolute():
        return spec
    candidates = [Path(o.path).parent / spec for o in origins if o.report is not None and spec in o.report.data]
    return next((str(path) for path in candidates if path.is_file()), spec)


def _drawing(config: DataConfig | None) -> object:
    """The settings that decide which documents are held out, and their text."""
    return None if config is None else config.model_dump(exclude={"length", "keep_whole", "measured_tokens"})


def _data_config(folder: Path) -> DataConfig | None:
    """The `data` part of a student's recipe; None where there is no recipe."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        return None
    try:
        return DataConfig.model_validate((yaml.safe_load(read_text(path)) or {}).get("data", {}))
    except (ValidationError, yaml.YAMLError, AttributeError) as error:
        raise InputError(f"{path}: not a valid recipe; take the recipe.yaml that convert wrote") from error


def load_models(
    models: Sequence[str],
    teacher: str | None,
    origins: Sequence[Origin],
    placement: Placement,
    notes: list[str],
    *,
    names: Sequence[str] | None = None,
) -> tuple[EvalModel, ...]:
    """Teacher and students; a plain model without a teacher is measured alone, as the teacher.

    `names`: of the students in the report; None: the ends of their paths. `teacher` None: the one that the students'
    reports name; where it cannot be loaded, `notes` gets a line.
    Raises InputError for a path that is not a model, and for tokenizers that differ.
    """
    for path in [*models, *([teacher] if teacher else [])]:
        find_model(path)
    if teacher is None and len(models) == 1 and not is_student(models[0]):
        return (_load(models[0], TEACHER, "teacher", placement),)
    loaded = []
    if (named := teacher or recorded_teacher(origins)) is not None:
        try:
            commit = None if teacher is not None else recorded_commit(origins)
            loaded.append(_load(named, TEACHER, "teacher", placement, revision=commit))
        except (InputError, OSError) as error:
            if teacher is not None:
                raise
            notes.append(f"the recorded teacher {named} cannot be loaded, name one with --teacher ({error})")
    for name, path in zip(names or unique_names(models), models, strict=True):
        loaded.append(_load(path, name, "student", placement, teacher=teacher))
    _check_tokenizers(loaded)
    return tuple(loaded)


def recorded_teacher(origins: Sequence[Origin]) -> str | None:
    """The teacher that the students' own reports name. Raises InputError if they name different ones."""
    named = {expand_home(origin.report.teacher): origin.path for origin in origins if origin.report is not None}
    if len(named) > 1:
        pairs = ", ".join(f"{path} of {teacher}" for teacher, path in named.items())
        raise InputError(f"students of different teachers ({pairs}): name the one to compare with by --teacher")
    return next(iter(named), None)


def recorded_commit(origins: Sequence[Origin]) -> str | None:
    """The commit of that teacher, where it is a Hub model."""
    commits = [origin.report.provenance.get("teacher_commit") for origin in origins if origin.report is not None]
    return next((str(commit) for commit in commits if commit), None)


def unique_names(paths: Sequence[str]) -> list[str]:
    """A short name per path: its last part, numbered where two are the same."""
    names: list[str] = []
    for path in paths:
        short = Path(path).resolve().name if Path(path).exists() else path.rstrip("/").rsplit("/", 1)[-1]
        taken = {TEACHER, *names}
        numbered = (short, *(f"{short}-{i}" for i in range(2, len(paths) + 2)))
        names.append(next(name for name in numbered if name not in taken))
    return names


def _load(
    path: str,
    name: str,
    role: Role,
    placement: Placement,
    *,
    teacher: str | None = None,
    revision: str | None = None,
) -> EvalModel:
    """`teacher`: of a student in adapter form, in place of the one that it was made with."""
    of_teacher = teacher is not None and is_adapter_folder(path)
    place = {"path": teacher, "adapter": path} if of_teacher else {"path": path}
    model, tokenizer = load_any(**place, revision=revision, **vars(placement))
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

"""The text of an evaluation: documents that no student was trained on, according to the students' own reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.decoding.loading import is_student
from linearize.errors import InputError
from linearize.metrics.report import ConversionReport, read_report
from linearize.storage.files import read_text
from linearize.training.data.loading import DataConfig, Document, load_documents, local_spec, split
from linearize.training.data.pseudo_labels import pseudo_labeller
from linearize.training.data.sampling import self_sampler

SEEN = (
    "{seen}: {who} was trained on it; give other text, or exactly the data of its conversion in the same order, "
    "of which only the held-out part is used"
)


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
    """What decides which documents are held out, and what they are."""
    return None if config is None else config.model_dump(exclude={"length", "keep_whole"})


def _data_config(folder: Path) -> DataConfig | None:
    """The `data` part of a student's recipe; None where there is no recipe."""
    path = folder / "recipe.yaml"
    if not path.is_file():
        return None
    try:
        return DataConfig.model_validate((yaml.safe_load(read_text(path)) or {}).get("data", {}))
    except (ValidationError, yaml.YAMLError, AttributeError) as error:
        raise InputError(f"{path}: not a valid recipe; take the recipe.yaml that convert wrote") from error

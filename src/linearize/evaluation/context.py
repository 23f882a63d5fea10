"""What a section of an evaluation measures on, and how it is presented: from its JSON numbers alone, so that a report
can be drawn again from its `report.json`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.errors import InputError
from linearize.evaluation.numbers import ResultCache, Role
from linearize.mixers import MixerConfig
from linearize.modeling.config import LinearizeConfig
from linearize.tables import NOTHING, columns_of
from linearize.training.data.documents import Document
from linearize.training.data.packing import PackedRows

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class TooLittleTextError(InputError):
    """A section cannot measure on so little text; a suite leaves it out and says so."""


Level = Literal["good", "note", "bad"]
Judgement = tuple[Level, str]
"""A finding before it names its model."""

Numbers = dict[str, Any]
"""What a section measured, JSON-able: mappings, lists, text, numbers, None."""


@dataclass(frozen=True, kw_only=True)
class EvalModel:
    """A model that is measured. `name` is unique in a report; the teacher's is `teacher`.

    `fingerprint` changes with the files that the model was loaded from; `path` is as the user gave it.
    """

    name: str
    role: Role
    path: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str = ""

    @property
    def context(self) -> int | None:
        """Tokens that the model has positions for; None where its config does not say."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return positions if isinstance(positions, int) else None

    @property
    def dtype(self) -> str:
        """`float32`."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def plan(self) -> Sequence[MixerConfig | None]:
        """The mixer of each layer, None where softmax attention stays; empty for a model that is no student of ours."""
        config = self.model.config
        return config.mixers() if isinstance(config, LinearizeConfig) else ()

    @property
    def mixer_names(self) -> list[str]:
        """The mixer's name of each layer, or `softmax`."""
        return ["softmax" if mixer is None else str(mixer.name) for mixer in self.plan]  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True)
class EvalContext:
    """What all sections of one evaluation share.

    `models`: the teacher first, where there is one, then the students (a model alone counts as the teacher); all
    have one tokenizer. `documents`: held-out text, tokenised; `texts`: the same as strings. `length`: the longest row
    in tokens. `batch`: rows at a time. `seed`: every draw of a section comes from it. `limit`: items per task (None:
    all). `data_root`: the folder of chat questions; `include_path`: a folder of task definitions (lm-eval's YAML).
    `judge_*`: for the chat section. `results`: what an interrupted run has measured.
    `one_per_row`: the first model does not keep the documents of a row apart, so that each has a row to itself.
    """

    models: tuple[EvalModel, ...]
    documents: Sequence[Document] = ()
    texts: Sequence[str] = ()
    length: int = 1024
    batch: int = 8
    seed: int = 0
    limit: int | None = None
    data_root: Path | None = None
    include_path: Path | None = None
    allow_code: bool = False
    judge_url: str | None = None
    judge_model: str | None = None
    out: Path | None = None
    results: ResultCache = field(default_factory=ResultCache)
    one_per_row: bool = False
    progress: Callable[[str, int, int], None] = lambda what, done, total: None

    @property
    def teacher(self) -> EvalModel | None:
        """The teacher; None where there is none."""
        first = self.models[0]
        return first if first.role == "teacher" else None

    @property
    def students(self) -> tuple[EvalModel, ...]:
        """All models but the teacher."""
        return tuple(model for model in self.models if model.role == "student")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that all models share."""
        return self.models[0].tokenizer

    def rows(self) -> PackedRows:
        """The documents as rows of at most `length` tokens, whole documents where they fit."""
        return self.rows_of(self.documents)

    def rows_of(self, documents: Sequence[Document]) -> PackedRows:
        """Other documents as such rows."""
        from linearize.decoding.loading import pad_token
        from linearize.training.data.packing import document_rows

        pad = pad_token(self.tokenizer)
        return document_rows(documents, self.length, pad_token_id=pad, one_per_row=self.one_per_row)


Cell = str | int | float | None


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of equal keys; a float is shown with four digits, a str as it is (so `0.123 ± 0.004` is a str)."""

    title: str
    rows: Sequence[Mapping[str, Cell]]
    note: str = ""

    def texts(self) -> list[dict[str, str]]:
        """The rows as people read them, every column in each."""
        columns = columns_of(self.rows)
        return [{column: cell_text(row.get(column)) for column in columns} for row in self.rows]


def cell_text(cell: Cell) -> str:
    """Four digits of a float, thousands of a large integer separated, a dash for nothing."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return NOTHING
    if isinstance(cell, (bool, str)):
        return str(cell)
    if isinstance(cell, int):
        return f"{cell:,}" if abs(cell) >= 10_000 else str(cell)
    if cell and (abs(cell) >= 1e6 or abs(cell) < 1e-4):
        return f"{cell:.3e}"
    return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:#.4g}" if cell else "0"


@dataclass(frozen=True, kw_only=True)
class Plot:
    """`draw(figure)` fills a matplotlib figure of `width` x `height` inches, with the style of `metrics/theme.py`.

    `name`: file name without suffix; `caption`: one sentence under it, which also tells those who cannot see the plot
    what it shows.
    """

    name: str
    caption: str
    draw: Callable[[Figure], None]
    width: float = 5.6
    height: float = 3.6


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One judgement: `good` (checked and right), `note` (worth knowing), `bad` (a fault of the student, or of its use).

    `text` names the student and holds the numbers that the judgement rests on.
    """

    level: Level
    text: str
    student: str | None = None

    @classmethod
    def on(cls, name: str, role: Role, level: Level, text: str) -> Finding:
        """A judgement on a model; one on the teacher counts against no student."""
        return cls(level=level, text=f"{name}: {text}", student=name if role == "student" else None)


@dataclass(frozen=True, kw_only=True)
class SectionView:
    """A section as people read it: a sentence, findings, tables, plots."""

    summary: str
    findings: Sequence[Finding] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()


@dataclass(frozen=True, kw_only=True)
class Stat:
    """One number of the verdict: a short label, the value as text, a few words on what it is."""

    label: str
    value: str
    detail: str = ""


class Section(BaseModel, ABC):
    """A part of an evaluation. Subclasses are frozen configs; their fields are what a suite may set.

    `NAME`: its key in `report.json` and in the table SECTIONS; `TITLE`: its heading; `NEEDS_TEXT`: whether it measures
    on the context's documents, else it also runs where there are none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    NAME: ClassVar[str]
    TITLE: ClassVar[str]
    NEEDS_TEXT: ClassVar[bool] = True

    def check(self, ctx: EvalContext) -> None:
        """Raise InputError, before anything is measured, for what the section cannot do in this context."""

    @abstractmethod
    def run(self, ctx: EvalContext) -> Numbers:
        """Measure. The same context and seed give the same numbers, except times, which are under keys
        `*_seconds`, `*_per_second` or `ms_*`."""

    @classmethod
    @abstractmethod
    def present(cls, numbers: Numbers) -> SectionView:
        """What people read, from what `run` returned (after a round trip through JSON)."""

    @classmethod
    def headline(cls, numbers: Numbers) -> Mapping[str, Sequence[Stat]]:
        """The stats of each student in the verdict, by name: at most three. None by default."""
        return {}

"""`report.json` of an evaluation: the whole document as a frozen model, written and read here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from linearize.decoding.loading import is_student
from linearize.errors import InputError
from linearize.evaluation.context import EvalModel, Numbers
from linearize.evaluation.numbers import NumbersModel, Role
from linearize.storage.atomic import atomic_write_text
from linearize.storage.files import read_json

FILE_NAME = "report.json"
FORMAT = 1


class ModelEntry(NumbersModel):
    """One measured model. `student`: whether its folder holds a student of ours; `mixers`: by layer, empty if not."""

    name: str
    role: Role
    path: str
    student: bool
    parameters: int
    dtype: str
    mixers: list[str]

    @classmethod
    def of(cls, eval_model: EvalModel) -> ModelEntry:
        """Describe a model that was measured."""
        return cls(
            name=eval_model.name,
            role=eval_model.role,
            path=eval_model.path,
            student=is_student(eval_model.path),
            parameters=sum(parameter.numel() for parameter in eval_model.model.parameters()),
            dtype=eval_model.dtype,
            mixers=eval_model.mixer_names,
        )


class Statement(NumbersModel):
    """A finding of a section, by the section's name."""

    section: str
    text: str


class StatEntry(NumbersModel):
    """A number of the verdict, by the name of its section."""

    section: str
    label: str
    value: str
    detail: str


class KeptShare(NumbersModel):
    """A share of the teacher that a student keeps, its 95% interval where known, and how the share is defined."""

    measure: str
    definition: str
    value: float
    low: float | None
    high: float | None
    text: str


class StudentVerdict(NumbersModel):
    """The verdict on one student. `checked`: how many findings were good."""

    headline: str
    kept: list[KeptShare]
    tiles: list[StatEntry]
    bad: list[Statement]
    notes: list[Statement]
    checked: int
    faults: bool


class Verdict(NumbersModel):
    """Verdicts by student; `bad` and `notes` are the findings that name no student. `faults`: whether there are any."""

    students: dict[str, StudentVerdict]
    bad: list[Statement]
    notes: list[Statement]
    faults: bool


class EvalReport(NumbersModel):
    """The whole of `report.json`; `sections` holds the numbers of each section by its name.

    `tokens` to `student_top1` are those of the first student (nats per token), under the names that a conversion's
    report has; they are set where held-out text was measured. `length`: tokens in the longest row; `documents`: number
    of held-out documents; `seconds`: by section.
    """

    format: int
    suite: str
    contestants: list[ModelEntry]
    tokens: int | None = None
    teacher_loss: float | None = None
    student_loss: float | None = None
    gap: float | None = None
    student_kl: float | None = None
    student_top1: float | None = None
    verdict: Verdict
    sections: dict[str, Numbers]
    length: int
    documents: int
    notes: list[str]
    seconds: dict[str, float]
    provenance: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Write `report.json` into a folder."""
        atomic_write_text(folder / FILE_NAME, json.dumps(self.to_json(), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> EvalReport:
        """The report in a folder. Raises InputError where it is missing or not valid."""
        path = folder / FILE_NAME
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise InputError(f"{path}: not the report of an evaluation, {where}: {first['msg']}") from error

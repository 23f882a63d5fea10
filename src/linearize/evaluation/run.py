"""`linearize eval`: models and text in, section after section measured, `report.json` and `report.html` out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from linearize.errors import InputError
from linearize.evaluation.context import EvalContext, EvalModel, Numbers, Section, TooLittleTextError
from linearize.evaluation.loading import (
    Origin,
    Placement,
    first_documents,
    held_out_documents,
    load_models,
    unique_names,
)
from linearize.evaluation.numbers import ResultCache
from linearize.evaluation.report.page import write_report_page
from linearize.evaluation.report.schema import FORMAT, EvalReport, ModelEntry
from linearize.evaluation.sections.speed import Speed
from linearize.evaluation.sections.tasks import Tasks
from linearize.evaluation.suites import SUITES, plan_sections, sections_with_text
from linearize.evaluation.terminal import SectionProgress
from linearize.evaluation.verdict import present_sections, verdict
from linearize.metrics.report import provenance
from linearize.modeling.io.hub import LocalCopy, local_copy
from linearize.modeling.probe import keeps_documents_apart
from linearize.storage.disk import not_created, writing
from linearize.storage.files import expand_home
from linearize.storage.locks import output_lock
from linearize.training.data.documents import Document

DEFAULT_LENGTH = 1024
DEFAULT_TOKENS = 65_536


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Options of an evaluation besides models, text and sections.

    `length`: the longest row in tokens (None: the recipe's); `tokens`: whole documents up to about this many; `limit`:
    the most items of each task, and the most documents; `batch`: rows at a time; `seed`: of every draw; `data_root`: a
    folder of chat questions; `include_path`: a folder of task definitions (lm-eval's YAML), which come before
    lm-eval's own; `allow_code`: run the code that models write (HumanEval); `judge_url`, `judge_model`: an
    OpenAI-compatible endpoint. `revision`: of the model, where it is a Hub name; `token`: to read Hub models with
    (None: HF_TOKEN); `dtype`, `device_map`: of all models, as `linearize.load` takes them.
    """

    length: int | None = None
    tokens: int = DEFAULT_TOKENS
    limit: int | None = None
    batch: int = 8
    seed: int = 0
    data_root: Path | None = None
    include_path: Path | None = None
    allow_code: bool = False
    judge_url: str | None = None
    judge_model: str | None = None
    device: str | None = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    dtype: torch.dtype | str | None = None
    device_map: str | dict[str, Any] | None = None

    def check(self) -> None:
        """Raise InputError for a size below what makes sense."""
        least = {"length": 2, "tokens": 2, "limit": 1, "batch": 1, "seed": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise InputError(f"{name} {value}: it must be at least {low}")
        if (self.judge_url is None) != (self.judge_model is None):
            raise InputError("a judge needs both --judge-url and --judge-model")


def evaluate(
    model: str | Path | None = None,
    *,
    compare: Sequence[str | Path] = (),
    teacher: str | Path | None = None,
    data: Sequence[str] | None = None,
    suite: str | None = None,
    tasks: Sequence[str] = (),
    sections: Sequence[Section] | None = None,
    out: str | Path | None = None,
    options: EvaluationOptions | None = None,
) -> EvalReport:
    """Measure students and their teacher on the same items; returns the report.

    `compare`: further students in the same report. `teacher` and `data` default to what the students' own reports
    name; of the data that they were made from only the part that training never saw is used. `suite`: a name of
    `SUITES`; `tasks`: lm-eval's names (`mmlu:5` for five shots), instead of the suite's. `sections`: instead of a
    suite. With `out`, `report.json`, `report.html`, the plots and the files of the sections are written there, and an
    interrupted run continues when called again. A plain transformers model without a teacher is measured alone, as a
    teacher. Raises InputError for what cannot be used, before anything is measured.
    """
    options = options or EvaluationOptions()
    options.check()
    folders = {
        name: Path(expand_home(path)) for name in ("data_root", "include_path") if (path := getattr(options, name))
    }
    options = replace(options, **folders)  # type: ignore[arg-type]
    named = [*([model] if model is not None else []), *compare]
    if not named:
        raise InputError("no model to evaluate: name one, or several with --compare")
    if loaded := [each for each in named if not isinstance(each, (str, Path))]:
        raise InputError(f"a {type(loaded[0]).__name__} given: save the model, and give its folder or Hub name")
    name, planned = plan_sections(suite, tasks, sections, options.include_path)
    teacher = expand_home(teacher) if teacher else None
    places = _places(named, options, first_has_revision=model is not None)
    models = [place.path for place in places]
    final = _checked_out(out, models)
    with contextlib.ExitStack() as stack:
        if final is not None:
            stack.enter_context(output_lock(final))
            stack.enter_context(writing("what the evaluation keeps", final))
            try:
                final.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise not_created(final, error) from error
        notes: list[str] = []
        if name in SUITES and SUITES[name].offline_tasks and not any(isinstance(section, Tasks) for section in planned):
            notes.append("no tasks in this report: the suite runs them where --include-path gives their definitions")
        origins = [Origin.read(path) for path in models]
        eval_models = load_models(
            models, teacher, origins, _placement(options), notes, names=unique_names([place.name for place in places])
        )
        documents: list[Document] = []
        if any(section.NEEDS_TEXT for section in planned):  # text that a teacher must write takes its time
            documents = _documents(list(data or ()), origins, eval_models, options, notes)
        planned = sections_with_text(planned, bool(documents), models, notes)
        ctx = _context(eval_models, documents, origins, options, final)
        commits = {place.name: place.commit for place in places if place.commit is not None}
        able = _with_enough_text(planned, ctx, notes, optional=sections is None)
        return _measured(name, able, ctx, notes, commits)


def bench(
    model: str | Path,
    *,
    teacher: str | Path | None = None,
    out: str | Path | None = None,
    options: EvaluationOptions | None = None,
    **sizes: Any,
) -> EvalReport:
    """`linearize bench`: the section Speed alone; `sizes` are its fields. Returns the report, as `evaluate` does.

    Raises InputError for a size that cannot be measured.
    """
    try:
        section = Speed(**sizes)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"bench: {where} {first['input']}: {first['msg']}") from error
    return evaluate(model, teacher=teacher, sections=[section], out=out, options=options)


def _places(named: Sequence[str | Path], options: EvaluationOptions, *, first_has_revision: bool) -> list[LocalCopy]:
    """The models on this machine; those of the Hub are fetched. Raises InputError."""
    revisions = [options.revision if first_has_revision else None, *[None] * (len(named) - 1)]
    if options.revision is not None and not first_has_revision:
        raise InputError("--revision is of MODEL, which is not given: name it, or leave --revision out")
    return [
        local_copy(path, revision=revision, token=options.token)
        for path, revision in zip(named, revisions, strict=True)
    ]


def _placement(options: EvaluationOptions) -> Placement:
    return Placement(device=options.device, dtype=options.dtype, device_map=options.device_map, token=options.token)


def _with_enough_text(
    planned: Sequence[Section], ctx: EvalContext, notes: list[str], *, optional: bool
) -> list[Section]:
    """The sections that the text is enough for; where they are not `optional`, one that is not among them is an error.

    Raises InputError for what cannot be measured for another reason, or where nothing is left.
    """
    able: list[Section] = []
    for number, section in enumerate(planned):
        try:
            section.check(ctx)
            able.append(section)
        except TooLittleTextError as error:
            if not optional or (not able and number == len(planned) - 1):
                raise
            notes.append(f"not measured: {section.TITLE} ({error})")
    return able


def _measured(
    suite: str, planned: Sequence[Section], ctx: EvalContext, notes: list[str], commits: Mapping[str, str]
) -> EvalReport:
    """The report of what is planned, written to the context's folder where there is one. `commits`: of Hub models."""
    if ctx.one_per_row:
        notes.append(f"{ctx.models[0].name} does not keep the documents of a packed row apart: each has its own row")
    numbers, seconds = _run(planned, ctx)
    presented = present_sections(numbers)
    report = EvalReport(
        format=FORMAT,
        suite=suite,
        contestants=[ModelEntry.of(eval_model) for eval_model in ctx.models],
        **_conversion_losses(numbers.get("language", {}), ctx),
        verdict=verdict([student.name for student in ctx.students], presented),
        sections=numbers,
        length=ctx.length,
        documents=len(ctx.documents),
        notes=notes,
        seconds=seconds,
        provenance=provenance(seed=ctx.seed) | ({"commits": dict(commits)} if commits else {}),
    )
    if ctx.out is not None:
        report.write(ctx.out)
        write_report_page(report, ctx.out, presented)
        shutil.rmtree(_work_folder(ctx.out), ignore_errors=True)
    return report


def _checked_out(out: str | Path | None, models: Sequence[str]) -> Path | None:
    if out is None:
        return None
    final = Path(expand_home(out)).resolve()
    if final.exists() and not final.is_dir():
        raise InputError(f"{out}: exists and is not a folder; give another output folder")
    if (final / "config.json").exists() or any(Path(m).exists() and Path(m).resolve() == final for m in models):
        raise InputError(f"{out}: is a model's folder, whose own report.json would be lost; give another output folder")
    return final


def _documents(
    specs: list[str],
    origins: Sequence[Origin],
    eval_models: Sequence[EvalModel],
    options: EvaluationOptions,
    notes: list[str],
) -> list[Document]:
    """Held-out text; empty where neither the user nor a student's report names any."""
    specs = specs or next((list(origin.report.data) for origin in origins if origin.report is not None), [])
    if not specs:
        return []
    first = eval_models[0]
    teacher = first.model if first.role == "teacher" else None
    documents = held_out_documents(specs, origins, first.tokenizer, teacher, notes)
    return first_documents(documents, tokens=options.tokens, limit=options.limit, notes=notes)


def _context(
    eval_models: tuple[EvalModel, ...],
    documents: list[Document],
    origins: Sequence[Origin],
    options: EvaluationOptions,
    out: Path | None,
) -> EvalContext:
    first = eval_models[0]
    ctx = EvalContext(
        models=eval_models,
        documents=documents,
        texts=[str(first.tokenizer.decode(document.tokens, skip_special_tokens=True)) for document in documents],
        length=options.length or _row_length(origins, first),
        batch=options.batch,
        seed=options.seed,
        limit=options.limit,
        data_root=options.data_root,
        include_path=options.include_path,
        allow_code=options.allow_code,
        judge_url=options.judge_url,
        judge_model=options.judge_model,
        out=out,
        one_per_row=bool(documents) and not keeps_documents_apart(first.model),
    )
    return ctx if out is None else replace(ctx, results=ResultCache(_work_folder(out) / _identity(ctx)))


def _row_length(origins: Sequence[Origin], first: EvalModel) -> int:
    """Tokens per row: what the first student was trained with, else what its model can take."""
    trained = next((origin.data.length for origin in origins if origin.data is not None), None)
    return trained or min(DEFAULT_LENGTH, first.context or DEFAULT_LENGTH)


def _work_folder(out: Path) -> Path:
    """Where results are kept until the report is complete: next to it."""
    return out.parent / f".{out.name}.run"


def _identity(ctx: EvalContext) -> str:
    """Changes with everything that every result depends on."""
    dependencies = {
        "models": [(model.name, model.role, model.fingerprint) for model in ctx.models],
        "documents": [document.tokens for document in ctx.documents],
        "options": [ctx.length, ctx.batch, ctx.seed, ctx.limit, str(ctx.data_root)],
        "include_path": str(ctx.include_path),
        "judge": [ctx.judge_url, ctx.judge_model],
        "package": provenance()["package_version"],
    }
    return hashlib.sha256(json.dumps(dependencies).encode()).hexdigest()[:20]


def _run(planned: Sequence[Section], ctx: EvalContext) -> tuple[dict[str, Numbers], dict[str, float]]:
    """Numbers and seconds of each section; a section that an earlier run finished is not run again."""
    numbers: dict[str, Numbers] = {}
    seconds: dict[str, float] = {}
    with SectionProgress(len(planned)) as progress:
        watched = replace(ctx, progress=progress.step)
        for section in planned:
            progress.begin(section.TITLE)
            began = time.monotonic()
            key = {"section": section.NAME, "config": section.model_dump(mode="json")}
            numbers[section.NAME] = ctx.results.result(key, lambda s=section: s.run(watched))  # type: ignore[misc]
            seconds[section.NAME] = round(time.monotonic() - began, 1)
    return numbers, seconds


def _conversion_losses(language: Numbers, ctx: EvalContext) -> dict[str, Any]:
    """Losses and agreement of the teacher and the first student, under the names that a conversion's report has."""
    if not language:
        return {}
    losses: dict[str, Any] = {"tokens": language["tokens"]}
    if ctx.teacher is not None:
        losses["teacher_loss"] = language["models"][ctx.teacher.name]["loss"]["value"]
    if ctx.students:
        first = language["models"][ctx.students[0].name]
        keys = {"student_loss": "loss", "gap": "gap", "student_kl": "kl", "student_top1": "top1"}
        losses |= {name: first[key]["value"] for name, key in keys.items() if key in first}
    return losses

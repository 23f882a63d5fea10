"""`linearize eval`: a model beside its teacher on held-out text, what each branch brings, a table and plots."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.decoding.loading import is_student, load_any, pad_token
from linearize.errors import InputError
from linearize.evaluation.agreement import Batch, View, score_batches
from linearize.evaluation.branches import window_reach
from linearize.evaluation.language_modeling import PositionBin, ablation_of, ablation_views, report_of
from linearize.evaluation.plots import plot_loss_by_position, plot_stages
from linearize.evaluation.report import ConversionReport, provenance, read_report
from linearize.files import atomic_write_text, read_text
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.teacher import check_model_folder
from linearize.training.data import DataConfig, Document, document_rows, load_documents, split
from linearize.training.pseudo_labels import pseudo_labeller
from linearize.training.sampling import self_sampler

DEFAULT_LENGTH = 1024
DEFAULT_LIMIT = 65_536


def evaluate(
    model_path: str | Path,
    *,
    teacher: str | Path | None = None,
    data: Sequence[str] | None = None,
    out: str | Path | None = None,
    length: int | None = None,
    limit: int = DEFAULT_LIMIT,
    batch: int = 8,
    device: str | None = None,
) -> dict[str, Any]:
    """Loss of a model and its teacher on the same tokens, KL, top-1, loss by position, branch ablation; JSON-able.

    `teacher` and `data` default to what the student's own report names; of the data that the student was made from only
    the part that training never saw is used, and `self` and `pseudo:` are written again by the teacher as the recipe
    says. Whole
    documents up to about `limit` tokens, in rows of at most `length` tokens (default: the recipe's). With `out`,
    `eval.json` and plots are written there. A plain transformers model without a teacher is measured alone, as a
    teacher. Raises InputError for what cannot be used.
    """
    if limit < 2 or batch < 1 or (length is not None and length < 2):
        raise InputError(f"limit {limit}, length {length}, batch {batch}: limit and length must be at least 2, batch 1")
    check_model_folder(str(model_path))
    report = read_report(model_path) if is_student(model_path) else None
    specs = list(data or (report.data if report else ()))
    if not specs:
        raise InputError(f"{model_path}: its folder names no data of its own; give text with --data")
    model, tokenizer = load_any(model_path, device=device)
    notes: list[str] = []
    teacher_path = str(teacher or (report.teacher if report else "")) or None
    teacher_model = _load_teacher(teacher_path, tokenizer, device, notes, required=teacher is not None)
    config = _data_config(model_path)
    documents = _documents(specs, report, config, tokenizer, limit, notes, teacher_model)
    rows = document_rows(documents, length or _length(model_path, model), pad_token_id=pad_token(tokenizer))
    batches = _with_progress(rows.in_order(batch), -(-len(rows) // batch))
    alone = teacher_model is None and not is_student(model_path)
    result = {
        "model": str(model_path),
        "teacher": str(model_path) if alone else teacher_path if teacher_model is not None else None,
        "data": specs,
        "length": rows.length,
        **_measure(None if alone else model, model if alone else teacher_model, batches),
        "notes": notes,
        "provenance": provenance(),
    }
    if out is not None:
        _write(result, report, Path(out))
    return result


def _load_teacher(
    path: str | None, tokenizer: PreTrainedTokenizerBase, device: str | None, notes: list[str], *, required: bool
) -> PreTrainedModel | None:
    """The teacher; None, with a note, where only the report names one and it is not there."""
    if path is None:
        return None
    try:
        model, its_tokenizer = load_any(path, device=device)
    except (InputError, OSError) as error:
        if required:
            raise
        notes.append(f"the recorded teacher {path} cannot be loaded, name one with --teacher ({error})")
        return None
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise InputError(
            f"{path}: its vocabulary is not the model's, so their losses cannot be compared; name the own teacher"
        )
    return model


def _data_config(model_path: str | Path) -> DataConfig | None:
    """The `data` part of a student's recipe; None where there is no recipe."""
    path = Path(model_path) / "recipe.yaml"
    if not path.is_file():
        return None
    try:
        return DataConfig.model_validate((yaml.safe_load(read_text(path)) or {}).get("data", {}))
    except (ValidationError, yaml.YAMLError, AttributeError) as error:
        raise InputError(f"{path}: no valid recipe; take the recipe.yaml that convert wrote") from error


def _documents(
    specs: list[str],
    report: ConversionReport | None,
    config: DataConfig | None,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    notes: list[str],
    teacher: PreTrainedModel | None = None,
) -> list[Document]:
    """The documents to measure on, never those that a student was trained on, as far as its report tells.

    What the teacher wrote for a conversion (`self`, `pseudo:`) it writes again, or reads from its cache.
    """
    seen = [spec for spec in specs if report is not None and spec in report.data]
    answer_only = config is not None and config.answer_only
    settings = config or DataConfig()
    sample = self_sampler(teacher, tokenizer, settings) if teacher is not None else None
    answer = pseudo_labeller(teacher, tokenizer, settings) if teacher is not None else None
    documents = load_documents(specs, tokenizer, sample=sample, answer=answer, answer_only=answer_only)
    if report is not None and config is not None and specs == report.data:
        documents = split(documents, config).heldout
        notes.append("the held-out part of the data that the student was made from")
    elif seen:
        raise InputError(
            f"{', '.join(seen)}: the student was trained on it; give other text, or exactly the data of its conversion "
            "in the same order, of which only the held-out part is used"
        )
    chosen: list[Document] = []
    tokens = 0
    for document in documents:
        if chosen and tokens + len(document) > limit:
            notes.append(f"the first {len(chosen)} of {len(documents)} documents (limit {limit} tokens)")
            break
        chosen.append(document)
        tokens += len(document)
    return chosen


def _length(model_path: str | Path, model: PreTrainedModel) -> int:
    config = _data_config(model_path)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or DEFAULT_LENGTH
    return config.length if config is not None else min(DEFAULT_LENGTH, longest)


def _with_progress(batches: Iterable[Batch], total: int) -> Iterable[Batch]:
    console = Console(stderr=True)
    return track(batches, "measuring", total=total, console=console, transient=True, disable=not sys.stderr.isatty())


def _measure(
    student: PreTrainedModel | None, teacher: PreTrainedModel | None, batches: Iterable[Batch]
) -> dict[str, Any]:
    """One pass with every view that there is: teacher, student, and the student's branches where it has both."""
    views = {"teacher": View(model=teacher)} if teacher is not None else {}
    reach = window_reach(student.config.mixers()) if isinstance(student, LinearizedForCausalLM) else None
    if student is not None:
        views |= {"student": View(model=student)} if reach is None else ablation_views(student)
    scores = score_batches(batches, views, reference="teacher" if teacher is not None else None)
    ablation = None if reach is None else ablation_of(scores, window=reach).to_dict()
    return {**report_of(scores).to_dict(), "ablation": ablation}


def _write(result: dict[str, Any], report: ConversionReport | None, out: Path) -> None:
    """`eval.json` and the plots."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot create the output folder ({error.strerror}); give another one") from error
    plots = plot_loss_by_position([PositionBin(**b) for b in result["by_position"]], out)
    if report is not None:
        plots += plot_stages(report, out)
    result["plots"] = [str(path) for path in plots]
    atomic_write_text(out / "eval.json", json.dumps(result, indent=2) + "\n")


def print_evaluation(result: dict[str, Any], console: Console | None = None) -> None:
    """Tables of an evaluation for people: losses, agreement, branches, loss by position."""
    console = console or Console()
    console.print(_loss_table(result))
    if result["student_kl"] is not None:
        console.print(
            f"KL(teacher||student) {result['student_kl']:.4f} nats per token; "
            f"same most likely token in {result['student_top1']:.1%} of cases"
        )
    if result["ablation"] is not None:
        console.print(_branch_table(result["ablation"]))
    console.print(_position_table(result["by_position"]))
    for note in result["notes"]:
        console.print(f"note: {note}")


def _loss_table(result: dict[str, Any]) -> Table:
    table = _table("", ("loss", "+-", "perplexity"))
    table.title = f"{result['tokens']:,} tokens of {result['documents']:,} documents"
    for name in ("teacher", "student"):
        if result[f"{name}_loss"] is not None:
            cells = (f"{name}_loss", f"{name}_loss_error", f"{name}_perplexity")
            table.add_row(name, *(_number(result[cell]) for cell in cells))
    if result["gap"] is not None:
        table.add_row("gap", _number(result["gap"]), _number(result["gap_error"]), "")
    return table


def _branch_table(ablation: dict[str, Any]) -> Table:
    columns = ("tokens", "teacher", "both", "window", "linear", "share")
    table = _table("branches", columns)
    for key, name in (("all_tokens", "all tokens"), ("beyond_window", f"beyond {ablation['window']} tokens")):
        if ablation[key] is not None:
            table.add_row(name, *(_number(ablation[key][column]) for column in columns))
    return table


def _position_table(bins: Sequence[dict[str, Any]]) -> Table:
    columns = [c for c in ("teacher_loss", "student_loss", "window_loss") if bins and bins[0][c] is not None]
    table = _table("positions", ("tokens", *(column.replace("_loss", "") for column in columns)))
    for b in bins:
        span = f"{b['start']}-{b['end'] - 1}" if b["end"] - b["start"] > 1 else str(b["start"])
        table.add_row(span, _number(b["tokens"]), *(_number(b[column]) for column in columns))
    return table


def _table(first: str, columns: Sequence[str]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _number(value: float | int | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"

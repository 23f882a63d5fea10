"""Students of SmolLM2-135M, or of any teacher: train a row of the table, measure it, print the table.

    python -m benchmarks.smollm2 train window-linear --teacher DIR --data a.jsonl --data b.jsonl --tokens 500k
    python -m benchmarks.smollm2 measure teacher window-linear --teacher DIR --text c.jsonl
    python -m benchmarks.smollm2 table

A row is trained in adapter form into `benchmarks/smollm2/ROW` (the same command continues a run that was stopped) and
measured into `benchmarks/smollm2/ROW.json`. Losses are in nats per token, on text that no row was trained or tuned on.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import linearize
from linearize.decoding.loading import load_any
from linearize.evaluation.run import EvaluationOptions, evaluate
from linearize.evaluation.sections.recall import Recall
from linearize.metrics.intervals import mean_over_documents
from linearize.metrics.report import provenance
from linearize.metrics.token_scores import Batch, TokenScores, View, score_batches
from linearize.modeling.inspect import inspect_model
from linearize.modeling.io.teacher import load_tokenizer
from linearize.numbers import parse_count
from linearize.phases import shown
from linearize.training.data.documents import Document
from linearize.training.data.loading import load_documents
from linearize.training.data.packing import document_rows

FOLDER = Path(os.environ.get("LINEARIZE_SMOLLM2", Path(__file__).parent / "smollm2"))
TASKS = Path(__file__).parent / "tasks"
TASK_NAMES = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "lambada_openai")
TEACHER = "teacher"
LATE = 1024  # losses from this position on have a column of their own
STAGE_2 = {
    "name": "lowrank", "lr": "3e-3", "schedule": "cosine", "warmup": 0.05, "evaluate_every": 0.2, "rank": 16,
    "alpha": 32, "targets": ["all"], "loss": "kl", "train_mixers": True,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """How a student is made: a recipe, and what is set in it besides tokens, batch and length. `low_rank`: the last
    stage is LoRA and mixers with KL, as in `window-linear`, in place of the recipe's own."""

    recipe: str
    settings: dict[str, Any] = field(default_factory=dict)
    low_rank: bool = False


ROWS = {
    "window-alone": Row(
        "window-linear",
        {
            "plan.mixer": {"name": "sliding_window", "window": 64, "window_shape": "terraced", "num_sinks": 1},
            "stages.0.tokens": 0,
        },
    ),
    "lolcats": Row("lolcats"),
    "window-linear": Row("window-linear", {"stages.0.lr": "3e-2"}),
    **{
        f"{mixer}-{share}": Row(recipe, {"plan.layers.keep": share / 100} if share else {"plan.layers": "all"}, True)
        for mixer, recipe in (("gdn-hybrid", "gdn-hybrid"), ("mamba2", "mamba2-in-llama"))
        for share in (50, 25, 0)
    },
}  # fmt: skip


def train(name: str, options: argparse.Namespace) -> None:
    """Convert one row into its folder in adapter form."""
    tokens, length, batch = options.tokens, options.length, options.batch
    row = ROWS[name]
    recipe = linearize.load_recipe(row.recipe)
    overrides: dict[str, Any] = {"data.length": length}
    if row.low_rank:
        document = recipe.model_dump(mode="json")
        first = [stage for stage in document["stages"] if stage["name"] == "hidden_alignment"][:1]
        document["stages"] = [*first, {**STAGE_2, "tokens": tokens}]
        recipe = type(recipe).from_data(document)
    for number, stage in enumerate(recipe.stages):
        settings = {"tokens": tokens, "batch": batch, "precision": options.precision}
        overrides |= {f"stages.{number}.{key}": value for key, value in settings.items()}
        if stage.length is not None:
            overrides[f"stages.{number}.length"] = length
    linearize.convert(
        options.teacher,
        recipe=recipe,
        data=options.data,
        out=FOLDER / name,
        overrides=overrides | row.settings,
        adapter_only=True,
    )


def measure(name: str, teacher: str, text: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Losses at two lengths, recall, tasks and state bytes of a row."""
    path = teacher if name == TEACHER else str(FOLDER / name)
    guide, tokenizer = load_any(teacher)
    student = guide if name == TEACHER else load_any(teacher, adapter=path)[0]
    documents = load_documents(list(text), load_tokenizer(teacher))
    torch.set_flush_denormal(True)
    numbers: dict[str, Any] = {"name": name, "provenance": provenance(seed=0)}
    for length in options.lengths:
        rows = first_rows(documents, length, max(1, options.loss_tokens // length), tokenizer.eos_token_id)
        numbers[f"loss at {length}"] = losses(guide, None if name == TEACHER else student, rows)
    numbers["cache"] = inspect_model(path, contexts=[4096])["cache"]
    if name != TEACHER:
        report = json.loads((FOLDER / name / "report.json").read_text(encoding="utf-8"))
        numbers["stages"] = [{key: stage[key] for key in ("name", "tokens", "seconds")} for stage in report["stages"]]
    del guide, student
    if options.recall:
        recall = Recall(lengths=tuple(options.recall), depths=(0.1, 0.5, 0.9), items=options.items)
        numbers["recall"] = evaluate(path, teacher=teacher, sections=[recall], data=text).sections["recall"]
    if options.limit:
        settings = EvaluationOptions(limit=options.limit, include_path=TASKS)
        numbers["tasks"] = evaluate(path, teacher=teacher, tasks=TASK_NAMES, options=settings).sections["tasks"]
    return numbers


def first_rows(documents: Sequence[Document], length: int, count: int, pad: int) -> list[Batch]:
    """The first `length` tokens of the first `count` documents that have so many, one row to a batch."""
    long = [document for document in documents if len(document) >= length][:count]
    cut = [Document(document.tokens[:length], document.loss_mask[:length]) for document in long]
    return list(document_rows(cut, length, pad_token_id=pad).in_order(1))


def losses(teacher: Any, student: Any, rows: Sequence[Batch]) -> dict[str, Any]:
    """The teacher's loss, and of a student its gap, KL, agreement, its gap beyond `LATE`, and that of its window."""
    views = {"teacher": View(model=teacher)}
    if student is not None:
        views["student"] = View(model=student)
        if any(getattr(mixer, "name", None) == "lolcats" for mixer in student.config.mixers()):
            views["window"] = View(model=student, branch="window")
    scores = score_batches(rows, views, reference="teacher")
    late = scores.positions >= LATE
    numbers = {"documents": len(rows), "teacher": _mean(scores, scores.loss["teacher"])}
    for view in list(views)[1:]:
        gap = scores.loss[view] - scores.loss["teacher"]
        numbers[view] = {
            "gap": _mean(scores, gap), "kl": _mean(scores, scores.kl[view]), "top1": _mean(scores, scores.top1[view]),
            "gap beyond": float(gap[late].mean()) if late.any() else None,
        }  # fmt: skip
    return numbers


def table() -> str:
    """Losses of all measured rows as a table in Markdown."""
    measured = [
        json.loads((FOLDER / f"{name}.json").read_text("utf-8")) for name in ROWS if (FOLDER / f"{name}.json").is_file()
    ]
    lengths = sorted({int(key.split()[-1]) for row in measured for key in row if key.startswith("loss at ")})
    head = [
        "row",
        "tokens",
        *(f"{what} at {length}" for length in lengths for what in ("gap", "KL", "top-1", "window alone")),
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in measured:
        cells = [row["name"], str(max((stage["tokens"] for stage in row["stages"]), default=0))]
        for length in lengths:
            losses_at = row[f"loss at {length}"]
            student, window = losses_at["student"], losses_at.get("window")
            cells += [f"{student[key][0]:.3f}" for key in ("gap", "kl", "top1")]
            cells.append(f"{window['gap'][0]:.3f}" if window else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(scores: TokenScores, values: torch.Tensor) -> list[float | None]:
    """Mean and standard error over documents."""
    mean = mean_over_documents(values, scores.documents)
    return [mean.value, mean.error]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    trains, measures = verbs.add_parser("train"), verbs.add_parser("measure")
    trains.add_argument("row", choices=ROWS)
    trains.add_argument("--data", action="append", required=True)
    trains.add_argument("--tokens", type=parse_count, default=500_000, help="of each stage")
    trains.add_argument("--length", type=parse_count, default=2048)
    trains.add_argument("--batch", type=int, default=1)
    trains.add_argument("--precision", choices=["fp32", "bf16"], default="bf16", help="fp32 where bf16 is slower")
    measures.add_argument("rows", nargs="+", choices=[TEACHER, *ROWS])
    measures.add_argument("--text", action="append", required=True)
    measures.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    measures.add_argument("--loss-tokens", type=parse_count, default=32_768)
    measures.add_argument(
        "--recall", type=int, nargs="*", default=[512, 1024, 2048, 4096], help="lengths; none: leave out"
    )
    measures.add_argument("--items", type=int, default=4)
    measures.add_argument("--limit", type=int, default=200, help="items of each task; 0: no tasks")
    verbs.add_parser("table")
    for verb in (trains, measures):
        verb.add_argument("--teacher", required=True)
    options = parser.parse_args(arguments)
    with shown():
        if options.verb == "train":
            train(options.row, options)
            return
        if options.verb == "table":
            print(table())
            return
        for name in options.rows:
            numbers = measure(name, options.teacher, options.text, options)
            FOLDER.mkdir(exist_ok=True)
            (FOLDER / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
            print(json.dumps({key: value for key, value in numbers.items() if key.startswith("loss")}), flush=True)


if __name__ == "__main__":
    main()

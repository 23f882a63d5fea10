"""What the demo prints: progress while the teacher writes, then the tables."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from linearize.demo.run import DemoResult

SECONDS_BETWEEN_LINES = 5.0


class LineOrBar:
    """Progress of a count on stderr: one line that is rewritten on a terminal, else a new line now and then."""

    def __init__(self, what: str) -> None:
        self.what, self.began, self.last = what, time.monotonic(), 0.0

    def update(self, done: int, wanted: int) -> None:
        """`done` of `wanted` tokens are there."""
        now, live = time.monotonic(), sys.stderr.isatty()
        if not live and done < wanted and now - self.last < SECONDS_BETWEEN_LINES:
            return
        self.last = now
        speed = done / max(now - self.began, 1e-9)
        line = f"{self.what}: {done:,} of {wanted:,} tokens, {speed:,.0f} tokens/s"
        end = "\r" if live and done < wanted else "\n"
        print(line, end=end, file=sys.stderr, flush=True)


def show_demo(result: DemoResult, folder: Path, console: Console) -> None:
    """All tables, the two continuations, and where everything lies."""
    for table in (_losses(result), _recall(result), _costs(result)):
        console.print()
        console.print(table)
    console.print(f"\nThe same prompt continued, greedily: {result.prompt!r}")
    for name, text in result.continuations.items():
        console.print(f"\n[bold]{name}[/bold]  {escape(' '.join(text.split()))}")
    console.print(_where(result, folder), soft_wrap=True)


def _losses(result: DemoResult) -> Table:
    report = result.report
    rows = [("teacher", report.teacher_loss), ("bare swap", report.swap_loss)]
    rows += [(f"after {stage.name}", stage.loss_after) for stage in report.stages]
    if report.ablation is not None:
        rows.append(("student, window alone", report.ablation["all_tokens"]["window"]))
    table = Table("", title=f"Loss, nats per token ({report.heldout_tokens:,} held-out tokens)")
    for column in ("loss", "above the teacher"):
        table.add_column(column, justify="right")
    for name, loss in rows:
        table.add_row(name, f"{loss:.4f}", "" if name == "teacher" else f"{loss - report.teacher_loss:+.4f}")
    return table


def _recall(result: DemoResult) -> Table:
    table = Table("tokens back to the fact", title=f"Recall beyond the window (at most {result.window} tokens)")
    for column in ("questions", *result.recall):
        table.add_column(column, justify="right")
    reports = list(result.recall.values())
    for bins in zip(*(report.by_distance for report in reports), strict=True):
        table.add_row(f"{bins[0].start}-{bins[0].end - 1}", str(bins[0].items), *(f"{b.accuracy:.0%}" for b in bins))
    table.add_row("all", str(reports[0].items), *(f"{report.accuracy:.0%}" for report in reports), end_section=True)
    return table


def _costs(result: DemoResult) -> Table:
    table = Table("context", title="Decoding one token, and the cache it needs (teacher: preallocated cache)")
    for column in ("teacher ms", "student ms", "teacher cache", "student cache"):
        table.add_column(column, justify="right")
    by_context: dict[int, dict[str, tuple[str, str]]] = {}
    for cost in result.costs:
        row = by_context.setdefault(cost.context, {})
        row[cost.model] = (f"{cost.ms_per_token:.2f}", f"{cost.cache_bytes / 1024:,.0f} KiB")
    for context, row in by_context.items():
        (teacher_ms, teacher_cache), (student_ms, student_cache) = row["teacher"], row["student"]
        table.add_row(f"{context:,}", teacher_ms, student_ms, teacher_cache, student_cache)
    return table


def _where(result: DemoResult, folder: Path) -> str:
    text, seconds = result.text, result.seconds
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    return (
        f"\nText: {text.num_stories} stories sampled from the teacher, and {text.num_recall} documents with facts "
        f"hidden in such stories.\nTime: {sum(seconds.values()):.0f} s ({parts})."
        f"\nPlots: {folder / 'plots'}   numbers: {folder / 'demo.json'}   student: {folder / 'student'}"
        f"\nNext:  linearize generate {folder / 'student'} --prompt 'Once upon a time'"
    )

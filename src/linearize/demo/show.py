"""What the demo prints: progress while the teacher writes, then the tables."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from linearize.tables import print_table

if TYPE_CHECKING:
    from linearize.demo.run import DemoResult

SECONDS_BETWEEN_LINES = 5.0


class LineOrBar:
    """Progress of a count on stderr: one line that is rewritten on a terminal, else a new line now and then."""

    def __init__(self, what: str) -> None:
        self.what, self.began, self.last = what, time.monotonic(), 0.0

    def update(self, done: int, total: int) -> None:
        """Print that `done` of `total` tokens are written."""
        now, live = time.monotonic(), sys.stderr.isatty()
        if not live and done < total and now - self.last < SECONDS_BETWEEN_LINES:
            return
        self.last = now
        speed = done / max(now - self.began, 1e-9)
        line = f"{self.what}: {done:,} of {total:,} tokens, {speed:,.0f} tokens/s"
        end = "\r" if live and done < total else "\n"
        print(line, end=end, file=sys.stderr, flush=True)


def show_demo(result: DemoResult, folder: Path, console: Console) -> None:
    """Print all tables, the two continuations, and where the files are."""
    tokens = f"{result.report.heldout_tokens:,} held-out tokens"
    print_table(console, _losses(result), title=f"\nLoss, nats per token ({tokens})")
    print_table(console, _recall(result), title=f"\nRecall beyond the window (at most {result.window} tokens)")
    title = "\nDecoding one token, and the cache it needs (teacher: preallocated cache)"
    print_table(console, _costs(result), title=title)
    console.print(f"\nThe same prompt continued, greedily: {result.prompt!r}")
    for name, text in result.continuations.items():
        console.print(Text.assemble("\n", (name, "bold"), f"  {' '.join(text.split())}"))
    console.print(_where(result, folder), soft_wrap=True)


def _losses(result: DemoResult) -> list[dict[str, str]]:
    report = result.report
    losses = [("bare swap", report.swap_loss)]
    losses += [(f"after {stage.name}", stage.loss_after) for stage in report.stages]
    if report.ablation is not None:
        losses.append(("student, window alone", report.ablation["all_tokens"]["window"]))
    rows = [{"": "teacher", "loss": f"{report.teacher_loss:.4f}"}]
    for name, loss in losses:
        rows.append({"": name, "loss": f"{loss:.4f}", "above the teacher": f"{loss - report.teacher_loss:+.4f}"})
    return rows


def _recall(result: DemoResult) -> list[dict[str, str]]:
    reports = result.recall
    first = next(iter(reports.values()))
    rows = []
    for i, distances in enumerate(first.by_distance):
        shares = {name: f"{report.by_distance[i].accuracy:.0%}" for name, report in reports.items()}
        span = f"{distances.start}-{distances.end - 1}"
        rows.append({"tokens back to the fact": span, "questions": str(distances.items), **shares})
    shares = {name: f"{report.accuracy:.0%}" for name, report in reports.items()}
    return [*rows, {"tokens back to the fact": "all", "questions": str(first.items), **shares}]


def _costs(result: DemoResult) -> list[dict[str, str]]:
    rows: dict[int, dict[str, str]] = {}
    for cost in result.costs:
        row = rows.setdefault(cost.context, {"context": f"{cost.context:,}"})
        row[f"{cost.model} ms"] = f"{cost.ms_per_token:.2f}"
    for cost in result.costs:
        rows[cost.context][f"{cost.model} cache"] = f"{cost.cache_bytes / 1024:,.0f} KiB"
    return list(rows.values())


def _where(result: DemoResult, folder: Path) -> str:
    text, seconds = result.text, result.seconds
    parts = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    return (
        f"\nText: {text.num_stories} stories sampled from the teacher, and {text.num_recall} documents with facts "
        f"hidden in such stories.\nTime: {sum(seconds.values()):.0f} s ({parts})."
        f"\nPlots: {folder / 'plots'}   numbers: {folder / 'demo.json'}   student: {folder / 'student'}"
        f"\nNext:  linearize generate {folder / 'student'} --prompt 'Once upon a time'"
    )

"""Benchmark tasks by lm-eval: its runner, definitions and metrics; teacher and students on the same items."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from linearize.errors import InputError
from linearize.evaluation.context import EvalContext, Numbers, Section, SectionView, Stat
from linearize.evaluation.harness.catalogue import Entry, entries
from linearize.evaluation.harness.contrast import summary
from linearize.evaluation.harness.definitions import need_harness
from linearize.evaluation.harness.folder import write_definitions
from linearize.evaluation.harness.local_files import missing, refuse
from linearize.evaluation.harness.model import Pairs
from linearize.evaluation.harness.outcome import Outcome
from linearize.evaluation.harness.run import Run
from linearize.evaluation.sections.tasks.present import headline, present

DEFAULT_TASKS = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "mmlu:5")


class Tasks(Section):
    """`tasks`: names, with the shots behind a colon where they are not the usual ones (`mmlu:5`). `limit`: items per
    task (of each subject for MMLU), where the context names none."""

    NAME: ClassVar[str] = "tasks"
    TITLE: ClassVar[str] = "Tasks"

    tasks: tuple[str, ...] = DEFAULT_TASKS
    limit: int | None = None

    @property
    def needs_text(self) -> bool:
        """Tasks bring their own text."""
        return False

    def check(self, ctx: EvalContext) -> None:
        """Raise InputError for an unknown task, a missing local file, code that may not run, or lm-eval missing."""
        need_harness()
        chosen = self._chosen(ctx)
        if not chosen:
            raise InputError("no task is left: the files of all of them are missing; name others, or give their files")
        running = [entry.task for entry in chosen if entry.known and entry.known.executes]
        if running and not ctx.allow_code:
            raise InputError(
                f"{', '.join(running)}: runs what the model writes; allow it with --allow-code-execution "
                "(in a container), or leave it out"
            )

    def run(self, ctx: EvalContext) -> Numbers:
        """Every task on every model, results kept one by one."""
        chosen = self._chosen(ctx)
        limit = ctx.limit if ctx.limit is not None else self.limit
        with _folder(ctx) as folder:
            write_definitions(chosen, ctx.data_root, folder)
            run = Run.prepare(ctx, folder, limit)
            found: dict[str, dict[str, Outcome]] = {eval_model.name: {} for eval_model in ctx.models}
            for number, entry in enumerate(chosen):
                pairs = Pairs()
                for eval_model in ctx.models:
                    ctx.progress(f"{entry.task}, {eval_model.name}", number, len(chosen))
                    found[eval_model.name] |= run.outcomes(entry, eval_model, pairs)
            facts = run.facts(chosen)
        asked = entries(self.tasks, ctx.include_path)
        lacking = missing(asked, ctx.data_root) if ctx.data_root else {}
        return {**facts, "missing": lacking, **summary(found, ctx.teacher.name if ctx.teacher else None)}

    def _chosen(self, ctx: EvalContext) -> tuple[Entry, ...]:
        """What is measured: all, or without the missing ones."""
        found = entries(self.tasks, ctx.include_path)
        if ctx.data_root is None:
            return found
        lacking = missing(found, ctx.data_root)
        if lacking and not ctx.skip_missing:
            raise refuse(lacking, ctx.data_root)
        return tuple(entry for entry in found if entry.task not in lacking)

    @classmethod
    def present(cls, numbers: Numbers) -> SectionView:
        """Table, differences, plot and judgements."""
        return present(numbers)

    @classmethod
    def headline(cls, numbers: Numbers) -> Mapping[str, Sequence[Stat]]:
        """The share of the teacher's score above chance, and MMLU beside it."""
        return headline(numbers)


@contextmanager
def _folder(ctx: EvalContext) -> Iterator[Path]:
    """Where the definitions lie: beside the report, so that lm-eval's own command can read them."""
    if ctx.out is not None:
        yield ctx.out / "tasks"
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "tasks"

"""Benchmark tasks by lm-eval: its runner, definitions and metrics; teacher and students on the same items."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from linearize.errors import InputError
from linearize.evaluation.context import Numbers, Section, Setting, Shown, Tile
from linearize.evaluation.harness.catalogue import Entry, entries
from linearize.evaluation.harness.contrast import summary
from linearize.evaluation.harness.definitions import need_harness
from linearize.evaluation.harness.folder import write_definitions
from linearize.evaluation.harness.local_files import missing, refuse
from linearize.evaluation.harness.model import Pairs
from linearize.evaluation.harness.outcome import Outcome
from linearize.evaluation.harness.run import Run
from linearize.evaluation.harness.showing import show_tasks, task_tiles

DEFAULT_TASKS = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "mmlu:5")


class Tasks(Section):
    """`tasks`: names, with the shots behind a colon where they are not the usual ones (`mmlu:5`). `limit`: items per
    task (of each subject for MMLU), where the setting names none."""

    NAME: ClassVar[str] = "tasks"
    TITLE: ClassVar[str] = "Tasks"

    tasks: tuple[str, ...] = DEFAULT_TASKS
    limit: int | None = None

    @property
    def needs_text(self) -> bool:
        """Tasks bring their own text."""
        return False

    def check(self, setting: Setting) -> None:
        """Raise InputError for an unknown task, a missing local file, code that may not run, or lm-eval missing."""
        need_harness()
        chosen = self._chosen(setting)
        if not chosen:
            raise InputError("no task is left: the files of all of them are missing; name others, or give their files")
        running = [entry.task for entry in chosen if entry.known and entry.known.executes]
        if running and not setting.allow_code:
            raise InputError(
                f"{', '.join(running)}: runs what the model writes; allow it with --allow-code-execution "
                "(in a container), or leave it out"
            )

    def run(self, setting: Setting) -> Numbers:
        """Every task on every contestant, results kept one by one."""
        chosen = self._chosen(setting)
        limit = setting.limit if setting.limit is not None else self.limit
        with _folder(setting) as folder:
            write_definitions(chosen, setting.data_root, folder)
            run = Run.prepare(setting, folder, limit)
            found: dict[str, dict[str, Outcome]] = {contestant.name: {} for contestant in setting.contestants}
            for number, entry in enumerate(chosen):
                pairs = Pairs()
                for contestant in setting.contestants:
                    setting.progress(f"{entry.task}, {contestant.name}", number, len(chosen))
                    found[contestant.name] |= run.outcomes(entry, contestant, pairs)
            facts = run.facts(chosen)
        asked = entries(self.tasks, setting.include_path)
        lacking = missing(asked, setting.data_root) if setting.data_root else {}
        return {**facts, "missing": lacking, **summary(found, setting.teacher.name if setting.teacher else None)}

    def _chosen(self, setting: Setting) -> tuple[Entry, ...]:
        """What is measured: all, or without the missing ones."""
        found = entries(self.tasks, setting.include_path)
        if setting.data_root is None:
            return found
        lacking = missing(found, setting.data_root)
        if lacking and not setting.skip_missing:
            raise refuse(lacking, setting.data_root)
        return tuple(entry for entry in found if entry.task not in lacking)

    @classmethod
    def show(cls, numbers: Numbers) -> Shown:
        """Table, differences, plot and judgements."""
        return show_tasks(numbers)

    @classmethod
    def headline(cls, numbers: Numbers) -> Mapping[str, Sequence[Tile]]:
        """The share of the teacher's score above chance, and MMLU beside it."""
        return task_tiles(numbers)


@contextmanager
def _folder(setting: Setting) -> Iterator[Path]:
    """Where the definitions lie: beside the report, so that lm-eval's own command can read them."""
    if setting.out is not None:
        yield setting.out / "tasks"
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "tasks"

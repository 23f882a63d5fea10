"""Benchmark tasks by lm-eval: its runner, definitions and metrics; teacher and students on the same items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from linearize.errors import InputError
from linearize.evaluation.context import EvalContext, Numbers, Section, SectionView, Stat
from linearize.evaluation.harness.definitions import load, need_harness, task_specs
from linearize.evaluation.harness.outcome import Outcome, average_share, averages, contrast, mean, standard_error
from linearize.evaluation.harness.run import Run
from linearize.evaluation.sections.tasks.present import TaskScore, TasksNumbers, headline, present
from linearize.metrics.branches import longest_reach

DEFAULT_TASKS = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "mmlu:5")


class Tasks(Section):
    """`tasks`: names, with the shots behind a colon where they are not the usual ones (`mmlu:5`). `limit`: items per
    task (of each subject for MMLU), where the context names none."""

    NAME: ClassVar[str] = "tasks"
    TITLE: ClassVar[str] = "Tasks"
    NEEDS_TEXT: ClassVar[bool] = False

    tasks: tuple[str, ...] = DEFAULT_TASKS
    limit: int | None = None

    def check(self, ctx: EvalContext) -> None:
        """Raise InputError for an unknown task, code that may not run, or lm-eval missing."""
        need_harness()
        specs = task_specs(self.tasks, ctx.include_path)
        _check_code(ctx, [spec.task for spec in specs if spec.executes_code])

    def run(self, ctx: EvalContext) -> Numbers:
        """Every task on every model, results kept one by one."""
        import lm_eval

        specs = task_specs(self.tasks, ctx.include_path)
        run = Run.prepare(ctx, ctx.limit if ctx.limit is not None else self.limit)
        outcomes: dict[str, dict[str, Outcome]] = {eval_model.name: {} for eval_model in ctx.models}
        notes, commands = {}, {}
        for number, spec in enumerate(specs):
            task, length = load(spec, allow_code=ctx.allow_code), run.length
            _check_code(ctx, [spec.task] if task.executes_code else [])
            for eval_model in ctx.models:
                ctx.progress(f"{spec.task}, {eval_model.name}", number, len(specs))
                measured = run.measure(task, eval_model)
                outcomes[eval_model.name] |= measured.outcomes
                length = max(length, measured.max_length)
            commands[spec.task] = run.command(task, ctx.models[0], length)
            if note := run.note(task, length):
                notes[spec.task] = note
        teacher = outcomes[ctx.teacher.name] if ctx.teacher else {}
        students = {m.name: outcomes[m.name] for m in ctx.students} if ctx.teacher else {}
        reach = min((tokens for m in ctx.models if (tokens := longest_reach(m.plan)) is not None), default=None)
        return TasksNumbers(
            lm_eval=lm_eval.__version__,
            source=", ".join(dict.fromkeys(str(spec.folder or "Hugging Face Hub") for spec in specs)),
            batch=run.batch,
            max_length=run.length,
            limit=run.limit,
            notes=notes,
            commands=commands,
            window_reach=reach,
            models={
                name: {task: task_score(row, reach) for task, row in rows.items()} for name, rows in outcomes.items()
            },
            averages={name: averages(rows) for name, rows in outcomes.items()},
            against_teacher={
                name: {task: contrast(teacher[task], row) for task, row in rows.items()}
                for name, rows in students.items()
            },
            kept={name: average_share(teacher, rows) for name, rows in students.items()},
        ).to_json()

    @classmethod
    def present(cls, numbers: Numbers) -> SectionView:
        return present(TasksNumbers.model_validate(numbers))

    @classmethod
    def headline(cls, numbers: Numbers) -> Mapping[str, Sequence[Stat]]:
        return headline(TasksNumbers.model_validate(numbers))


def task_score(row: Outcome, reach: int | None = None) -> TaskScore:
    """Reduce the scores of items to their mean; `reach`: tokens that a student's window holds."""
    return TaskScore(
        **row.model_dump(exclude={"items", "chance", "tokens"}),
        score=mean(row.items),
        stderr=standard_error(row.items),
        chance=mean(row.chance),
        inside_window=None if reach is None else mean([float(tokens <= reach) for tokens in row.tokens]),
    )


def _check_code(ctx: EvalContext, executing: Sequence[str]) -> None:
    if executing and not ctx.allow_code:
        raise InputError(
            f"{', '.join(executing)}: runs what the model writes; allow it with --allow-code-execution "
            "(in a container), or leave it out"
        )

"""The sections of an evaluation in the order of a report, and the suites: which of them, with what sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from linearize.errors import InputError, unknown
from linearize.evaluation.context import Section
from linearize.evaluation.sections.branches import Branches
from linearize.evaluation.sections.chat import Chat
from linearize.evaluation.sections.cloze import Cloze
from linearize.evaluation.sections.consistency import Consistency
from linearize.evaluation.sections.language import Language
from linearize.evaluation.sections.layers import Layers
from linearize.evaluation.sections.letters import Letters
from linearize.evaluation.sections.recall import Recall
from linearize.evaluation.sections.speed import Speed
from linearize.evaluation.sections.tasks import Tasks

SECTIONS: dict[str, type[Section]] = {
    section.NAME: section
    for section in (Consistency, Language, Branches, Layers, Cloze, Letters, Recall, Tasks, Chat, Speed)
}
LOLCATS_TASKS = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "mmlu:5")
OPEN_LLM_TASKS = ("arc_challenge:25", "hellaswag:10", "mmlu:5", "truthfulqa_mc2:0", "winogrande:5", "gsm8k:5")
MAMBA_TASKS = (
    "winogrande", "piqa", "hellaswag", "arc_easy", "arc_challenge", "mmlu:5", "openbookqa", "truthfulqa_mc2",
    "pubmedqa", "race", "gsm8k:5",
)  # fmt: skip
QUICK_TASKS = ("piqa", "arc_easy")
DEFAULT_SUITE = "held-out"


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What is measured, in the order of the report.

    `offline_tasks`: the tasks where a folder of definitions is given (`--include-path`), in place of the section's.
    """

    description: str
    sections: tuple[Section, ...]
    offline_tasks: tuple[Section, ...] = ()


SUITES: dict[str, Suite] = {
    "held-out": Suite(
        description="loss, agreement and branches on held-out text; what runs without a suite",
        sections=(Language(), Branches(per_layer=False)),
    ),
    "quick": Suite(
        description="every kind of measurement at small sizes: minutes for a small model on a laptop",
        sections=(
            Consistency(),
            Language(),
            Branches(),
            Layers(),
            Cloze(items=96),
            Recall(lengths=(128, 256, 384), depths=(0.1, 0.5, 0.9), items=4, keys=(1, 2, 4), passkey="needle"),
            Speed(contexts=(256, 1024, 4096), repeats=3),
        ),
        offline_tasks=(Tasks(tasks=QUICK_TASKS, limit=50),),
    ),
    "lolcats": Suite(
        description="the tasks of the LoLCATs paper, zero-shot, MMLU five-shot",
        sections=(Consistency(), Language(), Branches(), Cloze(), Letters(), Tasks(tasks=LOLCATS_TASKS)),
    ),
    "open-llm": Suite(
        description="the Open LLM Leaderboard (first edition) with its shots",
        sections=(Consistency(), Language(), Tasks(tasks=OPEN_LLM_TASKS)),
    ),
    "mamba-in-llama": Suite(
        description="the tasks of The Mamba in the Llama, GSM8K by generation; with --include-path, CRUX too",
        sections=(Consistency(), Language(), Tasks(tasks=MAMBA_TASKS)),
        offline_tasks=(Tasks(tasks=(*MAMBA_TASKS, "cruxeval")),),
    ),
    "long-context": Suite(
        description="loss by position, branches, needles, passkey, associative recall, speed at long contexts",
        sections=(Consistency(), Language(), Branches(), Layers(), Cloze(), Letters(), Recall(), Speed()),
    ),
    "chat": Suite(description="MT-Bench and AlpacaEval answers, judged where a judge is given", sections=(Chat(),)),
}


def plan_sections(
    suite: str | None, tasks: Sequence[str], sections: Sequence[Section] | None, include_path: Path | None
) -> tuple[str, tuple[Section, ...]]:
    """The name of what is measured, and its sections: `sections`, or the suite's with `tasks` in place of its own.

    Raises InputError for an unknown suite, and for a folder of task definitions without tasks.
    """
    if sections is not None:
        return "sections", tuple(sections)
    if suite is None and tasks:
        return "tasks", (Tasks(tasks=tuple(tasks)),)
    name = suite or DEFAULT_SUITE
    if name not in SUITES:
        raise unknown("suite", name, SUITES)
    offline = SUITES[name].offline_tasks if include_path is not None else ()
    planned = SUITES[name].sections
    if own := (Tasks(tasks=tuple(tasks)),) if tasks else offline:
        planned = (*(section for section in planned if not isinstance(section, Tasks)), *own)
    if include_path is not None and not any(isinstance(section, Tasks) for section in planned):
        raise InputError(f"include path {include_path} without tasks of it: name them with --tasks A,B")
    return name, planned


def sections_with_text(
    planned: Sequence[Section], text: bool, models: Sequence[str], notes: list[str]
) -> tuple[Section, ...]:
    """The sections that can run: without text only those that need none."""
    able = tuple(section for section in planned if text or not section.NEEDS_TEXT)
    if not able:
        raise InputError(f"{', '.join(models)}: no data named in the model's folder; give text with --data")
    skipped = [section.TITLE for section in planned if section not in able]
    if skipped:
        notes.append(f"no held-out text, so not measured: {', '.join(skipped)}; give text with --data")
    return able

"""The tasks that we know by name: shots, the metric reported first, and the local file that stands in for the Hub.

Every definition is lm-eval's own but `cruxeval`'s: lm-eval's samples ten answers and executes them; ours takes one
greedy answer and compares literals.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from linearize.errors import InputError, unknown
from linearize.evaluation.harness import originals
from linearize.evaluation.harness.definitions import own_names, task_manager

CHOICES = ("query", "choices", "gold")


@dataclass(frozen=True, kw_only=True)
class Known:
    """A task: `definition` in lm-eval's task folder, the Hub data set, the metric reported first (`name,filter`).

    `file`: its place in a folder of local files, `fields` what a line holds, `original` turns a line into a row of
    the Hub's. `split`: the one measured. `own_shots`: the definition brings its examples, else few-shot examples come
    from the measured file (the measured item left out), since the local layout holds no training split.
    `generates`: at most so many tokens of greedy text, instead of scored choices. `executes`: runs what the model
    wrote.
    """

    definition: str
    hub: str
    metric: str
    split: str
    file: str
    fields: tuple[str, ...]
    original: Callable[[Any], dict[str, Any]] = originals.unchanged
    shots: int | None = None
    own_shots: bool = False
    generates: int = 0
    executes: bool = False
    note: str = ""
    local_note: str = ""


KNOWN: dict[str, Known] = {
    "piqa": Known(
        definition="piqa/piqa.yaml", hub="baber/piqa", metric="acc,none", split="validation",
        file="multiple_choice/piqa.jsonl", fields=CHOICES, original=originals.piqa,
    ),
    "arc_easy": Known(
        definition="arc/arc_easy.yaml", hub="allenai/ai2_arc (ARC-Easy)", metric="acc,none", split="test",
        file="multiple_choice/arc_easy.jsonl", fields=CHOICES, original=originals.arc,
    ),
    "arc_challenge": Known(
        definition="arc/arc_challenge.yaml", hub="allenai/ai2_arc (ARC-Challenge)", metric="acc_norm,none",
        split="test", file="multiple_choice/arc_challenge.jsonl", fields=CHOICES, original=originals.arc,
    ),
    "hellaswag": Known(
        definition="hellaswag/hellaswag.yaml", hub="Rowan/hellaswag", metric="acc_norm,none", split="validation",
        file="hellaswag_val_1000.jsonl", fields=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        original=originals.hellaswag, local_note="the local file holds 1,000 of the 10,042 items",
    ),
    "winogrande": Known(
        definition="winogrande/default.yaml", hub="allenai/winogrande (winogrande_xl)", metric="acc,none",
        split="validation", file="multiple_choice/winogrande.jsonl",
        fields=("context_options", "continuation", "gold"), original=originals.winogrande,
    ),
    "mmlu": Known(
        definition="mmlu/default", hub="cais/mmlu", metric="acc,none", split="test",
        file="mmlu/{dev,test}/SUBJECT_{dev,test}.csv", fields=("question", "A", "B", "C", "D", "answer"),
        original=originals.mmlu, shots=5, own_shots=True,
    ),
    "openbookqa": Known(
        definition="openbookqa/openbookqa.yaml", hub="allenai/openbookqa", metric="acc_norm,none", split="test",
        file="multiple_choice/openbook_qa.jsonl", fields=CHOICES, original=originals.openbookqa,
    ),
    "race": Known(
        definition="race/race.yaml", hub="EleutherAI/race (high)", metric="acc,none", split="test",
        file="multiple_choice/race.jsonl", fields=("article", "problems"),
    ),
    "truthfulqa_mc2": Known(
        definition="truthfulqa/truthfulqa_mc2.yaml", hub="truthfulqa/truthful_qa (multiple_choice)",
        metric="acc,none", split="validation", file="multiple_choice/truthfulqa.jsonl",
        fields=("question", "mc1_targets", "mc2_targets"), shots=0, own_shots=True,
        note="six fixed examples stand in the prompt",
    ),
    "pubmedqa": Known(
        definition="pubmedqa/pubmedqa.yaml", hub="bigbio/pubmed_qa (pubmed_qa_labeled_fold0_source)",
        metric="acc,none", split="test", file="multiple_choice/pubmedqa.jsonl",
        fields=("QUESTION", "CONTEXTS", "final_decision"),
    ),
    "boolq": Known(
        definition="super_glue/boolq/default.yaml", hub="aps/super_glue (boolq)", metric="acc,none",
        split="validation", file="multiple_choice/boolq.jsonl", fields=CHOICES, original=originals.boolq,
    ),
    "lambada_openai": Known(
        definition="lambada/lambada_openai.yaml", hub="EleutherAI/lambada_openai", metric="acc,none", split="test",
        file="multiple_choice/lambada_openai.jsonl", fields=("context", "continuation"), original=originals.lambada,
    ),
    "gsm8k": Known(
        definition="gsm8k/gsm8k.yaml", hub="openai/gsm8k", metric="exact_match,strict-match", split="test",
        file="gsm8k_test.jsonl", fields=("question", "answer"), shots=5, generates=256,
    ),
    "gsm8k_cot": Known(
        definition="gsm8k/gsm8k-cot.yaml", hub="openai/gsm8k", metric="exact_match,strict-match", split="test",
        file="gsm8k_test.jsonl", fields=("question", "answer"), shots=8, own_shots=True, generates=256,
    ),
    "humaneval": Known(
        definition="humaneval/humaneval.yaml", hub="openai/openai_humaneval", metric="pass@1,create_test",
        split="test", file="multiple_choice/human_eval.jsonl", fields=("prompt", "test", "entry_point"), shots=0,
        own_shots=True, generates=1024, executes=True,
        note="what the model wrote was executed in a subprocess with a time limit",
    ),
    "cruxeval": Known(
        definition="", hub="cruxeval-org/cruxeval", metric="exact_match,literal", split="test",
        file="cruxeval.jsonl", fields=("code", "input", "output"), shots=2, own_shots=True, generates=256,
        note="output prediction, one greedy answer, compared as a literal; nothing is executed. Not lm-eval's "
        "cruxeval_output, which samples ten answers and executes them",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A task as it was asked for: its name, and the shots if they were given (`mmlu:5`). `own`: the folder of one's own
    definitions that it is in."""

    task: str
    given: int | None = None
    own: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Entry:
        """Raises InputError where the part behind the colon is no number."""
        name, colon, shots = text.strip().partition(":")
        if colon and not shots.isdecimal():
            raise InputError(f"task {text!r}: the part behind the colon is the number of shots, as in mmlu:5")
        return cls(name, int(shots) if colon else None)

    @property
    def known(self) -> Known | None:
        """Its row of the table; None for a task that only lm-eval knows, and for a definition of one's own."""
        return KNOWN.get(self.task) if self.own is None else None

    @property
    def shots(self) -> int | None:
        """Given, else ours; None: the definition's."""
        return self.given if self.given is not None else self.known.shots if self.known else None


def entries(tasks: tuple[str, ...], include_path: Path | None = None) -> tuple[Entry, ...]:
    """All that were asked for; definitions in the folder `include_path` come before ours and lm-eval's.

    Raises InputError for none, for the same task twice, and for a name that nobody knows.
    """
    own = own_names(include_path) if include_path is not None else frozenset[str]()
    parsed = [Entry.parse(text) for text in tasks]
    found = tuple(replace(entry, own=include_path) if entry.task in own else entry for entry in parsed)
    names = [entry.task for entry in found]
    if not names:
        raise InputError(f"no tasks given: name some of {', '.join(KNOWN)}, or any of lm-eval's")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"tasks given twice: {', '.join(twice)}; name each one once")
    for name in names:
        if name not in KNOWN and name not in own:
            _check_name(name, own)
    return found


def _check_name(name: str, own: Set[str]) -> None:
    import difflib

    others = task_manager().all_tasks
    if name not in others:
        raise unknown("task", name, {*own, *KNOWN, *difflib.get_close_matches(name, others, n=5)})

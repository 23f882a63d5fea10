"""The verdict of a report: what a student keeps of its teacher, what that buys, and every fault that was found.

It knows sections by what they say of themselves (the findings of `present`, the stats of `headline`); of their numbers
it reads only `models.STUDENT.{kept,gap}` of the language section and `kept.STUDENT` of the tasks'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from linearize.evaluation.context import Numbers, Section
from linearize.metrics.intervals import plus_minus, share_text

ORDER = ("language", "tasks", "recall", "speed", "cloze", "branches", "consistency", "layers", "chat")
"""Which sections' stats come first."""

KEPT = {
    "text": (
        "probability per held-out token",
        "Probability kept: the student's probability of a held-out token by the teacher's, as a geometric mean, which "
        "is exp(-loss gap). 100% is a student that predicts text as well as its teacher.",
    ),
    "tasks": (
        "task scores above chance",
        "Task scores kept: (student - chance) / (teacher - chance), both summed over the tasks on which the teacher is "
        "clearly above chance.",
    ),
}
"""Kinds of shares: what is kept, and how the share is defined."""

Table = Mapping[str, type[Section]]


def verdict(
    models: Sequence[Mapping[str, Any]], sections: Mapping[str, Numbers], table: Table | None = None
) -> dict[str, Any]:
    """What a report says first, JSON-able.

    Per student, under `students`: `headline` (one or two sentences); `kept` (shares of the teacher, each with its
    measure and definition: no single number is made of them); `tiles` (section, label, value, detail); `bad` and
    `notes` (section, text); `checked` (how many findings were good); `faults`. Findings that name no student stand
    under `bad` and `notes` beside `students`. `faults`: whether there is any.

    `models`: name and role of each, as in the report. `table`: what knows the sections (default: SECTIONS); one
    that it does not know is left out.
    """
    known = known_sections(table)
    available = {name: sections[name] for name in ordered(sections) if name in known}
    findings = [(name, found) for name, numbers in available.items() for found in known[name].present(numbers).findings]
    students = [str(one["name"]) for one in models if one["role"] == "student"]
    result: dict[str, Any] = {"students": {}}
    for student in students:
        stats = [
            {"section": name, "label": stat.label, "value": stat.value, "detail": stat.detail}
            for name, numbers in available.items()
            for stat in known[name].headline(numbers).get(student, ())
        ]
        own = [(name, found) for name, found in findings if found.student == student]
        bad = [{"section": name, "text": found.text} for name, found in own if found.level == "bad"]
        checked = sum(found.level == "good" for _, found in own)
        kept = [share for name, numbers in available.items() for share in kept_shares(name, numbers, student)]
        result["students"][student] = {
            "headline": headline(kept, bad=len(bad), checked=checked),
            "kept": kept,
            "tiles": stats,
            "bad": bad,
            "notes": [{"section": name, "text": found.text} for name, found in own if found.level == "note"],
            "checked": checked,
            "faults": bool(bad),
        }
    shared = [(name, found) for name, found in findings if found.student not in students]
    for key, level in (("bad", "bad"), ("notes", "note")):
        result[key] = [{"section": name, "text": found.text} for name, found in shared if found.level == level]
    result["faults"] = bool(result["bad"]) or any(one["faults"] for one in result["students"].values())
    return result


def known_sections(table: Table | None = None) -> Table:
    """The table that was given, or the package's own."""
    if table is not None:
        return table
    from linearize.evaluation.sections import SECTIONS

    return SECTIONS


def ordered(sections: Mapping[str, Numbers]) -> list[str]:
    """Names of sections in the verdict's order, others last."""
    return sorted(sections, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


def headline(kept: Sequence[Mapping[str, Any]], *, bad: int, checked: int) -> str:
    """The sentence on a student: what it keeps, and whether it can be believed."""
    said = " and ".join(str(share["text"]) for share in kept)
    keeps = f"Keeps {said}. " if said else ""
    if bad:
        return (
            f"{keeps}{bad} fault{'s' if bad > 1 else ''} found: read {'them' if bad > 1 else 'it'} before any number."
        )
    return f"{keeps}No fault found{f' in {checked} checks' if checked > 1 else ''}."


def kept_shares(section: str, numbers: Numbers, student: str) -> list[dict[str, Any]]:
    """Shares of the teacher that a section's numbers hold for this student; none without a teacher, or where the
    teacher itself can do nothing."""
    if section == "language":
        model = numbers.get("models", {}).get(student) or {}
        share, gap = model.get("kept"), model.get("gap")
        more = f", {plus_minus(gap['value'], gap['error'])} nats above its loss" if gap else ""
        return [_share("text", share, more)] if share else []
    if section == "tasks":
        share = (numbers.get("kept") or {}).get(student)
        return [_share("tasks", share)] if share else []
    return []


def _share(kind: str, found: Mapping[str, Any], more: str = "") -> dict[str, Any]:
    """A share with what it is, and as text with its interval, where it has one: `93.9% (93.1 to 94.8)`."""
    value, low, high = found["value"], found.get("low"), found.get("high")
    percent = f"{value:.1%}" if low is None or high is None else share_text(value, low, high)
    measure, definition = KEPT[kind]
    told = f"{percent} of the teacher's {measure}{more}"
    return {"measure": measure, "definition": definition, "value": value, "low": low, "high": high, "text": told}

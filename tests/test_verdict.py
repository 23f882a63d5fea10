"""The verdict: what students keep, stats and faults, from what sections present."""

from __future__ import annotations

import json

import pytest
from report_samples import losses, verdict_on

from linearize.evaluation.report.schema import Statement, Verdict
from linearize.evaluation.verdict import headline, kept_shares

NAMES = ("teacher", "a", "b")


def test_each_student_has_its_own_tiles_findings_and_share() -> None:
    numbers = losses(NAMES, kept=0.93)
    numbers["models"]["b"]["loss"] = 2.25
    numbers["models"]["b"]["kept"]["value"] = 0.5
    result = verdict_on(NAMES, {"language": numbers})
    a, b = result.students["a"], result.students["b"]
    assert (a.faults, b.faults, result.faults) == (False, True, True)
    assert (a.checked, b.checked) == (1, 0)
    assert b.bad == [Statement(section="language", text="b: loss 2.25")]
    assert a.bad == []
    assert [stat.to_json() for stat in a.tiles] == [
        {"section": "language", "label": "loss gap", "value": "1.60", "detail": "nats > teacher"}
    ]
    assert [stat.value for stat in b.tiles] == ["2.25"]
    assert (a.kept[0].value, b.kept[0].value) == (0.93, 0.5)
    assert "93.0%" in a.headline
    assert "1 fault" in b.headline and "1 fault" not in a.headline
    assert result.notes == [Statement(section="language", text="few documents")]  # it names no student
    assert Verdict.model_validate(json.loads(json.dumps(result.to_json()))) == result


def test_a_share_has_its_measure_definition_and_interval() -> None:
    share = verdict_on(NAMES, {"language": losses(NAMES, kept=0.9)}).students["a"].kept[0]
    assert "exp(-loss gap)" in share.definition
    assert share.measure in share.text
    assert (share.low, share.high) == (pytest.approx(0.89), pytest.approx(0.91))


def test_sections_that_are_missing_or_unknown_are_left_out() -> None:
    empty = verdict_on(NAMES, {})
    assert list(empty.students) == ["a", "b"]
    assert empty.students["a"].kept == empty.students["a"].tiles == []
    assert empty.faults is False
    assert verdict_on(NAMES, {"of another version": {"models": {}}}) == empty


def test_a_model_alone_has_no_students() -> None:
    result = verdict_on(NAMES[:1], {"language": losses(NAMES[:1])})
    assert result.students == {}
    assert result.faults is False


def test_a_fault_that_names_no_student_is_a_fault_of_the_report() -> None:
    numbers = losses(("teacher", "a", "gone"))
    numbers["models"]["gone"]["loss"] = 3
    result = verdict_on(("teacher", "a"), {"language": numbers})
    assert result.bad == [Statement(section="language", text="gone: loss 3")]
    assert result.faults
    assert not result.students["a"].faults


def test_tasks_and_the_loss_gap_are_in_the_headline() -> None:
    text = {
        "models": {"a": {"kept": {"value": 0.96, "low": None, "high": None}, "gap": {"value": 0.0408, "error": 0.003}}}
    }
    tasks = {"kept": {"a": {"value": 0.75, "low": 0.6, "high": 0.9, "stderr": 0.08, "tasks": ["piqa"]}, "b": None}}
    shares = kept_shares("language", text, "a") + kept_shares("tasks", tasks, "a")
    sentence = headline(shares, bad=0, checked=3)
    for part in ("96.0% of the teacher's probability", "0.041 ± 0.003 nats", "75.0% (60.0 to 90.0)", "in 3 checks"):
        assert part in sentence
    assert (
        kept_shares("tasks", tasks, "b") == kept_shares("language", text, "b") == kept_shares("speed", tasks, "a") == []
    )
    assert headline([], bad=2, checked=3).startswith("2 faults")

"""The verdict: what students keep, stats and faults, from what sections say of themselves."""

from __future__ import annotations

import json

import pytest
from report_samples import SECTIONS, eval_models, losses

from linearize.evaluation.verdict import headline, kept_shares, verdict

NAMES = ("teacher", "a", "b")


def test_each_student_has_its_own_tiles_findings_and_share() -> None:
    numbers = losses(NAMES, kept=0.93)
    numbers["models"]["b"]["loss"] = 2.25
    numbers["models"]["b"]["kept"]["value"] = 0.5
    found = verdict(eval_models(NAMES), {"language": numbers}, SECTIONS)
    a, b = found["students"]["a"], found["students"]["b"]
    assert (a["faults"], b["faults"], found["faults"]) == (False, True, True)
    assert (a["checked"], b["checked"]) == (1, 0)
    assert b["bad"] == [{"section": "language", "text": "b: loss 2.25"}]
    assert a["bad"] == []
    assert a["tiles"] == [{"section": "language", "label": "Loss gap", "value": "1.60", "detail": "nats > teacher"}]
    assert [stat["value"] for stat in b["tiles"]] == ["2.25"]
    assert (a["kept"][0]["value"], b["kept"][0]["value"]) == (0.93, 0.5)
    assert "93.0%" in a["headline"]
    assert "No fault" in a["headline"]
    assert "1 fault found" in b["headline"]
    assert found["notes"] == [{"section": "language", "text": "few documents"}]  # it names no student
    assert json.loads(json.dumps(found)) == found


def test_a_share_says_what_it_is() -> None:
    share = verdict(eval_models(NAMES), {"language": losses(NAMES, kept=0.9)}, SECTIONS)["students"]["a"]["kept"][0]
    assert "exp(-loss gap)" in share["definition"]
    assert share["measure"] in share["text"]
    assert (share["low"], share["high"]) == (pytest.approx(0.89), pytest.approx(0.91))


def test_sections_that_are_missing_or_unknown_are_left_out() -> None:
    empty = verdict(eval_models(NAMES), {}, SECTIONS)
    assert list(empty["students"]) == ["a", "b"]
    assert empty["students"]["a"]["kept"] == empty["students"]["a"]["tiles"] == []
    assert empty["faults"] is False
    other = verdict(eval_models(NAMES), {"of another version": {"models": {}}}, SECTIONS)
    assert other == empty


def test_a_model_alone_has_no_students() -> None:
    found = verdict(eval_models(NAMES[:1]), {"language": losses(NAMES[:1])}, SECTIONS)
    assert found["students"] == {}
    assert found["faults"] is False


def test_a_fault_that_names_no_student_is_a_fault_of_the_report() -> None:
    numbers = losses(("teacher", "a", "gone"))
    numbers["models"]["gone"]["loss"] = 3
    found = verdict(eval_models(("teacher", "a")), {"language": numbers}, SECTIONS)
    assert found["bad"] == [{"section": "language", "text": "gone: loss 3"}]
    assert found["faults"]
    assert not found["students"]["a"]["faults"]


def test_tasks_and_the_loss_gap_stand_in_the_headline() -> None:
    text = {
        "models": {"a": {"kept": {"value": 0.96, "low": None, "high": None}, "gap": {"value": 0.0408, "error": 0.003}}}
    }
    tasks = {"kept": {"a": {"value": 0.75, "low": 0.6, "high": 0.9, "stderr": 0.08, "tasks": ["piqa"]}, "b": None}}
    shares = kept_shares("language", text, "a") + kept_shares("tasks", tasks, "a")
    told = headline(shares, bad=0, checked=3)
    for piece in ("96.0% of the teacher's probability", "0.041 ± 0.003 nats", "75.0% (60.0 to 90.0)", "in 3 checks"):
        assert piece in told
    assert (
        kept_shares("tasks", tasks, "b") == kept_shares("language", text, "b") == kept_shares("speed", tasks, "a") == []
    )
    assert headline([], bad=2, checked=3).startswith("2 faults found")

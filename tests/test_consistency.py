"""The section Consistency: right caches pass whatever the mixer, and each kind of fault fails its own check."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import mixer, student_of, text, tiny
from torch.nn import functional as F

import linearize.evaluation.sections.consistency as consistency
from linearize.errors import InputError
from linearize.evaluation.cache_checks import CHECKS, CacheProbe, Deviation, _Total, check
from linearize.evaluation.context import EvalContext, EvalModel
from linearize.evaluation.numbers import ResultCache
from linearize.evaluation.sections.consistency import Consistency, ModelChecks
from linearize.modeling.cache import MixerCacheLayer
from linearize.ops.layout import Layout
from linearize.training.data.documents import Document

SMALL = Consistency(steps=15, prefill=39)
PLANS: dict[str, Any] = {
    "lolcats": mixer("lolcats", num_sinks=1),
    "gla": mixer("gla"),
    "hybrid": [None, mixer("mamba2"), mixer("sliding_window")],
    "deltas": [mixer("gated_delta_net"), mixer("retention"), None],
    "mamba": mixer("mamba"),
}
TOKENIZER: Any = SimpleNamespace(bos_token_id=1, eos_token_id=2, pad_token_id=0)


@pytest.fixture(scope="module")
def teacher() -> Any:
    return tiny("llama", attention="sdpa", head_dim=6)


def eval_context(*models: Any, tokens: int = 61, **changes: Any) -> EvalContext:
    """The first model is the teacher."""
    eval_models = tuple(
        EvalModel(
            name="teacher" if not i else f"student{i}", role="student" if i else "teacher", path="", model=model,
            tokenizer=TOKENIZER, fingerprint=str(i),
        )
        for i, model in enumerate(models)
    )  # fmt: skip
    rows = [text(1, tokens, seed=seed)[0].tolist() for seed in (1, 2, 3)]
    documents = [Document(row, [1] * len(row)) for row in rows]
    return EvalContext(models=eval_models, documents=documents, length=128, **changes)


def run(section: Consistency, context: EvalContext) -> Any:
    return json.loads(json.dumps(section.run(context), allow_nan=False))


def test_every_kind_of_student_and_its_teacher_pass(teacher: Any) -> None:
    context = eval_context(teacher, *(student_of(teacher, plan) for plan in PLANS.values()))
    numbers = run(SMALL, context)
    assert [len(model["checks"]) for model in numbers["models"].values()] == [7, *[6] * len(PLANS)]
    assert len({len(set(numbers["tokens"])), 3}) == 1 and all(n % 2 for n in numbers["tokens"])
    assert numbers["tokens"][0] > max(model["reach"] for model in numbers["models"].values())
    shown = Consistency.present(numbers)
    assert [finding.level for finding in shown.findings] == ["good"] * len(PLANS)
    assert len(shown.tables[0].rows) == 7 + 6 * len(PLANS)
    assert {stats[0].value for stats in Consistency.headline(numbers).values()} == {"right"}
    for model in numbers["models"].values():
        for deviation in model["checks"].values():
            assert 0 <= deviation["rms"] <= deviation["largest"] < 1e-4 and deviation["expected_loss"] > 1


def test_the_full_pass_is_what_is_expected(teacher: Any) -> None:
    rows = [text(1, n, seed=n)[0] for n in (31, 17, 9)]
    with torch.no_grad():
        logits = [teacher(input_ids=row[None]).logits[0, :-1] for row in rows]
    expected = F.cross_entropy(torch.cat(logits), torch.cat([row[1:] for row in rows])).item()
    for name in ("chunks", "padding", "order", "packing"):
        deviation = check(name, CacheProbe(teacher, rows, 13))
        assert deviation.expected_loss == pytest.approx(expected, abs=1e-5) and deviation.tokens == 54
    tail = F.cross_entropy(logits[0][13:], rows[0][14:]).item()
    for name in ("decode", "rollback", "static"):
        deviation = check(name, CacheProbe(teacher, rows, 13))
        assert deviation.expected_loss == pytest.approx(tail, abs=1e-5) and deviation.tokens == 17


def test_a_deviation_is_what_it_says() -> None:
    torch.manual_seed(0)
    expected, targets = 3 * torch.randn(23, 11).double(), torch.randint(11, (23,))
    logits = expected + 0.7 * torch.randn(23, 11)
    total = _Total()
    for part in (slice(0, 9), slice(9, 23)):
        total.add(logits[part], expected[part], targets[part])
    deviation, spread = total.deviation(), expected.var(-1, correction=0).mean().sqrt()
    assert deviation.largest == pytest.approx(float((logits - expected).abs().max() / spread))
    assert deviation.rms == pytest.approx(float((logits - expected).square().mean().sqrt() / spread))
    assert deviation.flips == int((logits.argmax(-1) != expected.argmax(-1)).sum()) > 0
    assert deviation.loss == pytest.approx(F.cross_entropy(logits, targets).item())
    assert deviation.expected_loss == pytest.approx(F.cross_entropy(expected, targets).item())


def _plain(patch: pytest.MonkeyPatch) -> None:
    """Padding and packing are not seen."""
    original = Layout.from_inputs
    hidden = {"attention_mask": None, "position_ids": None}
    patch.setattr(Layout, "from_inputs", lambda **inputs: original(**{**inputs, **hidden}))


def _no_crop(patch: pytest.MonkeyPatch) -> None:
    def crop(layer: MixerCacheLayer, tokens_to_remove: int) -> None:
        layer.accepted = 0 if layer.pending is None else len(layer.pending)
        layer.cumulative_length += 0 * tokens_to_remove

    patch.setattr(MixerCacheLayer, "crop", crop)


def _forgets(patch: pytest.MonkeyPatch) -> None:
    """Every second chunk is not kept."""
    original = MixerCacheLayer.step

    def step(layer: MixerCacheLayer, mixer: Any, inputs: Any, run: Any, *, layout: Any) -> Any:
        before = layer.state
        y = original(layer, mixer, inputs, run, layout=layout)
        if before is not None and not layer.record_past:
            layer.state = replace(layer.state, memory_BHFV=before.memory_BHFV)
        return y

    patch.setattr(MixerCacheLayer, "step", step)


def _raises(patch: pytest.MonkeyPatch) -> None:
    def then(*_: Any) -> None:
        raise RuntimeError("sizes do not match\nand more")

    patch.setattr(MixerCacheLayer, "activate_past_recording", then)


FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], set[str]]] = {
    "layout ignored": (_plain, {"padding", "order", "packing"}),
    "drafts stay": (_no_crop, {"rollback"}),
    "state lost": (_forgets, {"decode", "chunks", "padding"}),
    "recording fails": (_raises, {"rollback"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_fails_its_own_checks(teacher: Any, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    plant, expected = FAULTS[fault]
    context = eval_context(teacher, student_of(teacher, PLANS["lolcats"]))
    plant(monkeypatch)
    numbers = run(SMALL, context)
    student = numbers["models"]["student1"]
    assert set(ModelChecks.model_validate(student).failed) == expected
    shown = Consistency.present(numbers)
    assert [finding.level for finding in shown.findings] == ["bad"] * len(expected)
    assert all(finding.student == "student1" for finding in shown.findings)
    assert Consistency.headline(numbers)["student1"][0].value == "faulty"
    if fault == "recording fails":
        assert "RuntimeError: sizes do not match" in shown.findings[0].text


def test_a_fault_of_the_teacher_is_a_note(teacher: Any) -> None:
    numbers = run(SMALL, eval_context(teacher, student_of(teacher, PLANS["gla"])))
    numbers["models"]["teacher"]["checks"]["static"]["largest"] = 0.4
    assert [(f.level, f.student) for f in Consistency.present(numbers).findings] == [
        ("note", None),
        ("good", "student1"),
    ]


def test_half_precision_is_allowed_its_rounding_and_no_more(teacher: Any) -> None:
    own = tiny("llama", attention="sdpa", head_dim=6)  # a student's weights are its teacher's
    student = student_of(own, PLANS["deltas"]).to(torch.bfloat16)
    numbers = run(SMALL, eval_context(teacher, student))
    model = numbers["models"]["student1"]
    assert model["dtype"] == "bfloat16" and [f.level for f in Consistency.present(numbers).findings] == ["good"]
    assert max(deviation["largest"] for deviation in model["checks"].values()) > 1e-3, "nothing was rounded"
    assert not Deviation(tokens=9, largest=0.1, rms=0.1, flips=0, loss=1, expected_loss=1).within((0.6, 0.06, 0.03))
    assert not Deviation(tokens=9, largest=0.1, rms=0.01, flips=0, loss=1.1, expected_loss=1).within((0.6, 0.06, 0.03))


def test_the_same_again_and_kept(teacher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = eval_context(teacher, student_of(teacher, PLANS["gla"]), results=ResultCache(tmp_path))
    first = run(SMALL, context)
    monkeypatch.setattr(consistency, "_measured", lambda *_: pytest.fail("measured again"))
    assert run(SMALL, context) == first
    monkeypatch.undo()
    assert run(SMALL, replace(context, results=ResultCache())) == first


def test_short_text_is_refused_and_a_model_alone_is_enough(teacher: Any) -> None:
    context = eval_context(teacher, tokens=7)
    with pytest.raises(InputError, match="the text has 21 tokens"):
        SMALL.check(context)
    student = student_of(teacher, mixer("lolcats", window=16))
    numbers = run(SMALL, eval_context(teacher, student, tokens=9))
    assert [(f.level, "reaches 32" in f.text) for f in Consistency.present(numbers).findings] == [
        ("good", False), ("note", True),
    ]  # fmt: skip
    alone = run(SMALL, eval_context(teacher))
    assert set(alone["models"]["teacher"]["checks"]) == set(CHECKS) and not Consistency.present(alone).findings

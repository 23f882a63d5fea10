"""Three faults planted in a healthy student from outside: branch ablation and needles find each; the student passes.

The student is made here from the embedded teacher, of text that the teacher writes itself.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import linearize.demo
from linearize.decoding.loading import load_any
from linearize.evaluation.context import EvalContext, EvalModel, Finding, Section
from linearize.evaluation.needles import recall_document
from linearize.evaluation.sections.branches import Branches
from linearize.evaluation.sections.consistency import Consistency
from linearize.evaluation.sections.recall import Recall
from linearize.mixers.lolcats import Lolcats, LolcatsConfig
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.cache import MixerCacheLayer
from linearize.ops.window_linear import WindowLinear
from linearize.training.data.documents import Document, Example, tokenize
from linearize.training.data.packing import batches, pack
from linearize.training.data.sampling import sample_documents
from linearize.training.stages.attention_transfer import AttentionTransferConfig

TEACHER = Path(linearize.demo.__file__).parent / "teacher"
MIXER = LolcatsConfig(window=8, feature_map="gain", feature_dim=32, feature_start="scales", num_sinks=1, shift="shared")
CONVERTED, HELD_OUT, STEPS = (0, 3), 8, 22
GATE = Consistency(steps=20, prefill=35)
ABLATION = Branches(per_layer=False, tokens=1200, context_tokens=400, contexts=(16, 64), decode_tokens=60)
NEEDLES = Recall(lengths=(80,), depths=(0.2, 0.5), items=4, keys=(1,), queries=2, passkey="needle", needles=0, values=0)


def facts(rng: random.Random, hay: Sequence[str], count: int) -> list[str]:
    return [
        recall_document(rng, hay, num_words=rng.randint(60, 160), num_facts=rng.randint(1, 2), num_questions=4).text
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def made() -> SimpleNamespace:
    """Teacher, tokenizer, a student trained for some steps, one that was not trained, and text neither has seen."""
    teacher, tokenizer = load_any(TEACHER, device="cpu")
    written = sample_documents(teacher, tokenizer, 3000, seed=3, batch_size=40, max_new_tokens=100)
    stories = [tokenizer.decode(d.tokens, skip_special_tokens=True).strip() for d in written]
    hay = [story for story in stories if len(story) > 50 and not any(c.isdigit() for c in story)]
    rng = random.Random(5)
    train = tokenize([Example(x) for x in facts(rng, hay[HELD_OUT:], 40)], tokenizer)
    texts = hay[:HELD_OUT] + facts(rng, hay[:HELD_OUT], 9)
    untrained = swapped(teacher)
    return SimpleNamespace(
        teacher=teacher, tokenizer=tokenizer, student=trained(swapped(teacher), teacher, train), untrained=untrained,
        documents=tokenize([Example(x) for x in texts], tokenizer), texts=texts,
    )  # fmt: skip


def swapped(teacher: Any) -> LinearizedForCausalLM:
    torch.manual_seed(0)
    layers = range(teacher.config.num_hidden_layers)
    return LinearizedForCausalLM.from_teacher(teacher, [MIXER if i in CONVERTED else None for i in layers])


def trained(student: LinearizedForCausalLM, teacher: Any, documents: Sequence[Document]) -> LinearizedForCausalLM:
    run: Any = AttentionTransferConfig(tokens=0, lr=1.0).build(student, teacher)
    source = batches(pack(documents, 192), 5, seed=0)
    optimizer = torch.optim.Adam(run.parameter_groups()[0].parameters.values(), lr=2e-2)
    run.calibrate(next(source))
    for _ in range(STEPS):
        loss = run.loss(next(source))
        (loss.sum / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
    run.finish()
    return student.eval()


def judged(section: Section, made: SimpleNamespace, student: LinearizedForCausalLM) -> list[Finding]:
    """What a section finds about the student."""
    models = {"teacher": made.teacher, "student": student}
    ctx = EvalContext(
        models=tuple(
            EvalModel(name=name, role=name, path=name, model=model, tokenizer=made.tokenizer)  # type: ignore[arg-type]
            for name, model in models.items()
        ),
        documents=made.documents, texts=made.texts, length=224,
    )  # fmt: skip
    numbers = json.loads(json.dumps(section.run(ctx), allow_nan=False))
    return [finding for finding in section.present(numbers).findings if finding.student == "student"]


def bad(findings: Sequence[Finding]) -> str:
    return "\n".join(finding.text for finding in findings if finding.level == "bad")


def zero_state(patch: pytest.MonkeyPatch) -> None:
    """What leaves the window is forgotten."""
    original = WindowLinear.features_k
    patch.setattr(WindowLinear, "features_k", lambda spec, k_BGTD: torch.zeros_like(original(spec, k_BGTD)))


def drop_window(patch: pytest.MonkeyPatch) -> None:
    """No softmax over near tokens."""
    original = Lolcats.spec
    patch.setattr(Lolcats, "spec", lambda mixer, **options: replace(original(mixer, **options), branch="linear"))


def fold_twice(patch: pytest.MonkeyPatch) -> None:
    """What a cached step folds into the state is folded again; passes without a cache are as they were."""
    original = MixerCacheLayer.step

    def step(layer: MixerCacheLayer, *inputs: Any, **named: Any) -> Any:
        before = layer.state
        y = original(layer, *inputs, **named)
        if before is not None and before.memory_BHFV is not None:
            layer.state = replace(layer.state, memory_BHFV=2 * layer.state.memory_BHFV - before.memory_BHFV)
        return y

    patch.setattr(MixerCacheLayer, "step", step)


def test_a_healthy_student_passes(made: SimpleNamespace) -> None:
    by_section = {section.NAME: judged(section, made, made.student) for section in (GATE, ABLATION, NEEDLES)}
    for name, findings in by_section.items():
        assert bad(findings) == ""
        assert any(finding.level == "good" for finding in findings), name
    won, window, decoded = by_section["branches"]
    assert "wins back" in won.text and "the window works" in window.text and "through the cache" in decoded.text


PLANTED: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], dict[str, str]]] = {
    "state zeroed": (zero_state, {"branches": "linear branch is bypassed"}),
    "window dropped": (drop_window, {"branches": "window brings nothing", "recall": "next to nothing comes back"}),
    "token folded twice": (fold_twice, {"branches": "decoding through the cache", "consistency": "token by token"}),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    plant, expected = PLANTED[fault]
    sections = {section.NAME: section for section in (GATE, ABLATION, NEEDLES)}
    plant(monkeypatch)
    for name, words in expected.items():
        assert words in bad(judged(sections[name], made, made.student)), name


def test_a_student_that_is_worse_but_works_has_no_faulty_cache(made: SimpleNamespace) -> None:
    findings = judged(GATE, made, made.untrained)
    assert [finding.level for finding in findings] == ["good"]

"""The language modelling section against plain computations, document by document."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from byte_tokenizer import SIZE, byte_tokenizer
from models import mixer, student_of, tiny
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from linearize.errors import InputError
from linearize.evaluation.context import EvalContext, EvalModel, Numbers
from linearize.evaluation.numbers import ResultCache
from linearize.evaluation.sections.language import Language
from linearize.evaluation.sections.language.numbers import LanguageNumbers
from linearize.evaluation.sections.language.token_facts import (
    bytes_of_tokens,
    evidence_classes,
    evidence_distance,
    prefix_bytes,
)
from linearize.metrics.branches import longest_reach
from linearize.metrics.theme import styled
from linearize.training.data.documents import Document, Example, tokenize

LENGTH = 41
TEXTS = (
    "abcabcabc the cat the dog the cat sat", "zzzz é ☃ zz", "x", "one two one two three one two",
    "a longer text that does not fit into a row: abc abc abc, and so it is cut into pieces of its own, you see",
    "the end", "ab ab ab ab ab ab", "über über", "no no no no, yes yes", "q w e r t y q w e r t y",
)  # fmt: skip
TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    teacher = tiny(vocab_size=SIZE, bos_token_id=0, eos_token_id=1)
    return {
        "teacher": teacher,
        "window": student_of(teacher, mixer("lolcats", window=4)),
        "recurrent": student_of(teacher, mixer("mamba2")),
    }


def context_of(models: dict[str, PreTrainedModel], **changes: Any) -> EvalContext:
    eval_models = tuple(
        EvalModel(
            name=name, role="teacher" if name == "teacher" else "student", path=name, model=model,
            tokenizer=TOKENIZER, fingerprint=name,
        )
        for name, model in models.items()
    )  # fmt: skip
    documents = tokenize([Example(text) for text in TEXTS], TOKENIZER)
    return EvalContext(models=eval_models, documents=documents, texts=TEXTS, length=LENGTH, batch=3, **changes)


@pytest.fixture(scope="module")
def numbers(models: dict[str, PreTrainedModel]) -> Numbers:
    return json.loads(json.dumps(Language(first_bin=5).run(context_of(models)), allow_nan=False))


def cut_rows() -> list[list[int]]:
    """The documents cut at multiples of the row's length, as packing does."""
    documents = tokenize([Example(text) for text in TEXTS], TOKENIZER)
    return [d.tokens[i : i + LENGTH] for d in documents for i in range(0, len(d), LENGTH) if len(d.tokens[i:]) > 1]


def alone(model: PreTrainedModel, **extra: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Each row alone in the model: losses and log-probabilities of its tokens but the first."""
    losses, log_p = [], []
    for ids in cut_rows():
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False, **extra).logits[0, :-1].double()
        losses.append(F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none"))
        log_p.append(logits.log_softmax(-1))
    return losses, log_p


def test_losses_and_agreement(numbers: Numbers, models: dict[str, PreTrainedModel]) -> None:
    t_loss, t_log_p = alone(models["teacher"])
    teacher = torch.cat(t_log_p)
    assert numbers["tokens"] == sum(map(len, t_loss)) and numbers["documents"] == len(t_loss)
    for name, model in models.items():
        losses, log_p = alone(model)
        measured, mean = numbers["models"][name], torch.cat(losses).mean().item()
        assert measured["loss"]["value"] == pytest.approx(mean, abs=2e-5)
        assert measured["perplexity"]["value"] == pytest.approx(math.exp(mean), rel=1e-4)
        assert measured["perplexity"]["low"] < measured["perplexity"]["value"] < measured["perplexity"]["high"]
        if name == "teacher":
            assert "gap" not in measured
            continue
        own = torch.cat(log_p)
        gap = mean - torch.cat(t_loss).mean().item()
        assert measured["gap"]["value"] == pytest.approx(gap, abs=2e-5)
        assert measured["kept"]["value"] == pytest.approx(math.exp(-gap), rel=1e-4)
        assert measured["kept"]["low"] < measured["kept"]["value"] < measured["kept"]["high"]
        kl = F.kl_div(own, teacher, log_target=True, reduction="batchmean").item()
        assert measured["kl"]["value"] == pytest.approx(kl, abs=2e-5)
        assert measured["top1"]["value"] == pytest.approx((own.argmax(-1) == teacher.argmax(-1)).double().mean().item())
        sets = zip(own.topk(5).indices.tolist(), teacher.topk(5).indices.tolist(), strict=True)
        overlap = [len(set(a) & set(b)) / 5 for a, b in sets]
        assert measured["top5"]["value"] == pytest.approx(sum(overlap) / len(overlap), abs=1e-6)


def test_bits_per_byte(numbers: Numbers, models: dict[str, PreTrainedModel]) -> None:
    """BOS is not predicted and EOS has no bytes; the first token of a later row is not predicted either."""
    text = [torch.tensor(ids[1:]) > 1 for ids in cut_rows()]
    size = sum(int(mask.sum()) for mask in text)
    assert numbers["bytes"] == size == sum(len(t.encode()) for t in TEXTS) - sum(ids[0] > 1 for ids in cut_rows())
    for name, model in models.items():
        losses, _ = alone(model)
        bits = sum(loss[mask].sum().item() for loss, mask in zip(losses, text, strict=True)) / math.log(2)
        assert numbers["models"][name]["bits_per_byte"]["value"] == pytest.approx(bits / size, rel=1e-5)


def test_positions_and_lengths(numbers: Numbers, models: dict[str, PreTrainedModel]) -> None:
    losses, _ = alone(models["window"])
    position = torch.cat([torch.arange(len(loss)) for loss in losses])
    length = torch.cat([torch.full((len(loss),), len(loss) + 1) for loss in losses])
    for bins, value in ((numbers["positions"], position), (numbers["lengths"], length)):
        assert [b["start"] for b in bins][:2] in ([0, 5], [5, 10]) or bins[0]["start"] == 0
        assert sum(b["tokens"] for b in bins) == numbers["tokens"] and len(bins) > 2
        for b in bins:
            inside = (value >= b["start"]) & (value < b["end"])
            assert b["tokens"] == inside.sum()
            assert b["models"]["window"]["loss"]["value"] == pytest.approx(
                torch.cat(losses)[inside].mean().item(), abs=2e-5
            )
            assert set(b["models"]) == set(models)


def evidence_by_hand(ids: list[int]) -> list[int]:
    """For each token but the first, how far its last equal pair ends before the token that predicts it."""
    distances = []
    for t in range(1, len(ids)):
        places = [s for s in range(1, t) if ids[s - 1 : s + 1] == ids[t - 1 : t + 1]]
        distances.append(t - 1 - places[-1] if places else -1)
    return distances


def test_evidence(numbers: Numbers, models: dict[str, PreTrainedModel]) -> None:
    distance = torch.cat([torch.tensor(evidence_by_hand(ids)) for ids in cut_rows()])
    reach = longest_reach(
        EvalModel(name="s", role="student", path="", model=models["window"], tokenizer=TOKENIZER).plan
    )
    assert reach == 8 and [e["reach"] for e in numbers["evidence"]] == [8, 64]
    assert [e["students"] for e in numbers["evidence"]] == [["window"], ["recurrent"]]
    teacher, both = torch.cat(alone(models["teacher"])[0]), torch.cat(alone(models["window"])[0])
    window = torch.cat(alone(models["window"], branch="window")[0])
    classes = numbers["evidence"][0]["classes"]
    masks = {"beyond": distance >= 8, "inside": (distance >= 0) & (distance < 8), "none": distance < 0}
    assert all(mask.sum() > 5 for mask in masks.values())
    for kind, mask in masks.items():
        assert classes[kind]["tokens"] == mask.sum()
        own = classes[kind]["models"]
        assert own["teacher"]["loss"]["value"] == pytest.approx(teacher[mask].mean().item(), abs=2e-5)
        assert own["window"]["gap"]["value"] == pytest.approx((both - teacher)[mask].mean().item(), abs=2e-5)
        assert own["window"]["window_gap"]["value"] == pytest.approx((window - teacher)[mask].mean().item(), abs=2e-5)
    assert "window_gap" not in numbers["evidence"][1]["classes"]["none"]["models"]["recurrent"]
    far, near = ((both - teacher)[masks[kind]].mean().item() for kind in ("beyond", "inside"))
    assert numbers["evidence"][0]["compared"]["window"]["over_inside"]["value"] == pytest.approx(far - near, abs=4e-5)


def test_evidence_does_not_cross_documents_and_knows_the_edge() -> None:
    documents = [Document(ids, [1] * len(ids)) for ids in ([5, 6, 7], [9, 5, 6, 8, 8, 8], [4, 3, 0, 4, 3])]
    ctx = EvalContext(models=context_of({"teacher": tiny()}).models, documents=documents, length=16)
    rows = ctx.rows()
    distance = evidence_distance(rows)
    order = [[int(x) for x in ids] for ids in ([9, 5, 6, 8, 8, 8], [4, 3, 0, 4, 3], [5, 6, 7])]
    assert distance.tolist() == [d for ids in order for d in evidence_by_hand(ids)]
    assert evidence_by_hand([4, 3, 0, 4, 3]) == [-1, -1, -1, 2] and evidence_by_hand([8, 8, 8]) == [-1, 0]
    assert evidence_classes(torch.tensor([2]), 2)["beyond"].item() and evidence_classes(torch.tensor([2]), 3)["inside"]


@pytest.mark.parametrize("folder", ["demo", "stories260k"])
def test_bytes_of_tokens_add_up_to_the_text(folder: str, request: pytest.FixtureRequest) -> None:
    """Byte-level and sentencepiece-like tokenizers, with letters, signs and spaces that fall back to bytes."""
    if folder == "demo":
        path = Path(__file__).parents[1] / "src/linearize/demo/teacher"
    else:
        path = request.getfixturevalue("shared_dir") / "teachers" / folder
    tokenizer = AutoTokenizer.from_pretrained(path)
    table, prefix = bytes_of_tokens(tokenizer, len(tokenizer) + 3), prefix_bytes(tokenizer)
    assert prefix == (folder == "stories260k")
    for text in (*TEXTS, "One day, she saw a ball.", " the sky", "\n\n tab\t☃ 你好 🙂", "It's 12:30!"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert int(table[ids].sum()) - prefix == len(text.encode()), text
    assert table[tokenizer.bos_token_id] == table[tokenizer.eos_token_id] == table[-1] == 0


def faulty(models: dict[str, PreTrainedModel], numbers: Numbers, **gaps: float) -> dict[str, str]:
    """Levels of the findings when a student's numbers are put in place of what was measured."""
    changed = json.loads(json.dumps(numbers))
    for what, value in gaps.items():
        if what == "share":
            changed["evidence"][0]["compared"]["window"]["share"] = {"value": value, "error": 0.02}
        elif what == "late":
            changed["growth"] = {"early": 4, "middle": 16, "end": 41, "models": {}}
            parts = {"early": 0.1, "late": value, "growth": value - 0.1, "doubling": value - 0.2}
            one = {k: {"value": v, "error": 0.01} for k, v in parts.items()}
            changed["growth"]["models"] = {"window": one, "recurrent": one}
        else:
            changed["models"]["window"]["kept"] = {"value": math.exp(-value), "low": None, "high": None}
            changed["models"]["window"]["gap"] = {"value": value, "error": 0.001}
    for kind in changed["evidence"][0]["classes"].values():
        kind["tokens"] += 1000
    findings = [f for f in Language.present(changed).findings if f.student == "window"]
    return {name: f.level for name, f in zip(("loss", "growth", "evidence"), findings, strict=False)}


def test_findings(models: dict[str, PreTrainedModel], numbers: Numbers) -> None:
    assert numbers["growth"], "the texts are long enough to compare positions"
    assert faulty(models, numbers, gap=0.01, late=0.1, share=0.9)["loss"] == "good"
    assert faulty(models, numbers, gap=0.2, late=0.1, share=0.9)["loss"] == "note"
    assert faulty(models, numbers, gap=0.9, late=0.1, share=0.9)["loss"] == "bad"
    assert [faulty(models, numbers, late=x)["growth"] for x in (0.11, 0.15, 0.4)] == ["good", "note", "bad"]
    assert faulty(models, numbers, late=0.1, share=0.05)["evidence"] == "bad"
    assert faulty(models, numbers, late=0.1, share=0.9)["evidence"] != "bad"


def test_shown_for_any_number_of_models(models: dict[str, PreTrainedModel], numbers: Numbers) -> None:
    from matplotlib.figure import Figure

    lone = Language().run(context_of({"teacher": models["teacher"]}))
    orphan = Language().run(context_of({"window": models["window"]}))
    many = Language().run(context_of({"teacher": models["teacher"], **{f"s{i}": models["window"] for i in range(5)}}))
    for section_numbers in (numbers, lone, orphan, many):
        section_numbers = json.loads(json.dumps(section_numbers, allow_nan=False))
        shown = Language.present(section_numbers)
        assert shown.tables and all(len({tuple(row) for row in table.rows}) == 1 for table in shown.tables)
        assert all(f.student in section_numbers["models"] for f in shown.findings)
        for plot in shown.plots:
            with styled():
                figure = Figure(figsize=(plot.width, plot.height), layout="constrained")
                plot.draw(figure)
                figure.canvas.draw()
    assert not Language.present(lone).findings and not Language.headline(lone)
    assert list(Language.headline(orphan)) == ["window"] and len(Language.headline(numbers)["window"]) == 3
    assert len(Language.present(many).findings) >= 10


def test_the_same_again_and_kept(models: dict[str, PreTrainedModel], numbers: Numbers, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    ctx = context_of(
        models, results=ResultCache(tmp_path), progress=lambda what, done, total: steps.append((done, total))
    )
    first = Language(first_bin=5).run(ctx)
    assert first == numbers
    assert steps[0][0] == 0 and steps[-1][0] == steps[-1][1] and len(list(tmp_path.iterdir())) == 1
    seen = len(steps)
    assert Language(first_bin=5).run(ctx) == first and len(steps) == seen
    Language(first_bin=6).run(ctx)
    assert len(steps) > seen


def test_numbers_come_back_from_json_as_they_were(numbers: Numbers) -> None:
    typed = LanguageNumbers.model_validate(numbers)
    assert json.loads(json.dumps(typed.to_json())) == numbers
    assert list(typed.compared) == ["window", "recurrent"] and typed.evidence_of("recurrent").reach == 64


def test_without_text(models: dict[str, PreTrainedModel]) -> None:
    ctx = context_of(models)
    with pytest.raises(InputError, match="needs text"):
        Language().check(EvalContext(models=ctx.models))
    Language().check(ctx)

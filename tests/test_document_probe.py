"""Families that ignore where a packed row's documents begin: found by a probe, and given rows of one document each."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from models import FAMILIES, mixer, student_of, tiny
from teacher_folder import TOKENS, write_teacher, write_text
from torch import nn

import linearize
from linearize.errors import InputError
from linearize.evaluation.run import EvaluationOptions, evaluate
from linearize.evaluation.sections.branches import Branches
from linearize.evaluation.sections.consistency import Consistency
from linearize.evaluation.sections.language import Language
from linearize.modeling.io.teacher import load_teacher
from linearize.modeling.probe import keeps_documents_apart
from linearize.training.data.loading import DataConfig, Document, document_rows, load_documents, pack, split
from linearize.training.stages.external_teacher import load_other_teacher

WIDE = {"hidden_size": 36}
BART = {"d_model": 36, "decoder_layers": 3, "decoder_attention_heads": 6, "decoder_ffn_dim": 44, "is_decoder": True,
        "is_encoder_decoder": False}  # fmt: skip
MIXING = {"opt": {}, "biogpt": WIDE, "bart": BART}


@pytest.mark.parametrize("family", [*FAMILIES, "biogpt", "bart", "gpt_bigcode"])
def test_a_family_is_recognised_by_what_it_computes(family: str) -> None:
    teacher = tiny(family, attention=None, **{"biogpt": WIDE, "bart": BART, "gpt_bigcode": WIDE}.get(family, {}))
    assert keeps_documents_apart(teacher) == (family not in MIXING)
    if "experts" not in str(teacher):  # products of experts need rows of 16 bytes
        assert keeps_documents_apart(teacher.bfloat16()) == (family not in MIXING)


@pytest.mark.parametrize("name", ["lolcats", "mamba2", "retention"])
def test_a_student_is_recognised_as_well(name: str) -> None:
    assert keeps_documents_apart(student_of(tiny("llama"), mixer(name)))
    assert not keeps_documents_apart(student_of(tiny("opt"), [mixer(name), None, None]))


def test_the_probe_leaves_a_model_as_it_was() -> None:
    model = tiny("llama").train()
    assert keeps_documents_apart(model) and model.training


def test_a_row_holds_one_document() -> None:
    lengths = [5, 17, 1, 9]
    documents = [Document(list(range(100 * i, 100 * i + n)), [1] * n) for i, n in enumerate(lengths, 1)]
    for rows in (pack(documents, 8, one_per_row=True), document_rows(documents, 8, one_per_row=True)):
        chunks = [ids[:n] for ids, n in zip(rows.input_ids.tolist(), [5, 8, 8, 1, 1, 8, 1], strict=True)]
        assert [token for chunk in chunks for token in chunk] == [t for d in documents for t in d.tokens]
        assert all(row[0] == 0 for row in rows.position_ids.tolist()) and rows.num_targets == 25
        assert rows.labels[0].tolist() == [-100, 101, 102, 103, 104, -100, -100, -100]


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that mixes documents, and text of unequal documents."""
    folder = tmp_path_factory.mktemp("opt")
    write_teacher(folder / "teacher", "opt")
    write_text(folder / "text.txt", 40)
    return folder


def cut_rows(documents: Sequence[Document]) -> list[list[int]]:
    """Documents cut into rows of 64 tokens."""
    return [list(document.tokens[i : i + 64]) for document in documents for i in range(0, len(document), 64)]


def alone(model: nn.Module, documents: list[list[int]]) -> float:
    """The mean loss of documents that are given one by one."""
    losses = []
    with torch.no_grad():
        for ids in documents:
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
            losses.append(nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none"))
    return float(torch.cat(losses).mean())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["memory", "blocks", "stream"])
def test_a_conversion_and_its_losses_are_those_of_separate_documents(
    opt: Path, way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    block = {} if way == "memory" else {"stages.0.block": 2}
    recipe = linearize.load_recipe("lolcats").override(
        {"plan.mixer.window": 4, "plan.mixer.feature_dim": 7, "data.length": 64, "data.heldout": 8,
         "stages.0.tokens": 256, "stages.0.batch": 2, "stages.1.tokens": 0, **block}
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="linearize"):
        student = linearize.convert(
            opt / "teacher", recipe=recipe, data=[opt / "text.txt"], out=tmp_path / "s", stream=way == "stream"
        )
    assert any("opt does not keep the documents" in record.message for record in caplog.records)
    report = json.loads((tmp_path / "s" / "report.json").read_text())
    teacher, tokenizer = load_teacher(opt / "teacher")
    heldout = split(load_documents([str(opt / "text.txt")], tokenizer), DataConfig(length=64, heldout=8)).heldout
    documents = cut_rows(heldout)
    assert sum(map(len, documents)) < 64 * len(documents), "each is a row: the test is blind"
    assert report["teacher_loss"] == pytest.approx(alone(teacher, documents), abs=1e-5)
    loaded = linearize.load(tmp_path / "s") if student is None else student
    assert report["student_loss"] == pytest.approx(alone(loaded, documents), abs=1e-4)


def test_an_evaluation_gives_each_document_a_row(opt: Path) -> None:
    sections = [Language(), Consistency(), Branches(contexts=(16,))]
    report = evaluate(
        opt / "teacher", data=[str(opt / "text.txt")], sections=sections, options=EvaluationOptions(length=64)
    )
    assert any("documents of a packed row" in note for note in report.notes)
    teacher, tokenizer = load_teacher(opt / "teacher")
    documents = cut_rows(load_documents([str(opt / "text.txt")], tokenizer))
    assert report.teacher_loss == pytest.approx(alone(teacher, documents), abs=1e-5)
    (checks,) = (model["checks"] for model in report.sections["consistency"]["models"].values())
    assert "packing" not in checks and "padding" in checks


def test_another_teacher_that_mixes_documents_is_refused(opt: Path) -> None:
    size = len(TOKENS)
    with pytest.raises(InputError, match=r"family \(opt\) that does not keep"):
        load_other_teacher(str(opt / "teacher"), student_of(tiny("llama", vocab_size=size), mixer()))
    assert load_other_teacher(str(opt / "teacher"), student_of(tiny("opt", vocab_size=size), mixer()))

"""Weights of sources are their shares of the training tokens, the same for the same seed."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError
from test_evaluation_outputs import tiny_llama, tiny_tokenizer

from linearize.conversion.api import convert
from linearize.conversion.text import read_text
from linearize.errors import InputError
from linearize.recipes.schema import Recipe, load_recipe
from linearize.training.data.document_list import DocumentList
from linearize.training.data.documents import Document
from linearize.training.data.loading import DataConfig
from linearize.training.data.mixture import shares, weighted


def source(first: int, count: int) -> DocumentList:
    """Documents of unequal odd lengths, all different."""
    sizes = [5 + 2 * (7 * n % 13) for n in range(count)]
    return DocumentList.of(
        [Document([first + n, *range(size - 1)], [1] * size) for n, size in enumerate(sizes)], f"source-{first}"
    )


SOURCES = DocumentList.joined([source(1000, 300), source(2000, 41), source(3000, 90)])


def tokens_by_source(documents: DocumentList) -> list[int]:
    return [int(documents.size_D[documents.store_D == number].sum()) for number in range(3)]


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.7, 0.2, 0.1), (1, 30, 2), (0.02, 1, 1)])
def test_shares_are_the_weights_and_the_number_of_tokens_stays(weights: tuple[float, ...]) -> None:
    mixed = weighted(SOURCES, weights, seed=3)
    longest = 5 + 2 * 12
    for number, tokens in enumerate(tokens_by_source(mixed)):
        assert abs(tokens - SOURCES.num_tokens * weights[number] / sum(weights)) <= longest
    assert abs(mixed.num_tokens - SOURCES.num_tokens) <= 3 * longest
    line = shares(mixed, SOURCES)
    percent = [float(share) for share in re.findall(r"source-\d+ ([\d.]+)%", line)]
    assert percent == pytest.approx([100 * weight / sum(weights) for weight in weights], abs=0.5) and "\n" not in line


def test_a_small_source_is_repeated_and_a_large_one_drawn_from() -> None:
    mixed = weighted(SOURCES, (1, 1, 1), seed=3)
    counts = Counter(document.tokens[0] for document in mixed)
    large, small = ([counts[first + n] for n in range(size)] for first, size in ((1000, 300), (2000, 41)))
    assert set(large) == {0, 1} and max(small) - min(small) == 1 and min(small) >= 3
    once = weighted(SOURCES, tokens_by_source(SOURCES), seed=3)
    assert list(once) == list(SOURCES)


def test_the_seed_draws() -> None:
    one, same, other = (weighted(SOURCES, (1, 2, 3), seed=seed) for seed in (3, 3, 4))
    assert one.digest == same.digest != other.digest


def test_a_source_that_is_all_held_out() -> None:
    rest = SOURCES.take(SOURCES.store_D != 1)
    with pytest.raises(InputError, match=r"data\.sources\.1 'source-2000'"):
        weighted(rest, (1, 1, 1), seed=0)


RECIPE: dict[str, Any] = {
    "plan": {"mixer": {"name": "lolcats", "window": 4, "feature_dim": 8}},
    "data": {"length": 40, "heldout": 2},
    "stages": [{"name": "attention_transfer", "tokens": 300, "lr": 1e-3, "batch": 2}],
}


def recipe(**data: Any) -> Recipe:
    return Recipe.from_data({**RECIPE, "data": {**RECIPE["data"], **data}})


def test_weights_for_some_sources_alone_and_other_mistakes() -> None:
    with pytest.raises(InputError, match="source 'b' has no weight"):
        recipe(sources=[{"path": "a", "weight": 2}, {"path": "b"}])
    for wrong in ({"path": ""}, {"path": "a", "weight": 0}, {"weight": 1}, {"path": "a", "wieght": 1}):
        with pytest.raises(ValidationError):
            DataConfig.model_validate({"sources": [wrong]})
    assert recipe(sources=[{"path": "a", "weight": "1e-1"}]).data.weights == (0.1,)
    assert recipe(sources=[{"path": "a"}]).data.weights is None
    changed = recipe(sources=[{"path": "a", "weight": 1}]).override({"data.sources.0.weight": 3})
    assert changed.data.weights == (3,)
    assert load_recipe("lolcats").data.sources == ()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    tiny_llama(1).save_pretrained(folder / "teacher")
    tiny_tokenizer().save_pretrained(folder / "teacher")
    for name, count in (("a", 90), ("b", 21)):
        rows = [{"text": f"{name} story {n}: " + "the cat sat. " * (1 + n % 5)} for n in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_a_recipe_with_sources_is_converted_without_data(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("plot_stages", "plot_layer_error"):
        monkeypatch.setattr(f"linearize.conversion.outputs.{name}", lambda *_: None)
    paths = [str(folder / "a.jsonl"), str(folder / "b.jsonl")]
    sources = [{"path": path, "weight": weight} for path, weight in zip(paths, (1, 3), strict=True)]
    convert(str(folder / "teacher"), out=folder / "student", recipe=recipe(sources=sources), device="cpu")
    errors = capsys.readouterr().err
    (line,) = [line for line in errors.splitlines() if line.startswith("training text by source")]
    assert f"{paths[0]} 2" in line and f"{paths[1]} 7" in line
    assert json.loads((folder / "student" / "report.json").read_text())["data"] == paths
    kept = yaml.safe_load((folder / "student" / "recipe.yaml").read_text())
    assert kept["data"]["sources"] == sources
    with pytest.raises(InputError, match=r"data\.sources"):
        convert(str(folder / "teacher"), data=paths[:1], out=folder / "other", recipe=recipe(sources=sources))
    with pytest.raises(InputError, match="no data"):
        convert(str(folder / "teacher"), out=folder / "other", recipe=recipe())


def test_weights_leave_the_held_out_documents_as_they_are(folder: Path) -> None:
    teacher, tokenizer = tiny_llama(1), tiny_tokenizer()
    paths = [str(folder / "a.jsonl"), str(folder / "b.jsonl")]
    sources = [{"path": path, "weight": weight} for path, weight in zip(paths, (1, 3), strict=True)]
    plain, heldout = read_text(teacher, tokenizer, recipe().data, paths)
    mixed, same = read_text(teacher, tokenizer, recipe(sources=sources).data, paths)
    assert all((a["input_ids"] == b["input_ids"]).all() for a, b in zip(heldout, same, strict=True))
    assert abs(len(plain.rows(40)) - len(mixed.rows(40))) < 8
    assert plain.fingerprint(40, heldout) != mixed.fingerprint(40, heldout)
    assert np.isin(mixed.rows(40).documents.hash_D, plain.rows(40).documents.hash_D).all()


def test_a_conversion_warns_of_paragraphs_as_documents(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "book.txt").write_text("\n\n".join(f"{n}, a cat" for n in range(30)))
    (folder / "other.txt").write_text("The end. " * 50)
    specs = [str(folder / "book.txt"), str(folder / "other.txt")]
    data = recipe(length=128, heldout=1).data
    text, _ = read_text(tiny_llama(1), tiny_tokenizer(), data, specs)
    (warning,) = [record.getMessage() for record in caplog.records if "blank lines" in record.getMessage()]
    assert f"{specs[0]}:whole" in warning and len(text.rows(128).documents) == 30
    caplog.clear()
    whole = data.model_copy(update={"whole_files": True})
    text, _ = read_text(tiny_llama(1), tiny_tokenizer(), whole, specs)
    assert "blank lines" not in caplog.text and len(text.rows(128).documents) == 1

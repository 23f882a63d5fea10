"""What data SPECs name: files, folders, patterns, whole texts, and Hub data sets with revision, split and column."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import byte_tokenizer

from linearize.errors import InputError
from linearize.training.data import hub as hub_module
from linearize.training.data import token_cache
from linearize.training.data.files import EXTENSIONS
from linearize.training.data.loading import load_documents, short_documents
from linearize.training.data.specs import HubName, data_source, input_paths
from linearize.training.data.text_lines import cuts_at_blank_lines, text_documents, text_lines

TOKENIZER = byte_tokenizer()
END = "<|endoftext|>"


def texts(*specs: str, **settings: Any) -> list[str]:
    documents = load_documents(list(specs), TOKENIZER, **settings)
    return [str(TOKENIZER.decode(document.tokens[1:-1])) for document in documents]


def row(text: str) -> bytes:
    return (json.dumps({"text": text}) + "\n").encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two plain files, one compressed, one hidden, and files in a folder below."""
    folder = tmp_path / "text"
    (folder / "below").mkdir(parents=True)
    (folder / "b.jsonl").write_bytes(row("two"))
    (folder / "a.jsonl").write_bytes(row("one"))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(row("three")))
    (folder / ".d.jsonl").write_bytes(b"not JSON")
    (folder / "notes.md").write_bytes(b"not data")
    (folder / "below" / "e.jsonl.bz2").write_bytes(bz2.compress(row("five")))
    return folder


def test_folders_and_patterns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert texts(str(folder)) == ["one", "two", "three"]
    assert texts(f"{folder}/*.jsonl") == ["one", "two"]
    assert texts(f"{folder}/[bc].jsonl*") == ["two", "three"]
    assert texts(f"{folder}/**/*.jsonl*") == ["one", "two", "five", "three"]
    monkeypatch.chdir(folder.parent)
    assert texts("text") == texts("text/") == ["one", "two", "three"] and texts("text/below/*") == ["five"]
    assert input_paths("text/*.jsonl") == (Path("text/a.jsonl"), Path("text/b.jsonl"))
    assert input_paths("text") == (Path("text"),) and input_paths("pseudo:text/a.jsonl") == (Path("text/a.jsonl"),)
    assert input_paths("self") == input_paths("owner/name@main:train") == ()


def test_an_error_in_a_row_names_the_file(folder: Path) -> None:
    (folder / "b.jsonl").write_text('{"text": "a"}\n{"text": 3}')
    with pytest.raises(InputError, match=r"b\.jsonl', row 2: field 'text' must be text"):
        texts(str(folder))


def test_folders_and_patterns_that_cannot_be_read(folder: Path) -> None:
    with pytest.raises(InputError, match="no file matches"):
        texts(f"{folder}/*.csv")
    with pytest.raises(InputError, match=r"unknown extension '.md'"):
        texts(f"{folder}/*")
    (folder / "x.txt").write_text("a\n\nb")
    with pytest.raises(InputError, match=re.escape("several kinds (.jsonl, .txt)")) as caught:
        texts(str(folder))
    assert "\n" not in str(caught.value)
    assert ".txt" in EXTENSIONS


def test_data_sets_that_were_saved_to_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", "two", "three"], "id": [1, 2, 3]})
    rows.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    assert texts(str(tmp_path / "saved")) == ["one", "two", "three"]
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(InputError, match=r"is a folder of splits; name one of them: .*splits/test, .*splits/train"):
        texts(str(tmp_path / "splits"))
    assert texts(str(tmp_path / "splits" / "test")) == ["one", "two", "three"]


BOOK = "Chapter one.\n\nIt rained.\n \t\n\nIt stopped.\n"


@pytest.mark.parametrize("name", ["book.txt", "book.txt.gz"])
def test_a_text_as_a_whole(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(BOOK.encode() if name == "book.txt" else gzip.compress(BOOK.encode()))
    assert texts(str(path)) == ["Chapter one.", "It rained.", "It stopped."]
    assert texts(f"{path}:whole") == texts(str(path), whole_files=True) == [BOOK.strip("\n")]
    path.write_bytes((f"{BOOK}{END}\nThe end\n").encode())
    if name == "book.txt":
        assert texts(f"{path}:whole") == texts(str(path)) == [BOOK.strip("\n"), "The end"]
    (tmp_path / "odd:whole").write_text("x")
    assert data_source(f"{path}:whole").whole and not data_source(str(path)).whole


def former_documents(text: str, ends: Sequence[str]) -> list[str]:
    """How a text was cut while all of it was in memory."""
    lines = "|".join(map(re.escape, ends))
    parts = [part for part in re.split(rf"(?m)^[ \t]*(?:{lines})[ \t]*$", text) if part.strip()]
    if len(parts) < 2:
        parts = [part for whole in parts for part in re.split(r"\n(?:[ \t]*\n)+", whole) if part.strip()]
    return [part.strip("\n") for part in parts]


@pytest.mark.parametrize("seed", range(400))
def test_documents_are_cut_as_before(tmp_path: Path, seed: int) -> None:
    import random

    rng = random.Random(seed)
    parts = ["a", "b c", "\n", "\n", "\n\n", " ", "\t", "\r\n", "\r", "\f", "\u00a0", "\u2028"]
    parts += [END, f"\n{END}\n", "</s>\n"] * (seed % 2)
    text = "".join(rng.choice(parts) for _ in range(rng.randint(0, 25)))
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    ends = (END, "</s>")
    blank = cuts_at_blank_lines(path, ends)
    result = list(text_documents(text_lines(path), ends, blank_lines=blank))
    assert result == former_documents(path.read_text(encoding="utf-8-sig"), ends), repr(text)


def test_where_a_file_is_not_utf8(tmp_path: Path) -> None:
    content = ("é" * 700_001 + "\n").encode() + b"\xff\n"
    for path, data in ((tmp_path / "a.txt", content), (tmp_path / "b.txt.gz", gzip.compress(content))):
        path.write_bytes(data)
        with pytest.raises(InputError, match=rf"{path.name}: is not UTF-8 text \(byte 1400003\)"):
            texts(str(path))


def test_short_documents_cut_at_blank_lines_are_reported(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n\n".join("A short paragraph." for _ in range(9)))
    (tmp_path / "stories.txt").write_text(f"\n{END}\n".join("A short story." for _ in range(9)))
    book, stories = str(tmp_path / "book.txt"), str(tmp_path / "stories.txt")
    documents = load_documents([stories, book], TOKENIZER)
    (line,) = short_documents(documents, 161)
    assert "9 documents of 20 tokens" in line and f"{book}:whole" in line and "data.whole_files" in line
    assert "\n" not in line and short_documents(documents, 160) == []
    assert short_documents(load_documents([f"{book}:whole"], TOKENIZER), 4096) == []


HUB: list[tuple[str, HubName]] = [
    ("wikitext:raw-v1", HubName(name="wikitext", config="raw-v1")),
    ("owner/name", HubName(name="owner/name")),
    ("owner/name@v1.0", HubName(name="owner/name", revision="v1.0")),
    ("owner/name@refs/convert/parquet:train", HubName(name="owner/name", revision="refs/convert/parquet")),
    ("owner/name:validation", HubName(name="owner/name", split="validation")),
    ("owner/name:train_sft:body", HubName(name="owner/name", split="train_sft", column="body")),
    ("name@main:en:test:body", HubName(name="name", revision="main", config="en", split="test", column="body")),
    ("name:split=en:column=train", HubName(name="name", split="en", column="train")),
    ("name:config=train", HubName(name="name", config="train")),
]


@pytest.mark.parametrize(("spec", "hub"), HUB, ids=lambda value: value if isinstance(value, str) else "")
def test_parts_of_a_hub_name(spec: str, hub: HubName) -> None:
    assert data_source(spec).hub == hub


@pytest.mark.parametrize("spec", ["two words", "name:a:b", "name:test:a:b", "name@", "name::train"])
def test_what_is_no_hub_name(spec: str) -> None:
    with pytest.raises(InputError, match=re.escape(repr(spec))) as caught:
        data_source(spec)
    assert "\n" not in str(caught.value) and "split" in str(caught.value).lower()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A data set on this machine in the place of the Hub: what was asked of it."""
    datasets = pytest.importorskip("datasets")
    data = tmp_path / "hub"
    data.mkdir()
    for split in ("train", "test"):
        lines = [json.dumps({"body": f"{split} {n}", "text": None if n == 1 else f"text {n}"}) for n in range(3)]
        (data / f"{split}.jsonl").write_text("\n".join(lines))
    asked: list[dict[str, Any]] = []
    load = datasets.load_dataset

    def local(name: str, config: str | None, **settings: Any) -> Any:
        asked.append({"name": name, "config": config, **settings})
        settings.pop("revision", None)
        return load(str(data), config, **settings, cache_dir=str(tmp_path / "datasets"))

    monkeypatch.setattr(datasets, "load_dataset", local)
    return asked


def test_a_hub_data_set_is_streamed(hub: list[dict[str, Any]], caplog: pytest.LogCaptureFixture) -> None:
    assert texts("owner/set@v2:test:body") == ["test 0", "test 1", "test 2"]
    assert hub == [{"name": "owner/set", "config": None, "split": "test", "streaming": True, "revision": "v2"}]
    assert texts("owner/set") == ["text 0", "text 2"]
    assert "1 of 3 rows (the first: row 2) hold null" in caplog.text
    with pytest.raises(InputError, match=r"owner/set:train:title.*no column 'title'.*body, text") as caught:
        texts("owner/set:train:title")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"owner/set:split=dev") as caught:
        texts("owner/set:split=dev")
    assert "\n" not in str(caught.value)


def test_a_hub_data_set_is_kept_by_its_commit(
    hub: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    commit: str | None = "a" * 40
    monkeypatch.setattr(token_cache, "commit_of", lambda _: commit)
    for _ in range(2):
        assert len(texts("owner/set", cache=tmp_path / "tokens")) == 2
    assert [call["revision"] for call in hub] == ["a" * 40]
    commit = "b" * 40
    texts("owner/set", cache=tmp_path / "tokens")
    commit = None  # without a network: the last one
    texts("owner/set", cache=tmp_path / "tokens")
    assert [call["revision"] for call in hub] == ["a" * 40, "b" * 40] and "cannot be reached" in caplog.text


def test_without_a_network_a_hub_name_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InputError, match=r"nobody/has-this:train.*network") as caught:
        texts("nobody/has-this:train", cache=tmp_path / "tokens")
    assert "\n" not in str(caught.value)
    assert hub_module.commit_of(HubName(name="a", revision="c" * 40)) == "c" * 40
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_files_alone_ask_nothing_of_the_network(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked the network"))
    assert texts(str(folder), cache=tmp_path / "tokens") == ["one", "two", "three"]

"""Tokenized text is made once, found again by what it depends on, made again where it is damaged, and bounded."""

from __future__ import annotations

import gzip
import json
import logging
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import CHAT, byte_tokenizer

from linearize.errors import InputError
from linearize.training.data import documents as documents_module
from linearize.training.data import token_cache as module
from linearize.training.data.document_list import DocumentList
from linearize.training.data.loading import load_documents
from linearize.training.data.specs import data_source
from linearize.training.data.token_cache import content_checksum, remove_least_recent, write_store

TOKENIZER = byte_tokenizer()
NAMES = ("tokens.bin", "counts.bin", "ends.bin", "hashes.bin")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def spec(tmp_path: Path) -> str:
    rows = [{"prompt": f"Question {n}? ", "completion": "yes" * (n % 4)} for n in range(17)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "a.jsonl")


def loaded(spec: str | list[str], cache: Path, tokenizer: Any = TOKENIZER, **settings: Any) -> tuple[DocumentList, str]:
    """The documents, and the last line about them."""
    lines: list[str] = []
    specs = [spec] if isinstance(spec, str) else spec
    return load_documents(specs, tokenizer, cache=cache, say=lines.append, **settings), lines[-1]


def entries(cache: Path) -> list[Path]:
    return sorted(path.parent for path in cache.glob("*/meta.json"))


@pytest.mark.parametrize("answer_only", [False, True])
def test_a_second_run_finds_the_tokens(
    spec: str, cache: Path, answer_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load_documents([spec], TOKENIZER, answer_only=answer_only)
    first, line = loaded(spec, cache, answer_only=answer_only)
    assert list(first) == list(plain) and "17 documents" in line and str(cache) not in line
    monkeypatch.setattr(module, "write_store", lambda *_, **__: pytest.fail("tokenized again"))
    second, line = loaded(spec, cache, answer_only=answer_only)
    assert list(second) == list(plain) and second.digest == first.digest
    assert "17 documents" in line and str(entries(cache)[0]) in line and "\n" not in line
    assert (entries(cache)[0] / "counts.bin").is_file() == answer_only


def test_the_same_content_is_found_under_another_name_and_date(spec: str, cache: Path, tmp_path: Path) -> None:
    loaded(spec, cache)
    other = tmp_path / "b.jsonl"
    other.write_bytes(Path(spec).read_bytes())
    os.utime(other, (1, 1))
    assert "tokenized before" in loaded(str(other), cache)[1]
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(spec).read_bytes()))
    assert "tokenized before" not in loaded(str(packed), cache)[1]
    assert len(entries(cache)) == 2


def test_whatever_the_tokens_depend_on_is_part_of_the_key(spec: str, cache: Path, tmp_path: Path) -> None:
    calls = 0

    def made(what: str, tokenizer: Any = TOKENIZER, spec: str = spec, **settings: Any) -> None:
        nonlocal calls
        documents, line = loaded(spec, cache, tokenizer, **settings)
        calls += 1
        assert "tokenized before" not in line and len(entries(cache)) == calls, what
        assert "tokenized before" in loaded(spec, cache, tokenizer, **settings)[1], what
        assert list(documents) == list(load_documents([spec], tokenizer, **settings)), what

    made("the first")
    made("answers", answer_only=True)
    made("no BOS", byte_tokenizer(bos_token=None))
    templated = byte_tokenizer()
    templated.chat_template = CHAT
    made("template", templated)
    more = byte_tokenizer()
    more.add_tokens(["Question"])
    made("another vocabulary", more)
    Path(spec).write_text(Path(spec).read_text().replace("Question 3", "question 3"))
    made("the same size, other content")
    (tmp_path / "b.txt").write_text("one\n\ntwo\n\nthree")
    made("text", spec=str(tmp_path / "b.txt"))
    made("text as a whole", spec=str(tmp_path / "b.txt"), whole_files=True)
    assert "tokenized before" in loaded(f"{tmp_path / 'b.txt'}:whole", cache)[1]


@pytest.mark.parametrize("name", ["meta.json", *NAMES])
@pytest.mark.parametrize("damage", ["a bit", "the end", "all"])
def test_a_damaged_store_is_noticed_and_made_again(
    spec: str, cache: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = list(loaded(spec, cache, answer_only=True)[0])
    path = entries(cache)[0] / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 128
    damaged = {"a bit": bytes(data), "the end": path.read_bytes()[:-1], "all": None}[damage]
    path.unlink()
    if damaged is not None:
        path.write_bytes(damaged)
    documents, line = loaded(spec, cache, answer_only=True)
    assert list(documents) == expected and "tokenized before" not in line
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and str(path) in warnings[0]
    assert "tokenized before" in loaded(spec, cache, answer_only=True)[1]


def test_text_that_cannot_be_used_leaves_nothing_and_is_reported_again(spec: str, cache: Path) -> None:
    Path(spec).write_text(Path(spec).read_text() + '\n{"text": 3}')
    for _ in range(2):
        with pytest.raises(InputError, match="row 18"):
            loaded(spec, cache)
    assert not entries(cache) and not list(cache.glob(".*.partial-*"))


def test_what_was_noted_of_the_rows_is_reported_each_time(
    spec: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Path(spec).write_text(Path(spec).read_text() + '\n{"text": null}')
    for times in (1, 2):
        loaded(spec, cache)
        assert caplog.text.count("1 of 18 rows (the first: row 18) hold null") == times


def test_a_cache_that_cannot_be_written_is_one_line(spec: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="LINEARIZE_CACHE") as caught:
        loaded(spec, tmp_path / "file" / "tokens")
    assert "\n" not in str(caught.value)


def test_a_file_that_did_not_change_is_not_read_for_its_checksum(
    spec: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = content_checksum(Path(spec), cache)
    assert not (cache / "files").exists()  # it may still change within a tick of the clock
    past = time.time() - 60
    os.utime(spec, (past, past))
    assert content_checksum(Path(spec), cache) == fresh
    monkeypatch.setattr(module, "file_checksum", lambda _: "read")
    assert content_checksum(Path(spec), cache) == fresh
    os.utime(spec, (past, past - 1))
    assert content_checksum(Path(spec), cache) == "read"


def test_the_cache_is_bounded_by_the_last_use_and_keeps_what_is_in_use(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists, sizes = [], []
    for number in range(4):
        path = tmp_path / f"{number}.txt"
        path.write_text("\n\n".join(f"{number} {n}" for n in range(50)))
        lists.append(loaded(str(path), cache)[0])
        folder = lists[-1].stores[0].folder
        assert folder is not None
        os.utime(folder / "meta.json", (1000 + number, 1000 + number))
        sizes.append(sum(file.stat().st_size for file in folder.iterdir()))
    folders = [documents.stores[0].folder for documents in lists]
    assert remove_least_recent(cache, 0) == [] and len(entries(cache)) == 4  # all are in use
    kept = list(lists[1])
    for number in (0, 2, 3):
        lists[number] = None  # type: ignore[call-overload]
    killed = cache / f".{'0' * 32}.partial-x"
    killed.mkdir()
    assert remove_least_recent(cache, sum(sizes) - 1) == [folders[0]] and not killed.exists()
    assert remove_least_recent(cache, sizes[1]) == [folders[2], folders[3]]
    assert entries(cache) == [folders[1]] and list(lists[1]) == kept
    monkeypatch.setenv("LINEARIZE_CACHE_SIZE", "1kB")
    lists[1] = None  # type: ignore[call-overload]
    loaded(str(tmp_path / "0.txt"), cache)
    assert len(entries(cache)) == 1
    monkeypatch.setenv("LINEARIZE_CACHE_SIZE", "much")
    with pytest.raises(InputError, match="LINEARIZE_CACHE_SIZE"):
        remove_least_recent(cache)


def test_processes_at_once_make_the_tokens_once(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"Story {n} of a cat" for n in range(3001)))
    code = f"""
import sys, time
sys.path[:0] = [{str(Path(__file__).parent / "support")!r}]
from byte_tokenizer import byte_tokenizer
from pathlib import Path
from linearize.training.data import token_cache
from linearize.training.data.loading import load_documents
write = token_cache.write_store
token_cache.write_store = lambda *a, **k: (time.sleep(1), write(*a, **k))
lines = []
documents = load_documents([{str(path)!r}], byte_tokenizer(), cache=Path({str(cache)!r}), say=lines.append)
print(documents.digest, sum(map(sum, (d.tokens for d in documents))), "before" if "before" in lines[0] else "made")
"""
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in running]
    assert all(process.returncode == 0 for process in running), outputs
    one, other = (output.split() for output, _ in outputs)
    assert one[:2] == other[:2] and {one[2], other[2]} == {"made", "before"}
    assert len(entries(cache)) == 1 and not list(cache.glob(".*.partial-*"))


def test_memory_does_not_grow_with_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "_CHARACTERS", 20_000)

    def peak(rows: int) -> int:
        path, folder = tmp_path / f"{rows}.jsonl", tmp_path / str(rows)
        path.write_text("\n".join(json.dumps({"text": "abcdefg " * (101 + row % 7)}) for row in range(rows)))
        folder.mkdir()
        tracemalloc.start()
        write_store(data_source(str(path)), TOKENIZER, folder)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(11)
    small, large = peak(203), peak(1003)
    tokens = 800 * 8 * 104
    assert large - small < 0.5 * tokens, (large - small) / tokens  # what is left is 16 bytes a document

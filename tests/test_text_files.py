"""Text files as people have them: what separates documents, compressed files, and what is reported about them."""

from __future__ import annotations

import bz2
import gzip
import logging
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from byte_tokenizer import byte_tokenizer

from linearize.errors import InputError
from linearize.training.data.loading import load_documents

TOKENIZER = byte_tokenizer()
STORY = "Once there was a fox.\n\nIt had a den.\n"


def texts(spec: str) -> list[str]:
    return [str(TOKENIZER.decode(document.tokens)) for document in load_documents([spec], TOKENIZER)]


def written(folder: Path, text: str, name: str = "a.txt") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


@pytest.mark.parametrize("separator", ["<|endoftext|>", "</s>", "  <|endoftext|> "])
def test_lines_of_an_end_token_separate_documents_and_blank_lines_are_paragraphs(
    tmp_path: Path, separator: str
) -> None:
    spec = written(tmp_path, f"{STORY}{separator}\n\n{STORY}{separator}\nThe end.\n{separator}\n")
    one = "<s>Once there was a fox.\n\nIt had a den.</s>"
    assert texts(spec) == [one, one, "<s>The end.</s>"]


def test_both_end_tokens_in_one_file(tmp_path: Path) -> None:
    assert texts(written(tmp_path, "a\n</s>\nb\n<|endoftext|>\nc")) == ["<s>a</s>", "<s>b</s>", "<s>c</s>"]


def test_an_end_token_after_the_last_document_alone_leaves_the_blank_lines(tmp_path: Path) -> None:
    assert texts(written(tmp_path, "one\n\ntwo\n<|endoftext|>\n")) == ["<s>one</s>", "<s>two</s>"]


def test_an_end_token_within_a_line_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = written(tmp_path, "one<|endoftext|>two\n\nthree\n\nfour <|endoftext|>five")
    assert texts(spec)[0] == "<s>one<|endoftext|>two</s>"
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "2 of 3 rows (the first: row 1)" in caplog.text and "'<|endoftext|>'" in caplog.text
    caplog.clear()
    texts(written(tmp_path, "one\n<|endoftext|>\ntwo"))
    assert not caplog.records


def test_the_number_of_documents_and_their_lengths_are_reported(tmp_path: Path) -> None:
    lines: list[str] = []
    book = written(tmp_path, "a\n\nbbb\n\n" + "c" * 1998)
    load_documents([book, written(tmp_path, '{"text": "x"}\n', "b.jsonl")], TOKENIZER, say=lines.append)
    assert len(lines) == 2
    assert "3 documents" in lines[0] and "3 to 2,000 tokens, median 5" in lines[0] and "blank lines" in lines[0]
    assert "1 document" in lines[1] and "blank" not in lines[1]


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress, "zst": zstd, "bz2": bz2.compress, "xz": lzma.compress
}  # fmt: skip


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "é"}\n{"text": "two"}\n'),
        ("a.json", '[{"text": "é"}, {"text": "two"}]'),
        ("a.txt", "é\n\ntwo"),
        ("a.csv", "text\né\ntwo\n"),
    ],
)
def test_compressed_files(tmp_path: Path, name: str, content: str, kind: str) -> None:
    half = content.encode()[: len(content) // 2], content.encode()[len(content) // 2 :]
    path = tmp_path / f"{name}.{kind}"
    path.write_bytes(b"".join(map(PACKED[kind], half)))  # two parts one after the other, as parallel tools write
    assert texts(str(path)) == ["<s>é</s>", "<s>two</s>"]


@pytest.mark.parametrize("kind", PACKED)
def test_a_damaged_or_cut_compressed_file_is_reported_in_one_line(tmp_path: Path, kind: str) -> None:
    for content in (b"no such thing", PACKED[kind](b'{"text": "one"}\n' * 9999)[:-9]):
        path = tmp_path / f"a.jsonl.{kind}"
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"a.jsonl.{kind}.*not a valid {kind} file") as caught:
            texts(str(path))
        assert "\n" not in str(caught.value)


def test_a_compressed_file_of_an_unknown_kind(tmp_path: Path) -> None:
    for name in ("a.gz", "a.docx.gz", "a.docx"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(InputError, match=r"unknown extension.*\.csv.*\.gz"):
            texts(str(tmp_path / name))


def test_what_is_reported_reaches_the_log_by_default(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="linearize"):
        texts(written(tmp_path, "one\n\ntwo"))
    assert "2 documents" in caplog.text

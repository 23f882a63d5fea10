"""Rows as data sets have them: ShareGPT, columns, content parts, conversational prompts, nulls, broken text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from byte_tokenizer import CHAT, byte_tokenizer

from linearize.errors import InputError
from linearize.training.data.loading import Document, load_documents
from linearize.training.data.preferences import preference_of, read_preferences
from linearize.training.data.pseudo_labels import prompt_of

TOKENIZER = byte_tokenizer(chat=CHAT)


def texts(documents: Sequence[Document]) -> list[str]:
    return [str(TOKENIZER.decode(document.tokens)) for document in documents]


def counted(document: Document) -> str:
    pairs = zip(document.tokens, document.loss_mask, strict=True)
    return str(TOKENIZER.decode([token for token, counts in pairs if counts]))


def file_of(folder: Path, content: object, name: str = "a.json") -> str:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def lines(*rows: object) -> str:
    return "\n".join(map(json.dumps, rows)) + "\n"


ASKED, ANSWER = {"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "yes"}
TALK = "<user> Is it?\n<assistant> yes\n"
CHATS: dict[str, dict[str, Any]] = {
    "sharegpt": {"conversations": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "yes"}]},
    "conversations with roles": {"conversations": [ASKED, ANSWER]},
    "messages as sharegpt": {"messages": [{"from": "user", "value": "Is it?"}, {"from": "assistant", "value": "yes"}]},
    "other names of the roles": {"messages": [{"role": "human", "content": "Is it?"}, {**ANSWER, "role": "model"}]},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Is "}, {"type": "text", "text": "it?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        ]
    },
    "json text": {"messages": json.dumps([ASKED, ANSWER])},
    "null keys": {"messages": [{**ASKED, "name": None, "tool_calls": None}, {**ANSWER, "tool_calls": None}]},
    "null columns": {"text": None, "prompt": None, "completion": None, "messages": [ASKED, ANSWER]},
    "prompt and completion": {"prompt": [ASKED], "completion": [ANSWER]},
    "prompt and text": {"prompt": [ASKED], "completion": "yes"},
    "text and message": {"prompt": "Is it?", "completion": ANSWER},
}


@pytest.mark.parametrize("name", CHATS)
def test_all_ways_to_write_a_chat_mean_the_same(tmp_path: Path, name: str) -> None:
    spec = file_of(tmp_path, [CHATS[name]])
    assert texts(load_documents([spec], TOKENIZER)) == [f"<s>{TALK}</s>"]
    assert counted(load_documents([spec], TOKENIZER, answer_only=True)[0]) == "yes\n</s>"


def test_the_answers_of_a_conversational_completion_alone_count(tmp_path: Path) -> None:
    earlier = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    spec = file_of(tmp_path, [{"prompt": [*earlier, ASKED], "completion": [ANSWER, *earlier]}])
    document = load_documents([spec], TOKENIZER, answer_only=True)[0]
    assert counted(document) == "yes\nb\n</s>"
    assert texts([document])[0].startswith("<s><user> a\n<assistant> b\n<user> Is it?\n<assistant> yes\n<user> a")


def test_a_system_column_is_the_first_message(tmp_path: Path) -> None:
    row = {"system": "Be brief.", **CHATS["sharegpt"]}
    own = {"system": "not this", "messages": [{"role": "system", "content": "own"}, ASKED]}
    result = texts(load_documents([file_of(tmp_path, [row, {**row, "system": ""}, own])], TOKENIZER))
    assert result == [f"<s><system> Be brief.\n{TALK}</s>", f"<s>{TALK}</s>", "<s><system> own\n<user> Is it?\n</s>"]


BAD_CHATS = {
    "part of type 'image_url'": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
    "a message from 'judge'": [{"from": "judge", "value": "x"}],
    "without content": [{"role": "user"}],
    "role and content": [{"content": "x"}],
    "list of": ["hi"],
}


@pytest.mark.parametrize("reason", BAD_CHATS)
@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_a_chat_that_cannot_be_used_is_reported_in_one_line(tmp_path: Path, reason: str, field: str) -> None:
    spec = file_of(tmp_path, lines({field: [ASKED, ANSWER]}, {field: BAD_CHATS[reason]}), "a.jsonl")
    with pytest.raises(InputError, match=rf"row 2: .*'{field}'.*{reason}") as caught:
        load_documents([spec], TOKENIZER)
    assert "\n" not in str(caught.value)


def test_content_is_text(tmp_path: Path) -> None:
    spec = file_of(tmp_path, [{"content": "abc", "url": "x"}, {"content": "no", "text": "yes"}])
    assert texts(load_documents([spec], TOKENIZER)) == ["<s>abc</s>", "<s>yes</s>"]
    spec = file_of(tmp_path, [{"content": "no", "prompt": "p", "completion": "c"}])
    for answer_only in (False, True):
        assert texts(load_documents([spec], TOKENIZER, answer_only=answer_only)) == ["<s>pc</s>"]


TABLE = 'prompt,completion,n\n"a, ""b""\nc",d,1\ne,f,2\n'


@pytest.mark.parametrize(("name", "content"), [("a.csv", TABLE), ("a.tsv", TABLE.replace(",", "\t"))])
def test_tables_of_text(tmp_path: Path, name: str, content: str) -> None:
    comma = "," if name == "a.csv" else "\t"
    result = texts(load_documents([file_of(tmp_path, "\ufeff" + content, name)], TOKENIZER))
    assert result == [f'<s>a{comma} "b"\ncd</s>', "<s>ef</s>"]


def test_a_long_cell_and_a_chat_in_a_table(tmp_path: Path) -> None:
    long = "x" * 300_000
    assert len(load_documents([file_of(tmp_path, f"text\n{long}\nb\n", "a.csv")], TOKENIZER)[0]) == 300_002
    cell = json.dumps([ASKED, ANSWER]).replace('"', '""')
    result = texts(load_documents([file_of(tmp_path, f'messages,id\n"{cell}",1\n', "a.csv")], TOKENIZER))
    assert result == [f"<s>{TALK}</s>"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a,b\n1,2\n", "row 1: has the fields a, b; give one of"),
        ("text,b\n1,2\n1,2,3\n", "row 2: has more cells than the first line has names"),
        ('text\nok\n"open', "line 2: not a valid table"),
        ("text\n", "empty"),
        ("", "empty"),
    ],
)
def test_a_table_that_cannot_be_used_is_reported_in_one_line(tmp_path: Path, content: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        load_documents([file_of(tmp_path, content, "a.csv")], TOKENIZER)
    assert "a.csv" in str(caught.value) and "\n" not in str(caught.value)


COLUMNS: list[object] = [
    {"text": ["one", "two"], "id": [1, 2]},
    {"data": {"text": ["one", "two"]}},
    {"text": {"0": "one", "1": "two"}, "id": {"0": 1, "1": 2}},
]


@pytest.mark.parametrize("content", COLUMNS)
def test_columns_of_a_json_object_are_rows(tmp_path: Path, content: object) -> None:
    assert texts(load_documents([file_of(tmp_path, content)], TOKENIZER)) == ["<s>one</s>", "<s>two</s>"]


def test_columns_of_unequal_length(tmp_path: Path) -> None:
    for columns in ({"text": ["a", "b"], "id": [1]}, {"text": {"0": "a", "1": "b"}, "id": {"0": 1, "2": 2}}):
        with pytest.raises(InputError, match="columns of unequal length: text 2, id"):
            load_documents([file_of(tmp_path, columns)], TOKENIZER)


NULLS: list[Any] = [
    None,
    {"text": None},
    {"prompt": "a", "completion": None},
    {"messages": None},
    {"messages": [ASKED, {"role": "assistant", "content": None}]},
    {"instruction": "a", "output": None},
    {"text": float("nan")},
    {"content": None},
]


@pytest.mark.parametrize("row", NULLS)
def test_a_row_of_null_is_left_out_and_reported(tmp_path: Path, row: object, caplog: pytest.LogCaptureFixture) -> None:
    spec = file_of(tmp_path, lines({"text": "one"}, {"text": "two"}, row, {"text": "three"}, row), "a.jsonl")
    for answer_only in (False, True):
        caplog.clear()
        result = texts(load_documents([spec], TOKENIZER, answer_only=answer_only))
        assert result == ["<s>one</s>", "<s>two</s>", "<s>three</s>"]
        (record,) = caplog.records
        assert "2 of 5 rows (the first: row 3)" in record.getMessage() and "null" in record.getMessage()
    with pytest.raises(InputError, match="all 2 rows hold null"):
        load_documents([file_of(tmp_path, lines(row, row), "a.jsonl")], TOKENIZER)


def test_empty_rows_are_left_out_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = file_of(tmp_path, lines({"text": "one"}, {"text": " \n"}, {"text": "two"}), "a.jsonl")
    assert len(load_documents([spec], TOKENIZER)) == 2
    assert "1 of 3 rows (the first: row 2)" in caplog.text and "empty" in caplog.text


def test_nulls_in_preferences_and_prompts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": None, "rejected": "c"}]
    assert len(read_preferences(file_of(tmp_path, rows), TOKENIZER)) == 1
    assert "1 of 2 rows (the first: row 2)" in caplog.text and "null" in caplog.text


def test_what_arrow_fills_up_with_nulls_is_not_there(tmp_path: Path) -> None:
    template = CHAT.replace("m['content'] +", "m['content'] + m['calls'] | default([]) | tojson +")
    rows = [{"messages": [{**ASKED, "calls": [{"x": 1}]}, {**ANSWER, "calls": [{"y": 2}]}]}]
    path = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    result = texts(load_documents([path], byte_tokenizer(chat=template)))
    assert result == ['<s><user> Is it?[{"x": 1}]\n<assistant> yes[{"y": 2}]\n</s>']


def test_half_of_a_surrogate_pair_is_replaced_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = '{"text": "whole \\ud83d\\ude00 pair"}\n{"text": "x"}\n{"text": "half \\ud83d!"}\n'
    result = texts(load_documents([file_of(tmp_path, rows, "a.jsonl")], TOKENIZER))
    assert result == ["<s>whole \U0001f600 pair</s>", "<s>x</s>", "<s>half \ufffd!</s>"]
    (record,) = caplog.records
    assert "1 of 3 rows (the first: row 3)" in record.getMessage() and "surrogate" in record.getMessage()


def test_half_pairs_everywhere_in_a_row(tmp_path: Path) -> None:
    row = '{"conversations": [{"from": "human", "value": "\\ude00"}, {"from": "gpt", "value": "\\ud83dyes"}]}'
    result = texts(load_documents([file_of(tmp_path, f"[{row}]")], TOKENIZER))
    assert result == ["<s><user> \ufffd\n<assistant> \ufffdyes\n</s>"]
    pair = '{"prompt": "a\\ud83d", "chosen": "b", "rejected": "c"}'
    assert read_preferences(file_of(tmp_path, f"[{pair}]"), TOKENIZER)[0].chosen == "a\ufffdb"


def test_prompts_and_preferences_in_the_same_ways() -> None:
    for name in ("sharegpt", "parts", "prompt and completion", "json text"):
        assert prompt_of(CHATS[name], TOKENIZER) == "<user> Is it?\n<assistant> "
    assert prompt_of({"prompt": [ASKED], "system": "Be brief."}, TOKENIZER).startswith("<system> Be brief.\n<user>")
    parts = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    result = preference_of({"prompt": [ASKED], "chosen": [parts], "rejected": "no"}, TOKENIZER)
    assert result.chosen == TALK

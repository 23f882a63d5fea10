"""Data SPECs become documents; held-out documents are never trained on; what cannot be used is one line of error."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from byte_tokenizer import CHAT, byte_tokenizer
from pydantic import ValidationError
from transformers import AutoTokenizer

from linearize.errors import InputError
from linearize.training.data.loading import DataConfig, Document, load_documents, split

TOKENIZER = byte_tokenizer()


def _texts(documents: Sequence[Document], tokenizer: Any = TOKENIZER) -> list[str]:
    return [tokenizer.decode(document.tokens) for document in documents]


def _counted(document: Document) -> str:
    """The text whose loss counts."""
    pairs = zip(document.tokens, document.loss_mask, strict=True)
    return str(TOKENIZER.decode([token for token, counts in pairs if counts]))


def _write(folder: Path, name: str, content: object) -> str:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def _lines(*rows: object) -> str:
    return "\n".join(map(json.dumps, rows)) + "\n"


def test_txt_documents_are_separated_by_blank_lines(tmp_path: Path) -> None:
    spec = _write(tmp_path, "a.txt", "\n\none\nmore é\n\n  two\n \t\n\n\nthree\n")
    documents = load_documents([spec], TOKENIZER)
    assert _texts(documents) == ["<s>one\nmore é</s>", "<s>  two</s>", "<s>three</s>"]
    assert documents[2].tokens[0] == 0 and documents[2].tokens[-1] == 1 and len(documents[2]) == 7
    assert all(document.loss_mask == [1] * len(document) for document in documents)


def test_windows_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.TXT").write_bytes(b"one\r\nmore\r\n\r\ntwo\r\n")
    assert _texts(load_documents([str(tmp_path / "a.TXT")], TOKENIZER)) == ["<s>one\nmore</s>", "<s>two</s>"]


ROWS = [
    ({"text": "plain", "id": 3}, "plain", "plain</s>"),
    ({"prompt": "Q: 1+1? ", "completion": "two"}, "Q: 1+1? two", "two</s>"),
    (
        {"instruction": "Add", "input": "1 2", "output": "3"},
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd\n\n### Input:\n1 2\n\n"
        "### Response:\n3",
        "3</s>",
    ),
    (
        {"instruction": "Say {hi}", "input": "", "output": "hi"},
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay {hi}\n\n### Response:\nhi",
        "hi</s>",
    ),
    (
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "bb"},
                {"role": "user", "content": "c"},
                {"role": "assistant", "content": "dd"},
            ]
        },
        "<user> a\n<assistant> bb\n<user> c\n<assistant> dd\n",
        "bb\ndd\n</s>",
    ),
]


@pytest.mark.parametrize("kind", ["jsonl", "json", "json_data", "json_lines", "parquet"])
@pytest.mark.parametrize(
    ("row", "text", "answer"), ROWS, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_row_formats(tmp_path: Path, kind: str, row: dict[str, Any], text: str, answer: str) -> None:
    if kind == "parquet":
        spec = str(tmp_path / "a.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), spec)
    elif kind == "jsonl":
        spec = _write(tmp_path, "a.jsonl", _lines(row) + "\n" + _lines(row))
    elif kind == "json_lines":
        spec = _write(tmp_path, "a.json", _lines(row, row))
    else:
        spec = _write(tmp_path, "a.json", [row, row] if kind == "json" else {"data": [row, row]})
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    assert _texts(load_documents([spec], tokenizer)) == [f"<s>{text}</s>"] * 2
    whole, only = (load_documents([spec], tokenizer, answer_only=flag)[0] for flag in (False, True))
    assert whole.loss_mask == [1] * len(whole)
    assert whole.tokens == only.tokens
    assert _counted(only) == (answer if "text" not in row else f"<s>{answer}")


def test_text_goes_first_unless_only_answers_count(tmp_path: Path) -> None:
    spec = _write(tmp_path, "a.jsonl", _lines({"text": "whole", "prompt": "p", "completion": "c"}))
    assert _texts(load_documents([spec], TOKENIZER)) == ["<s>whole</s>"]
    assert _texts(load_documents([spec], TOKENIZER, answer_only=True)) == ["<s>pc</s>"]


def test_a_talk_that_ends_with_the_user_has_no_answer_at_its_end(tmp_path: Path) -> None:
    talk = [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "bye"}]
    spec = _write(tmp_path, "a.jsonl", _lines({"messages": talk}))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    assert "hello" in _counted(load_documents([spec], tokenizer, answer_only=True)[0])
    assert "bye" not in _counted(load_documents([spec], tokenizer, answer_only=True)[0])
    assert "</s>" not in _counted(load_documents([spec], tokenizer, answer_only=True)[0])


def test_begin_and_end_are_not_doubled(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m['content'] }}</s>\n{% endfor %}"
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    spec = _write(tmp_path, "a.jsonl", _lines({"messages": [{"role": "user", "content": "x"}]}))
    assert _texts(load_documents([spec], tokenizer), tokenizer) == ["<s>x</s>\n"]


def test_a_tokenizer_without_bos_adds_none(tmp_path: Path) -> None:
    spec = _write(tmp_path, "a.txt", "one\n\ntwo")
    assert _texts(load_documents([spec], byte_tokenizer(bos_token=None))) == ["one</s>", "two</s>"]


def test_specs_follow_each_other_and_self_is_sampled(tmp_path: Path) -> None:
    written = Document([0, 5, 6], [1, 1, 1])
    specs = [_write(tmp_path, "b.txt", "bee"), "self", _write(tmp_path, "a.txt", "ay")]
    documents = load_documents(specs, TOKENIZER, sample=lambda: [written])
    assert documents[1] == written
    assert _texts([documents[0], documents[2]]) == ["<s>bee</s>", "<s>ay</s>"]


BAD_FILES = [
    ("none.txt", None, "no such file"),
    ("none.parquet", None, "no such file"),
    ("a.docx", "a,b", r"unknown extension '.docx'.*\.txt, \.jsonl, \.json, \.parquet.*self"),
    ("none.md", None, "unknown extension"),
    ("a.txt", "", "empty"),
    ("a.txt", "\n \n\n", "empty"),
    ("a.jsonl", "\n", "empty"),
    ("a.json", "", "empty"),
    ("a.json", "[]", "empty"),
    ("a.jsonl", '{"text": ""}', "empty"),
    (
        "a.jsonl",
        '{"text": "a"}\n{"texts": "b", "label": 1}',
        "row 2: has the fields texts, label; give one of: .*prompt/completion",
    ),
    ("a.jsonl", '{"text": "a"}\n\n{"text": oops}', "line 3: not valid JSON"),
    ("a.jsonl", '{"text": null}', "field 'text' must be text, it is NoneType"),
    ("a.jsonl", '{"prompt": "a", "completion": ["b"]}', "field 'completion' must be text, it is list"),
    ("a.jsonl", '["text"]', "row 1: is a list"),
    ("a.json", "{", "not valid JSON"),
    ("a.json", '{"rows": [], "x": 1}', "under the key 'data'; found: rows, x"),
    ("a.json", '{"data": 3}', "found: int"),
    ("a.jsonl", '{"messages": "hi"}', "list of objects"),
    ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', "no chat template"),
    ("a.parquet", "PAR1 no", "not a valid parquet"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_files_are_reported_in_one_line(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    spec = str(tmp_path / name) if content is None else _write(tmp_path, name, content)
    with pytest.raises(InputError, match=message) as caught:
        load_documents([spec], TOKENIZER)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_folder_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        load_documents([str(tmp_path)], TOKENIZER)


def test_a_refusing_chat_template_is_reported_in_one_line(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    spec = _write(tmp_path, "a.jsonl", _lines({"messages": [{"role": "user", "content": "a"}]}))
    with pytest.raises(InputError, match=r"refuses.*roles must alternate"):
        load_documents([spec], tokenizer)


def test_other_bad_requests(tmp_path: Path) -> None:
    spec = _write(tmp_path, "a.txt", "one")
    with pytest.raises(InputError, match="no EOS"):
        load_documents([spec], byte_tokenizer(eos_token=None))
    with pytest.raises(InputError, match="no data given"):
        load_documents([], TOKENIZER)
    with pytest.raises(InputError, match="no teacher"):
        load_documents(["self"], TOKENIZER)
    for nothing in ("", "pseudo:", "pseudo: "):
        with pytest.raises(InputError, match="names nothing"):
            load_documents([nothing], TOKENIZER, answer=lambda spec: [])


def test_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def fake(name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append((name, config, split))
        if name == "away/gone":
            raise ConnectionError("Couldn't reach 'away/gone'\non the Hub")
        return [{"text": "from the hub"}]

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert _texts(load_documents(["owner/name-v1.5", "wikitext:raw-v1"], TOKENIZER)) == ["<s>from the hub</s>"] * 2
    assert asked == [("owner/name-v1.5", None, "train"), ("wikitext", "raw-v1", "train")]
    with pytest.raises(InputError, match=r"away/gone.*Couldn't reach") as caught:
        load_documents(["away/gone"], TOKENIZER)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="neither a file nor a Hub dataset"):
        load_documents(["two words"], TOKENIZER)


def _corpus(num: int) -> list[Document]:
    return [Document([0, *range(7 * i, 7 * i + 3 + i % 11), 1], [1] * (5 + i % 11)) for i in range(1, num + 1)]


def test_split_by_whole_documents() -> None:
    documents = _corpus(101)
    train, heldout, num_duplicates = split(documents, DataConfig(length=16, heldout=0.1))
    assert (len(heldout), len(train), num_duplicates) == (10, 91, 0)
    order = [documents.index(document) for document in train]
    assert order == sorted(order)
    assert sorted([*order, *map(documents.index, heldout)]) == list(range(101))
    assert split(documents, DataConfig(length=777, heldout=0.1, keep_whole=True, answer_only=True)).heldout == heldout
    assert split(documents, DataConfig(length=16, heldout=0.1, seed=1)).heldout != heldout


def test_split_by_number_and_by_bound() -> None:
    documents = _corpus(101)
    assert len(split(documents, DataConfig(length=16, heldout="7")).heldout) == 7  # type: ignore[arg-type]
    assert len(split(documents, DataConfig(length=16, heldout=1e-6)).heldout) == 1
    bounded = split(documents, DataConfig(length=16, heldout=50, max_heldout_tokens=99)).heldout
    assert 99 - 15 < sum(map(len, bounded)) <= 99
    assert len(split(documents, DataConfig(length=16, heldout=50, max_heldout_tokens=1)).heldout) == 1


def test_copies_of_heldout_documents_are_not_trained_on() -> None:
    documents = _corpus(40)
    doubled = [*documents, *(Document(list(d.tokens), [0] * len(d)) for d in documents)]
    train, heldout, num_duplicates = split(doubled, DataConfig(length=16, heldout=9))
    held = {tuple(document.tokens) for document in heldout}
    assert len(held) == len(heldout) == num_duplicates == 9
    assert not held & {tuple(document.tokens) for document in train}
    assert len(train) == 80 - 18


@pytest.mark.parametrize(
    ("num", "settings", "message"),
    [
        (1, {}, "1 document.*blank line"),
        (5, {"heldout": 5}, "holds out 5 of 5"),
        (9, {"length": 4096}, "less than one sequence of data.length=4096"),
    ],
)
def test_too_little_data(num: int, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        split(_corpus(num), DataConfig(**{"length": 8, **settings}))


def test_config() -> None:
    config = DataConfig(length="2k", heldout="0.2", self_tokens="1.5M", self_temperature="8e-1")  # type: ignore[arg-type]
    assert (config.length, config.heldout, config.self_tokens, config.self_temperature) == (2000, 0.2, 1500000, 0.8)
    assert DataConfig(**json.loads(config.model_dump_json())) == config
    for bad in (
        {"length": 1},
        {"heldout": 0},
        {"heldout": 2.5},
        {"heldout": -1},
        {"self_temperature": 0},
        {"lenght": 512},
        {"seed": -1},
    ):
        with pytest.raises(ValidationError, match=re.escape(next(iter(bad)))):
            DataConfig(**bad)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="frozen"):
        config.length = 3


def test_real_stories_are_read_in_seconds(shared_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "teachers" / "stories260k")
    start = time.perf_counter()
    documents = load_documents([str(shared_dir / "data" / "tinystories" / "train_a.txt")], tokenizer)
    assert time.perf_counter() - start < 10
    assert len(documents) == 2316
    assert all(d.tokens[0] == 1 and d.tokens[-1] == 2 and len(d.tokens) == len(d.loss_mask) for d in documents)
    assert tokenizer.decode(documents[0].tokens[1:]).startswith("One day, a little girl named Lily found a needle")
    train, heldout, num_duplicates = split(documents, DataConfig(length=512))
    assert len(train) + len(heldout) + num_duplicates == 2316
    assert 0.04 < len(heldout) / 2316 < 0.06


def test_real_instructions(shared_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "teachers" / "stories260k")
    rows = json.loads((shared_dir / "data" / "instruct" / "alpaca_5000.json").read_text(encoding="utf-8"))
    spec = _write(tmp_path, "alpaca.json", rows[:50])
    document = load_documents([spec], tokenizer, answer_only=True)[0]
    pairs = zip(document.tokens, document.loss_mask, strict=True)
    assert tokenizer.decode([token for token, counts in pairs if counts]).strip() == "No</s>"

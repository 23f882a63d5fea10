"""Text that asks for what it held, made for training recall."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import recall_text


def story(sentences: int) -> str:
    return " ".join(f"The fox number {i} ran over the wide field, and \u2028 nobody saw it." for i in range(sentences))


def test_facts_are_stated_and_asked_for_far_behind(tmp_path: Path) -> None:
    path, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    rows = [json.dumps({"text": story(n)}, ensure_ascii=False) for n in (400, 1, 500)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    recall_text.main(["--text", str(path), "--out", str(out), "--documents", "7"])
    made = [json.loads(line)["text"] for line in out.read_text("utf-8").split("\n") if line]
    assert len(made) == 7 and len(set(made)) == 7
    for text in made:
        words = text.split()
        assert 550 < len(words) < 1430
        end = " ".join(words[-40:])
        repeated = [part for part in end.split(".")[1:-1] if part and " ".join(words).count(part.strip()) >= 2]
        assert len(repeated) >= 2


def test_texts_without_sentences_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": story(3)}))
    with pytest.raises(SystemExit, match="longer"):
        recall_text.main(["--text", str(path), "--out", str(tmp_path / "out.jsonl")])

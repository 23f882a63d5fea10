"""Text sampled from a teacher survives kills, damage, a second run, and two runs at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import SIZE, byte_tokenizer
from models import tiny

import linearize.training.data.sampling as sampling
from linearize.errors import InputError
from linearize.storage.journal import Journal, open_journal
from linearize.training.data.documents import Document
from linearize.training.data.sampling import FILE, sample_documents

BATCH = 3


class Killed(Exception):  # noqa: N818 (not an error)
    """Stands for the end of the process."""


def written(cache: Path | None, tokens: int = 200, seed: int = 5, model_seed: int = 5, **more: Any) -> list[Document]:
    """Text of a random teacher that ends some of it early."""
    model = tiny(vocab_size=SIZE, max_position_embeddings=40, eos_token_id=1, bos_token_id=0, seed=model_seed)
    model.generation_config.eos_token_id = [1, *range(20, 60)]
    return sample_documents(
        model, byte_tokenizer(), tokens, seed=seed, batch_size=BATCH, max_new_tokens=13, cache=cache, **more
    )


def killed_after(cache: Path, batches: int) -> Path:
    calls = 0

    def kill(done: int, expected: int) -> None:
        nonlocal calls
        calls += 1
        if calls == batches:
            raise Killed

    with pytest.raises(Killed):
        written(cache, progress=kill)
    (file,) = cache.glob(f"*/{FILE}")
    return file


def count_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each batch that a teacher writes."""
    made: list[int] = []
    write = sampling.write

    def counted(*args: Any) -> Any:
        made.append(1)
        return write(*args)

    monkeypatch.setattr(sampling, "write", counted)
    return made


@pytest.mark.parametrize("batches", [1, 3])
def test_a_killed_sampling_continues_and_yields_the_same_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    made = count_batches(monkeypatch)
    expected = written(None)
    whole = len(made)
    assert whole > 4
    file = killed_after(tmp_path, batches)
    assert len(file.read_bytes().splitlines()) == batches
    made.clear()
    torch.manual_seed(batches)  # what else was drawn does not matter
    before = torch.get_rng_state()
    assert written(tmp_path) == expected and len(made) == whole - batches
    assert torch.equal(torch.get_rng_state(), before)
    made.clear()
    assert written(tmp_path) == expected and not made, "the second run reads"
    assert written(tmp_path, tokens=90) == expected[: len(written(None, tokens=90))]
    made.clear()
    assert written(tmp_path, tokens=300) == written(None, tokens=300)
    assert len(list(tmp_path.glob("*"))) == 1
    for other in ({"seed": 6}, {"model_seed": 6}):
        assert written(tmp_path, **other) != expected
    assert len(list(tmp_path.glob("*"))) == 3


@pytest.mark.parametrize("how", ["cut", "bit", "line gone", "empty"])
def test_damaged_text_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str) -> None:
    expected = written(None)
    file = killed_after(tmp_path, 3)
    content = bytearray(file.read_bytes())
    lines = content.splitlines(keepends=True)
    if how == "cut":
        content = content[:-9]
    elif how == "bit":
        digit = next(i for i in range(len(lines[0]) + 30, len(content)) if chr(content[i]).isdigit())
        content[digit] ^= 1  # another digit: valid JSON
    elif how == "line gone":
        content = lines[0] + b"\n" + lines[2]
    else:
        content = bytearray()
    file.write_bytes(content)
    assert written(tmp_path) == expected
    printed = [record.getMessage() for record in caplog.records]
    if how in ("cut", "empty"):
        assert not printed, "a kill explains it"
    else:
        assert len(printed) == 1 and f"{file} is damaged from line 2 on" in printed[0]
    assert written(tmp_path) == expected and len(caplog.records) == len(printed), "the file is whole again"


HOLDER = """
import fcntl, sys, time
with open(sys.argv[1], "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write("process 7 on moon")
    file.flush()
    print("locked", flush=True)
    time.sleep(1)
"""


def test_a_second_process_waits_for_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "texts.jsonl"
    command = [sys.executable, "-c", HOLDER, str(path.with_suffix(".lock"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        began = time.monotonic()
        with open_journal(path) as journal:
            assert time.monotonic() - began > 0.3, "it did not wait"
            journal.append("row")
    assert f"process 7 on moon is writing the same text ({path})" in capsys.readouterr().err
    with open_journal(path) as journal:
        assert journal.rows == ["row"]


def test_a_cache_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="LINEARIZE_CACHE") as caught:
        written(tmp_path / "file")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["file"]


def test_plain_lines_are_for_other_programs(tmp_path: Path) -> None:
    """Without checksums rows are JSON lines; a line that was cut and stale rows leave the file, the others stay."""
    path = tmp_path / "deep" / "answers.jsonl"
    journal = Journal(path, checksums=False)
    for row in ({"a": 1}, {"a": 2}, {"a": "\u2028ü"}):
        assert journal.append(row) == row
    assert [json.loads(line) for line in path.read_text("ascii").splitlines()] == journal.rows
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    path.write_bytes(lines[0] + b'{"a": \n' + lines[1] + lines[2] + b'{"a": 3')
    again = Journal(path, checksums=False, stale=lambda row: row["a"] == 1)
    assert again.rows == [{"a": 2}, {"a": "\u2028ü"}]
    again.append({"a": (4,)})
    assert Journal(path, checksums=False).rows == [{"a": 2}, {"a": "\u2028ü"}, {"a": [4]}]
    memory = Journal(None)
    memory.append("row")
    assert memory.rows == ["row"]

"""What the tests of faults share: a small conversion that uses everything, and what an unbroken run of it gave."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from benchmarks.kills import differences
from test_evaluation_outputs import tiny_llama, tiny_tokenizer

from linearize.cli.main import main

SETTINGS = [
    "--set", "plan.mixer.window=4", "--set", "data.heldout=3", "--set", "stages.0.batch=2", "--set", "stages.1.batch=2",
    "--set", "stages.0.tokens=512", "--set", "stages.1.tokens=512", "--set", "data.length=64", "--device", "cpu",
    "--set", "data.self_tokens=900", "--set", "data.self_batch=5", "--set", "stages.0.evaluate_every=0.25",
    "--set", "plan.schedule={kind: progressive, replaced: [0.34, 1.0]}",
]  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`teacher`, and `whole`: an unbroken run on the teacher's own text, in two steps of a schedule."""
    path = tmp_path_factory.mktemp("faults")
    tiny_llama(1).save_pretrained(path / "teacher")
    tiny_tokenizer().save_pretrained(path / "teacher")
    began = time.monotonic()
    assert main(command(path, path / "whole")) == 0
    (path / "seconds.json").write_text(json.dumps(time.monotonic() - began))
    return path


@pytest.fixture(autouse=True)
def own_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test lets the teacher write anew."""
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))


def command(folder: Path, out: Path, *more: str) -> list[str]:
    return ["convert", str(folder / "teacher"), "--data", "self", "--out", str(out), *SETTINGS, *more]


def assert_same(folder: Path, out: Path) -> None:
    assert differences(folder / "whole", out) == []
    assert left_beside(out) == []


def left_beside(out: Path) -> list[str]:
    """What a run keeps beside its folder until it is through."""
    return [path.name for path in out.parent.glob(f".{out.name}*")]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What the command said last; nothing else may look like an error."""
    error = capsys.readouterr().err
    notices = error.count("the teacher has") + error.count("linearize: data ")
    assert "Traceback" not in error and error.count("linearize: ") - notices == 1, error
    return error.splitlines()[-1]

"""The command `linearize serve` as a process: signals, a kill, a restart, its errors, and the hand-over to vLLM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve_cases import state_files, student, tokenizer

from linearize.cli.main import main
from linearize.serving.server import ServeOptions
from linearize.serving.vllm_command import vllm_arguments


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    student().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@contextmanager
def process(folder: Path, *options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "linearize", "serve", str(folder), "--port", "0", *options]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    assert started.stderr is not None
    try:
        line = started.stderr.readline()
        assert " at http://127.0.0.1:" in line, line
        yield started, line.split(" at ")[1].split(";")[0]
    finally:
        started.kill()
        started.wait()
        started.stderr.close()


def ask(url: str, *turns: str, key: str | None = None) -> tuple[str, int, int]:
    """The answer, the prompt's tokens, and those that were resumed."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    body = {"messages": messages, "max_tokens": 9, "temperature": 0}
    got = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=30).raise_for_status().json()
    usage = got["usage"]
    cached: int = usage["prompt_tokens_details"]["cached_tokens"]
    return got["choices"][0]["message"]["content"], usage["prompt_tokens"], cached


@pytest.mark.slow
def test_states_outlive_a_kill_and_a_stop(folder: Path, tmp_path: Path) -> None:
    states = ("--state-dir", str(tmp_path))
    history = ["what is it that outlives a process?"]
    with process(folder, *states) as (killed, url):
        answer, first, _ = ask(url, *history)
        history += [answer, "and then?"]
        while len(state_files(tmp_path)) < 2:
            pass
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    with process(folder, *states) as (stopped, url):
        answer, second, resumed = ask(url, *history)
        assert first <= resumed < second
        history += [answer, "at last"]
        stopped.send_signal(signal.SIGTERM)
        assert stopped.wait(20) == 0
    with process(folder, *states, LINEARIZE_API_KEY="secret") as (interrupted, url):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert second <= ask(url, *history, key="secret")[2]
        with httpx.stream(
            "POST", f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 300, "stream": True},
            headers={"Authorization": "Bearer secret"}, timeout=60,
        ) as response:  # fmt: skip
            lines = response.iter_lines()
            next(lines)
            interrupted.send_signal(signal.SIGINT)
            assert [line for line in lines if line][-1] == "data: [DONE]"  # the answer that has begun is ended
        assert interrupted.wait(20) == 0
        assert interrupted.stderr is not None
        printed = interrupted.stderr.read()
    assert "Traceback" not in printed and "outlives" not in printed and "secret" not in printed


WRONG = {
    "--slots=0": "slots is 0", "--port=70000": "port is 70000", "--engine=tgi": "known: embedded, vllm",
    "--host=nowhere.invalid": "unknown here", "--timeout=-1": "above 0", "--frobnicate": "No such option",
    "--state-memory=-3": "no size",
}  # fmt: skip


@pytest.mark.parametrize("option", WRONG)
def test_wrong_options_are_one_line(folder: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(folder), option]) == 2
    printed = capsys.readouterr().err
    assert WRONG[option] in printed and printed.count("\n") == 1


def test_an_address_in_use_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", str(folder), "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot be used" in capsys.readouterr().err


def test_memory_that_holds_no_text_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(folder), "--port", "0", "--memory", "1kB", "--state-disk", "0"]) == 2
    assert "--memory" in capsys.readouterr().err


def test_vllm_gets_the_same_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("os.execv", lambda *call: calls.append(call))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    options = ["serve", str(folder), "--engine", "vllm", "--port", "81", "--context", "2k", "--api-key", "k"]
    options += ["--revision", "v1", "--token", "hf_t"]
    monkeypatch.setenv("HF_TOKEN", "")
    assert main(options) == 2 and "not installed" in capsys.readouterr().err
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    main(options)
    assert calls[0][0] == str(program)
    assert calls[0][1] == [
        "vllm", "serve", str(folder), "--host", "127.0.0.1", "--port", "81", "--max-model-len", "2000",
        "--revision", "v1",
    ]  # fmt: skip
    assert os.environ["HF_TOKEN"] == "hf_t"
    assert os.environ.pop("VLLM_API_KEY") == "k" and "k" not in calls[0][1]


def test_options_of_the_embedded_engine_are_not_dropped_for_vllm() -> None:
    from linearize.errors import InputError

    with pytest.raises(InputError, match="--state-dir"):
        vllm_arguments("m", {"host": "h", "state_dir": "d"})
    assert ServeOptions().host == "127.0.0.1"

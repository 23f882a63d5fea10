"""Long commands against kills, Ctrl-C, changed teachers and each other: one line, nothing half-written, and the same
command goes on to what an unbroken run gives."""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.kills import differences
from fault_cases import assert_same, command, folder, left_beside, one_line, own_text
from safetensors.torch import load_file, save_file

from linearize.cli.main import main

__all__ = ["folder", "own_text"]  # fixtures


def killed(arguments: list[str], after: float) -> bool:
    """Whether a process with this command was killed after so many seconds, before it was through."""
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        os._exit(main(arguments))
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.slow
def test_killed_again_and_again_it_ends_as_an_unbroken_run(folder: Path, tmp_path: Path) -> None:
    """Each kill falls anywhere in the time that an unbroken run takes from its start to the student."""
    out, generator, hits = tmp_path / "student", random.Random(3), 0
    seconds = json.loads((folder / "seconds.json").read_text())
    for _ in range(8):
        hits += not out.exists() and killed(command(folder, out), generator.uniform(0.0, 0.8 * seconds))
    if not out.exists():
        assert main(command(folder, out)) == 0
    elif left_beside(out):  # killed while it cleared up: the same command does that, and says what it found
        main(command(folder, out))
    assert hits >= 3
    assert_same(folder, out)


PLACES = {
    "loading": "linearize.conversion.prepare:load_teacher",
    "sampling": "linearize.training.data.sampling:write",
    "a step": "linearize.training.step:Stepper.step",
    "held-out loss": "linearize.conversion.run:loss_only",
    "the report's numbers": "linearize.conversion.run:report_of",
    "weights": "linearize.modeling.io.student_folder:writing",
    "the card": "linearize.conversion.outputs:model_card",
    "the last rename": "linearize.storage.atomic:_swap_in",
    "loading the student": "linearize.conversion.api:load",
    "clearing up": "linearize.conversion.api:discard",
}


def stop_in(place: str, monkeypatch: pytest.MonkeyPatch, how: BaseException, call: int = 1) -> None:
    """The `call`-th call of a function stops the program."""
    module, _, path = place.partition(":")
    owner, name = importlib.import_module(module), path
    if "." in path:
        owner, name = getattr(owner, path.partition(".")[0]), path.partition(".")[2]
    original, calls = getattr(owner, name), 0

    def stopping(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise how
        return original(*args, **named)

    monkeypatch.setattr(owner, name, stopping)


@pytest.mark.slow
def test_ctrl_c_anywhere_is_one_line_and_the_same_command_continues(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "student"
    for name, place in PLACES.items():
        with monkeypatch.context() as patch:
            stop_in(place, patch, KeyboardInterrupt(), call=2 if name == "a step" else 1)
            capsys.readouterr()
            assert main(command(folder, out)) == 130, name
        error = capsys.readouterr().err
        assert error.endswith("linearize: interrupted\n") and "Traceback" not in error, name
        assert out.exists() == (name in ("loading the student", "clearing up")), name
        if name == "loading the student":
            shutil.rmtree(out)  # to come to the next place
            (tmp_path / ".student.run" / "ended.json").unlink()
    assert main(command(folder, out)) == 0
    assert_same(folder, out)


@pytest.mark.slow
def test_another_wish_replaces_a_student_whose_run_was_killed_at_its_end(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "student", ["--set", "seed=5"]
    with monkeypatch.context() as patch:
        stop_in(PLACES["clearing up"], patch, KeyboardInterrupt())
        assert main(command(folder, out)) == 130
    assert main(command(folder, out, *other)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(command(folder, out, *other, "--overwrite")) == 0
    assert "model.safetensors" in differences(folder / "whole", out)


@pytest.mark.parametrize("argv", [["-m", "linearize", "recipes"], ["-c", "import linearize"]])
def test_ctrl_c_while_the_program_starts(tmp_path: Path, argv: list[str]) -> None:
    (tmp_path / "transformers.py").write_text("raise KeyboardInterrupt")
    source = Path(__file__).parents[1] / "src"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{source}"}
    done = subprocess.run([sys.executable, *argv], env=environment, capture_output=True, text=True, check=False)
    if argv[0] == "-m":
        assert (done.returncode, done.stderr) == (130, "linearize: interrupted\n")
    else:
        assert "Traceback" in done.stderr, "a program that imports the package decides for itself"


def test_a_teacher_that_changed_under_its_name_is_not_continued(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("\n\n".join(f"Story {i}: the cat sat. The end of {i * 37}." for i in range(40)))
    arguments = command(tmp_path, tmp_path / "student")
    arguments[arguments.index("self")] = str(tmp_path / "text.txt")
    with monkeypatch.context() as patch:
        stop_in(PLACES["a step"], patch, KeyboardInterrupt(), call=4)
        assert main(arguments) == 130
    tensors = load_file(tmp_path / "teacher" / "model.safetensors")
    with torch.no_grad():
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-3  # one weight of all
    save_file(tensors, tmp_path / "teacher" / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert main(arguments) == 2
    assert "belongs to another run (teacher_weights was" in one_line(capsys)


HOLDER = """
import fcntl, sys, time
with open(sys.argv[1], "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write("process 7 on moon")
    file.flush()
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_of_two_runs_at_once_the_second_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "student"
    live = tmp_path / ".student.partial-live"
    live.mkdir()
    program: Any = subprocess.Popen
    with program([sys.executable, "-c", HOLDER, str(tmp_path / ".student.lock")], stdout=-1, text=True) as holder:
        assert holder.stdout.readline() == "locked\n"
        for arguments in (
            command(folder, out),
            ["export", str(folder / "whole"), "--to", "hf", "--out", str(out)],
            ["eval", str(folder / "whole"), "--out", str(out), "--device", "cpu"],
        ):
            capsys.readouterr()
            assert main(arguments) == 2
            assert f"{out}: is being written by process 7 on moon: wait" in one_line(capsys)
        assert live.is_dir(), "what a living run writes is left alone"
        holder.kill()
    assert main(command(folder, out)) == 0
    assert_same(folder, out)
    report = json.loads((out / "report.json").read_text())
    assert report["student_loss"] > 0

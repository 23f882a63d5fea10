"""The commands for real, on a tiny random model: convert, eval, generate, inspect, and what goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_evaluation_outputs import tiny_llama, tiny_tokenizer

from linearize.cli.main import main

SMALL = [
    "--set", "plan.mixer.window=4", "--set", "data.heldout=3", "--set", "stages.0.batch=2", "--set", "stages.1.batch=2",
    "--set", "stages.0.tokens=256", "--set", "stages.1.tokens=128", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`teacher` (context 64) and `text.txt`."""
    path = tmp_path_factory.mktemp("commands")
    tiny_llama(1).save_pretrained(path / "teacher")
    tiny_tokenizer().save_pretrained(path / "teacher")
    stories = [f"Story {i}: {'the cat sat. ' * (i % 5 + 1)}The end of {i * 37}." for i in range(40)]
    (path / "text.txt").write_text("\n\n".join(stories))
    return path


@pytest.fixture(scope="module")
def student(folder: Path) -> Path:
    """A student made by the command."""
    out = folder / "student"
    assert (
        main(["convert", str(folder / "teacher"), "--data", str(folder / "text.txt"), "--out", str(out), *SMALL]) == 0
    )
    return out


def convert(folder: Path, out: str, *more: str) -> list[str]:
    return ["convert", str(folder / "teacher"), "--data", str(folder / "text.txt"), "--out", str(folder / out), *more]


def test_a_recipe_longer_than_the_context_is_fitted_and_reported(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    skip = ["stages.1.tokens=0" if word.startswith("stages.1.tokens") else word for word in SMALL]
    assert main(convert(folder, "fitted", *skip)) == 0
    messages = [record.getMessage() for record in caplog.records]
    assert any("data.length is 64" in message and "1024" in message for message in messages), messages
    assert any("stage 1 (lowrank) is skipped" in message for message in messages), messages
    report = json.loads((folder / "fitted" / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["attention_transfer"]
    assert "length: 64\n" in (folder / "fitted" / "recipe.yaml").read_text()
    out = capsys.readouterr().out
    assert f"{report['teacher_loss']:.4f}" in out and f"student written to {folder / 'fitted'}" in out


def test_a_length_beyond_the_context_that_was_asked_for_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(convert(folder, "long", *SMALL, "--set", "data.length=65")) == 2
    error = capsys.readouterr().err
    assert "data.length 65" in error and "context 64" in error and not (folder / "long").exists()


def test_export_writes_a_folder_or_says_what_would_take_the_student(
    folder: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["export", str(student), "--to", "granite-hybrid", "--out", str(tmp_path / "native")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "hold lolcats, granite-hybrid takes mamba2 and softmax: use --to hf" in error
    assert not list(tmp_path.iterdir())
    assert main(["export", str(student), "--to", "hf", "--out", str(tmp_path / "own")]) == 0
    assert capsys.readouterr().out == f"exported to {tmp_path / 'own'}\n"
    assert (tmp_path / "own" / "modeling_linearized.py").is_file()
    assert main(["export", str(folder / "teacher"), "--to", "hf", "--out", str(tmp_path / "none")]) == 2
    assert "not a student" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_eval_inspect_and_generate_take_the_student(
    folder: Path, student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["eval", str(student), "--json", "--device", "cpu"]) == 0
    everything = json.loads(capsys.readouterr().out)
    report = json.loads((student / "report.json").read_text())
    assert everything["student_loss"] == pytest.approx(report["student_loss"], abs=1e-4)
    assert main(["eval", str(student), "--tokens", "60", "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] < everything["tokens"]
    assert main(["eval", str(student), "--device", "cpu"]) == 0
    assert f"{everything['gap']:.2f}" in capsys.readouterr().out
    assert main(["inspect", str(student), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_converted"] == 3
    assert main(["generate", str(student), "--prompt", "The cat", "--max-new-tokens", "5", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("The cat")


def test_a_second_run_needs_overwrite(folder: Path, student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (student / "model.safetensors").stat().st_mtime_ns
    assert main(convert(folder, "student", *SMALL)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (student / "model.safetensors").stat().st_mtime_ns == before
    assert main(convert(folder, "student", *SMALL, "--overwrite")) == 0
    assert (student / "model.safetensors").stat().st_mtime_ns > before
    assert not list(folder.glob(".student*"))


def test_self_is_written_again_for_eval(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["convert", str(folder / "teacher"), "--data", "self", "--out", str(folder / "own"), *SMALL]
    settings = ["--set", "data.self_tokens=700", "--set", "data.self_batch=7", "--set", "data.self_max_new_tokens=40"]
    assert main([*argv, *settings]) == 0
    capsys.readouterr()
    assert main(["eval", str(folder / "own"), "--json", "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    report = json.loads((folder / "own" / "report.json").read_text())
    assert result["student_loss"] == pytest.approx(report["student_loss"], abs=1e-4)
    assert result["tokens"] == report["heldout_tokens"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher": "none/of/these"}, ["none/of/these", "not a model folder"]),
        ({"data": "none.txt"}, ["none.txt", "no such file"]),
        ({"recipe": "lolcat"}, ["lolcat", "lolcats"]),
        ({"set": "plan.mixer.windw=3"}, ["plan.mixer.windw", "plan.mixer.window"]),
        ({"set": "plan.mixer.window=-3"}, ["plan.mixer.window", "-3"]),
        ({"set": "plan.mixer.feature_dim=0"}, ["plan.mixer.feature_dim", "0"]),
        ({"set": "plan.mixer.name=lolcat"}, ["lolcat", "lolcats"]),
        ({"set": "plan.layers=[0, 3]"}, ["layer 3", "3 layers"]),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    change: dict[str, str], words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"teacher": str(folder / "teacher"), "data": str(folder / "text.txt"), "recipe": "window-linear"} | change
    argv = ["convert", options["teacher"], "--data", options["data"], "--recipe", options["recipe"], "--device", "cpu"]
    argv += ["--out", str(folder / "bad"), *(["--set", options["set"]] if "set" in options else [])]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("linearize: ") and error.count("\n") == 1, error
    assert all(word in error for word in words), error
    assert not (folder / "bad").exists()


@pytest.mark.slow
def test_ctrl_c_in_the_middle_leaves_nothing_at_the_final_name_and_the_same_command_continues(folder: Path) -> None:
    endless = [*SMALL, "--set", "stages.0.evaluate_every=1"]
    endless[endless.index("stages.0.tokens=256")] = "stages.0.tokens=1e9"
    command = [sys.executable, "-m", "linearize", *convert(folder, "stopped", *endless)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        begun, lines = time.monotonic(), []
        for line in process.stderr:
            lines.append(line)
            if "step 3/" in line or time.monotonic() - begun > 90:
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read().splitlines()
    assert process.returncode == 130 and rest[-1] == "linearize: interrupted", (lines, rest)
    assert not any("Traceback" in line for line in [*lines, *rest])
    assert not (folder / "stopped").exists()
    assert (folder / ".stopped.run").is_dir(), "what was done is kept for the same command"
